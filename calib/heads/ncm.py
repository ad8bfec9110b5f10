"""Scores by the nearest class mean; equations: ``methods/ncm.py``."""

from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from calib.heads.base import empty
from calib.heads.linear import ClassifierHead, Logits

TRANSFORMS = ("un", "l2n", "cl2n")


DISTANCES = ("l2", "cos", "unit")


def transformed(x: Tensor, mean: Tensor, transform: str) -> Tensor:
    """[N, D], [D] -> [N, D]."""
    if transform == "un":
        return x
    return functional.normalize(x if transform == "l2n" else x - mean, eps=1e-12)


def distances(q: Tensor, centroid: Tensor, distance: str) -> Tensor:
    """[N, D], [C, D] -> [N, C] logits."""
    if distance == "l2":
        return -(q.square().sum(1, keepdim=True) + centroid.square().sum(1) - 2 * q @ centroid.T)
    if distance == "cos":
        return q @ centroid.T / q.shape[1]
    return functional.normalize(q, eps=1e-12) @ functional.normalize(centroid, eps=1e-12).T


class NCMHead(ClassifierHead):
    """The detector, or the base, decides on background, the nearest centroid on the class."""

    kind = "ncm"
    not_linear = "classes are scored by their distance to class means"

    centroid: Tensor
    mean: Tensor
    present: Tensor

    def __init__(
        self, classifier: Logits, transform: str, distance: str, temperature: float, *, detector_logits: bool = True
    ) -> None:
        super().__init__(classifier.requires_grad_(False), detector_logits=detector_logits)
        self.transform, self.distance, self.temperature = transform, distance, temperature
        self.register_buffer("centroid", empty(self.num_classes, self.feature_size))
        self.register_buffer("mean", empty(self.feature_size))
        self.register_buffer("present", torch.zeros(self.num_classes, dtype=torch.bool))

    def set(self, mean: Tensor, centroid: Tensor, present: Tensor) -> Self:
        """Fill in what was measured."""
        self.mean, self.centroid, self.present = mean, centroid, present
        return self

    def config(self) -> dict[str, Any]:
        """As ``ClassifierHead.config``, and the form."""
        form = {"transform": self.transform, "distance": self.distance, "temperature": self.temperature}
        return super().config() | form

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1]."""
        background = self.logits(features, logits).softmax(dim=1)[:, -1:]
        near = distances(transformed(features, self.mean, self.transform), self.centroid, self.distance)
        near = (near / self.temperature).masked_fill(~self.present, -torch.inf)
        return torch.cat([(1 - background) * near.softmax(dim=1), background], dim=1)
