"""Products of a sigmoid and a shifted one, FRACAL's form for sigmoid detectors (``methods/fracal.py``)."""

import torch
from torch import Tensor

from calib.heads.base import empty
from calib.heads.linear import ClassifierHead, Logits


class SigmoidProductHead(ClassifierHead):
    """score_c = sigmoid(z_c) sigmoid(z_c + shift_c) over the logits of a sigmoid detector or base; background 0."""

    kind = "sigmoid-product"
    not_linear = "scores are products of two sigmoids"

    shift: Tensor

    def __init__(self, classifier: Logits, shift: Tensor | None = None, *, detector_logits: bool = True) -> None:
        super().__init__(classifier.requires_grad_(False), detector_logits=detector_logits, extra=0)
        self.register_buffer("shift", empty(self.num_classes) if shift is None else shift)

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1]."""
        z = self.logits(features, logits)
        return torch.cat([z.sigmoid() * (z + self.shift).sigmoid(), torch.zeros_like(z[:, :1])], dim=1)
