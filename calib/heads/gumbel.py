"""One Gumbel activation per class: score_c = exp(-exp(-z_c)), background 0; equations: ``methods/gol.py``."""

import torch
from torch import Tensor

from calib.heads.base import LogitHead
from calib.heads.linear import ClassifierHead, LinearClassifier
from calib.losses.gumbel import gumbel


class GumbelHead(ClassifierHead, LogitHead):
    """C columns, each a score of its own."""

    kind = "gumbel"
    not_linear = "its scores are exp(-exp(-z)), no sigmoids or softmax of an affine function"

    classifier: LinearClassifier

    def __init__(self, classifier: LinearClassifier, *, detector_logits: bool = False) -> None:
        super().__init__(classifier, detector_logits=detector_logits, extra=0)

    @property
    def distribution(self) -> str:
        """Each score stands alone."""
        return "sigmoid"

    def forward(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C] logits whose sigmoids are the scores."""
        e = (-self.raw(features, logits)).clamp(-80, 9).exp()  # -log of the scores; they are 0 in float32 beyond
        return -e - (-torch.expm1(-e)).log()

    def activate(self, raw: Tensor) -> Tensor:
        """[N, C] -> [N, C+1]."""
        return torch.cat([gumbel(raw), torch.zeros_like(raw[:, :1])], dim=1)
