"""A linear layer with one softmax per group of classes, gated by foreground against background (BAGS)."""

from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from calib.heads.base import LogitHead, empty
from calib.heads.linear import LinearClassifier
from calib.losses.group import Groups


class GroupHead(LogitHead):
    """A linear layer with one softmax per group; scores are gated group probabilities (Eq. 6)."""

    kind = "group"
    not_linear = "every group of classes has a softmax of its own, multiplied by P(foreground)"

    local: Tensor

    def __init__(self, groups: Groups, feature_size: int, *, has_others: bool = True, gated: bool = True) -> None:
        super().__init__(groups.local.shape[1] - 1, feature_size)
        self.has_others, self.gated = has_others, gated
        self.register_buffer("local", groups.local)
        self.slices = groups.slices
        self.classifier = LinearClassifier(empty(groups.outputs, feature_size), empty(groups.outputs))

    def config(self) -> dict[str, Any]:
        """Feature size, class count and the width of every group."""
        widths = [s.stop - s.start for s in self.slices]
        sizes = {"feature_size": self.feature_size, "num_classes": self.num_classes, "widths": widths}
        return {**sizes, "has_others": self.has_others, "gated": self.gated}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        stops = torch.tensor([0, *config["widths"]]).cumsum(0).tolist()
        slices = tuple(slice(a, b) for a, b in pairwise(stops))
        local = torch.zeros(len(slices), config["num_classes"] + 1, dtype=torch.long)
        flags = {k: bool(config[k]) for k in ("has_others", "gated")}
        return cls(Groups(local, slices), config["feature_size"], **flags)

    @property
    def distribution(self) -> str:
        """Every group of classes has a softmax of its own: no row of scores has a sum of its own."""
        return ""

    def logits(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, C+G+2]; `others` at -inf where the head has none."""
        z: Tensor = self.classifier(features)
        return z if self.has_others else Groups(self.local, self.slices).without_others(z)

    def raw(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+G+2] logits."""
        return self.logits(features)

    def activate(self, raw: Tensor) -> Tensor:
        """[N, C+G+2] -> [N, C+1]."""
        return Groups(self.local, self.slices).scores(raw, gated=self.gated)
