"""A small multi-layer classifier on cached features: linear, ReLU, ..., linear, softmax."""

from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from calib.heads.base import LogitHead


class MLPHead(LogitHead):
    """``sizes`` = [D, hidden ..., C+1]; torch's default initialisation. Scores are foreground probabilities."""

    kind = "mlp"
    not_linear = "it has hidden layers"

    def __init__(self, sizes: list[int], inputs: str = "features") -> None:
        super().__init__(sizes[-1] - 1, sizes[0], inputs)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.sizes = sizes

    def config(self) -> dict[str, Any]:
        """The layer sizes, and what the first layer sees."""
        return {"sizes": self.sizes, "inputs": self.inputs}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Of the shape in ``config``; the tensors are replaced by loading."""
        return cls([int(s) for s in config["sizes"]], str(config["inputs"]))

    def reset(self, generator: torch.Generator) -> None:
        """torch's default initialisation of linear layers, from an explicit generator."""
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            bound = layer.in_features**-0.5
            with torch.no_grad():
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)

    def logits(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, C+1]."""
        x = features
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        out: Tensor = self.layers[-1](x)
        return out

    def raw(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1] logits."""
        return self.logits(features)

    def activate(self, raw: Tensor) -> Tensor:
        """[N, C+1] -> [N, C+1] probabilities."""
        return raw.softmax(dim=1)
