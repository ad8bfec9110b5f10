"""Cosine to vectors of category names, after a learned projection of the features; equations: ``methods/text.py``."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.heads.base import LogitHead, empty

FORMS = ("sigmoid", "softmax")


class TextHead(LogitHead):
    """``names`` [C, E] of length 1; ``form``: sigmoids, or a softmax with a learned vector for the background."""

    kind = "text"
    not_linear = "it divides projected features by their norm"

    names: Tensor

    def __init__(self, names: Tensor, feature_size: int, form: str, temperature: float, bias: bool) -> None:
        super().__init__(len(names), feature_size)
        if form not in FORMS:
            raise ValueError(f"unknown form of text head '{form}'")
        self.form, self.temperature = form, temperature
        self.projection = nn.Linear(feature_size, names.shape[1])
        self.register_buffer("names", functional.normalize(names))
        self.bias = nn.Parameter(empty(1)) if bias else None
        self.background = nn.Parameter(empty(names.shape[1])) if form == "softmax" else None

    def reset(self, bias: float, generator: torch.Generator) -> None:
        """torch's default initialisation of the projection; a random background."""
        with torch.no_grad():
            for parameter in self.projection.parameters():
                parameter.uniform_(-(self.feature_size**-0.5), self.feature_size**-0.5, generator=generator)
            if self.bias is not None:
                self.bias.fill_(bias)
            if self.background is not None:
                self.background.normal_(generator=generator)

    def named(self, names: Tensor) -> Self:
        """The same head for other categories, [K, E] vectors of their names."""
        other = type(self)(names, self.feature_size, self.form, self.temperature, self.bias is not None)
        other.load_state_dict(self.state_dict() | {"names": functional.normalize(names)})
        return other.train(self.training)

    def config(self) -> dict[str, Any]:
        """Shape and form."""
        shape = {"names": list(self.names.shape), "feature_size": self.feature_size}
        return shape | {"form": self.form, "temperature": self.temperature, "bias": self.bias is not None}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        return cls(empty(*config["names"]), **{k: v for k, v in config.items() if k != "names"})

    @property
    def distribution(self) -> str:
        """As the form says."""
        return self.form

    def raw(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C], of a softmax [N, C+1] logits."""
        names = self.names
        if self.background is not None:
            names = torch.cat([names, functional.normalize(self.background[None])])
        x = self.temperature * functional.normalize(self.projection(features))
        z = functional.linear(x, names)
        return z if self.bias is None else z + self.bias

    def activate(self, raw: Tensor) -> Tensor:
        """[N, C] or [N, C+1] -> [N, C+1]."""
        if self.form == "softmax":
            return raw.softmax(dim=1)
        return torch.cat([raw.sigmoid(), torch.zeros_like(raw[:, :1])], dim=1)
