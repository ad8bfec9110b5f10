"""Heads with one sigmoid per class.

C columns: score_c = sigmoid(z_c), background 0. C + 1 columns: score_c = sigmoid(z_c) (1 - sigmoid(z_bg)).
"""

from typing import Any

import torch
from torch import Tensor

from calib.heads.base import Folded, LogitHead, not_foldable
from calib.heads.linear import ClassifierHead, LinearClassifier
from calib.losses.sigmoid import eql_v2_scores

# -log(999): every score starts at 0.001, so that the many negatives do not swamp the first steps.
PRIOR_BIAS = -6.906754778648554


class SigmoidHead(ClassifierHead, LogitHead):
    """``has_background``: the last column of the classifier is the background's."""

    kind = "sigmoid"

    classifier: LinearClassifier

    def __init__(
        self, classifier: LinearClassifier, *, has_background: bool = False, detector_logits: bool = False
    ) -> None:
        super().__init__(classifier, detector_logits=detector_logits, extra=int(has_background))
        self.has_background = has_background

    def config(self) -> dict[str, Any]:
        """As ``ClassifierHead.config``, and whether there is a background column."""
        return super().config() | {"has_background": self.has_background}

    @property
    def distribution(self) -> str:
        """Products of two sigmoids are neither."""
        return "" if self.has_background else "sigmoid"

    def folded(self) -> Folded:
        """The classifier of C columns."""
        if self.has_background:
            raise not_foldable("scores are products of two sigmoids, of the class and of the background")
        return self.classifier.folded()._replace(activation="sigmoid")

    def activate(self, raw: Tensor) -> Tensor:
        """[N, C] or [N, C+1] -> [N, C+1]."""
        if self.has_background:
            return eql_v2_scores(raw)
        return torch.cat([raw.sigmoid(), torch.zeros_like(raw[:, :1])], dim=1)


def fresh_sigmoid(outputs: int, feature_size: int, seed: int) -> LinearClassifier:
    """Weights N(0, 0.01), biases -log(999)."""
    weight = torch.randn(outputs, feature_size, generator=torch.Generator().manual_seed(seed)) * 0.01
    return LinearClassifier(weight, torch.full((outputs,), PRIOR_BIAS))
