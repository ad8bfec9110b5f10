"""NorCal: normalised calibration by training image counts.

Paper: Pan et al., On Model Calibration for Long-Tailed Object Detection and Instance Segmentation, NeurIPS 2021.

Eq. 5 (scores): p_c = a_c e^{z_c} / (e^{z_bg} + sum_k a_k e^{z_k}), a_c = n_c^-gamma with n_c = ``image_count``; the
background has factor 1. In log space: softmax(z - gamma log n).
Differs: the authors' code (tydpan/NorCal 23e5ab6) exponentiates without subtracting the maximum and overflows at
logits of 89; its other switches are ``applies_to`` probs (the same where rows are renormalised) and logits
(z_c a_c), ``by`` effective number (a_c = (1 - gamma) / (1 - gamma^n_c)), and no renormalisation, which for exps would
leave unbounded numbers and is refused. Its default gamma is 0 (no change); 0.6 is ours. A class without images counts
as one image.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.affine import AffineHead
from calib.heads.base import Head
from calib.settings import at_least, one_of
from calib.training.bases import affine_head
from calib.training.context import FitContext


@dataclass(frozen=True)
class NorCal:
    """``gamma``: strength; 0 is the detector."""

    gamma: float = 0.6
    by: str = "power"
    applies_to: str = "exps"
    renormalise: bool = True

    space: ClassVar[dict[str, Any]] = {
        "gamma": {"range": [0.0, 1.5]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "gamma")
        one_of(self, "by", ("power", "effective"))
        one_of(self, "applies_to", ("exps", "probs", "logits"))
        if self.by == "effective" and not 0 <= self.gamma < 1:
            raise SettingError(f"gamma is {self.gamma}: expected below 1 with by=effective")
        if self.applies_to == "exps" and not self.renormalise:
            raise SettingError("exps without renormalisation are no scores", hint="--set applies_to=probs")

    def fit(self, cache: Cache, context: FitContext) -> Head:
        """Divide by training image counts; nothing is trained."""
        head = affine_head(cache, context, "all" if self.renormalise else "none")
        return self.apply(head, torch.from_numpy(cache.categories.image_count))

    def apply(self, head: AffineHead, image_count: Tensor) -> AffineHead:
        """Fill ``head`` for [C] image counts."""
        a = image_factors(image_count, self.gamma, self.by)
        if self.applies_to == "logits":
            return head.set(scale=a)
        return head.set(shift=a.log()) if self.renormalise else head.set(factor=a)  # Eq. 5


def image_factors(image_count: Tensor, gamma: float, by: str) -> Tensor:
    """[C] -> [C] a_c (Eq. 6)."""
    n = image_count.double().clamp_min(1)
    return n**-gamma if by == "power" else (1 - gamma) / (1 - gamma**n)
