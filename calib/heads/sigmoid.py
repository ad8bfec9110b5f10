"""Heads with one sigmoid per class.

C columns: score_c = sigmoid(z_c), background 0. C + 1 columns: score_c = sigmoid(z_c) (1 - sigmoid(z_bg)).
"""

from typing import Any, Self

import torch
from torch import Tensor

from calib.heads.base import Folded, LogitHead, not_foldable
from calib.heads.linear import LinearClassifier
from calib.losses.sigmoid import eql_v2_scores

# -log(999): every score starts at 0.001, so that the many negatives do not swamp the first steps.
PRIOR_BIAS = -6.906754778648554


class SigmoidHead(LogitHead):
    """``has_background``: the last column of the classifier is the background's."""

    kind = "sigmoid"

    def __init__(
        self, classifier: LinearClassifier, *, has_background: bool = False, detector_logits: bool = False
    ) -> None:
        super().__init__()
        self.classifier, self.has_background = classifier, has_background
        self.detector_logits = detector_logits
        outputs, self.feature_size = classifier.weight.shape
        self.num_classes = outputs - has_background

    def config(self) -> dict[str, Any]:
        """Shape, whether there is a background column, and whether the classifier is the detector's own."""
        flags = {"has_background": self.has_background, "detector_logits": self.detector_logits}
        return {"classifier": self.classifier.config(), **flags}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        flags = {k: bool(config[k]) for k in ("has_background", "detector_logits")}
        return cls(LinearClassifier.build(config["classifier"]), **flags)

    def folded(self) -> Folded:
        """The classifier of C columns."""
        if self.has_background:
            raise not_foldable("scores are products of two sigmoids, of the class and of the background")
        return self.classifier.folded()._replace(activation="sigmoid")

    def raw(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C] or [N, C+1] logits."""
        z: Tensor = logits if logits is not None and self.detector_logits else self.classifier(features)
        return z

    def activate(self, raw: Tensor) -> Tensor:
        """[N, C] or [N, C+1] -> [N, C+1]."""
        if self.has_background:
            return eql_v2_scores(raw)
        return torch.cat([raw.sigmoid(), torch.zeros_like(raw[:, :1])], dim=1)


def fresh_sigmoid(outputs: int, feature_size: int, seed: int) -> LinearClassifier:
    """Weights N(0, 0.01), biases -log(999)."""
    weight = torch.randn(outputs, feature_size, generator=torch.Generator().manual_seed(seed)) * 0.01
    return LinearClassifier(weight, torch.full((outputs,), PRIOR_BIAS))
