"""tau-norm and its select rule.

Paper: Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020; the detection form
and the select rule: Li et al., Balanced Group Softmax, CVPR 2020, Sec. 5.

Eq. (tau-norm, Kang et al. Eq. 4): W'_c = W_c / |W_c|^tau, logits z = x W'^T.
Differs: in detection (FishYuLi/BalancedGroupSoftmax 90e04fd, tools/test_lvis_tnorm.py) the background row and all
biases stay as they are. A row of norm 0 stays 0 instead of becoming NaN.

Select: the text of the BAGS paper takes the normalised row of scores where the original arg-max is foreground
(``select="foreground"``); the released code also asks that the normalised arg-max be foreground and a class with
``instance_count`` below ``tail_below`` (``select="tail"``). The whole row is taken, background included.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from calib.cache import Cache
from calib.heads.base import FitRun, Head
from calib.heads.linear import LinearClassifier, LinearHead
from calib.heads.softmax import detector_head
from calib.settings import at_least, one_of


@dataclass(frozen=True)
class TauNorm:
    """``tau`` 0 is the detector, 1 gives every class a weight of norm 1 (the released code's default)."""

    tau: float = 1.0
    select: str = "none"
    tail_below: int = 100

    def __post_init__(self) -> None:
        at_least(self, 0, "tau", "tail_below")
        one_of(self, "select", ("none", "foreground", "tail"))

    def fit(self, cache: Cache, run: FitRun) -> Head:
        """Rescale the detector's weights; nothing is trained."""
        original = detector_head(cache)
        normalised = LinearHead(normalised_classifier(LinearClassifier.of(cache.classifier), self.tau))
        if self.select == "none":
            return normalised
        counts = torch.from_numpy(cache.categories.instance_count)
        eligible = counts < self.tail_below if self.select == "tail" else None
        return TauSelectHead(original, normalised, eligible)


def normalised_classifier(classifier: LinearClassifier, tau: float) -> LinearClassifier:
    """A copy with the foreground rows normalised; the background row (the last) and all biases stay."""
    copy = LinearClassifier(classifier.weight, classifier.bias, classifier.scale)
    with torch.no_grad():
        copy.weight[:-1] = tau_normalised(copy.weight[:-1], tau)
    return copy


def tau_normalised(weight: Tensor, tau: float) -> Tensor:
    """[C, D] -> [C, D]: w_c / |w_c|^tau; zero rows stay zero."""
    norm = weight.norm(dim=1, keepdim=True)
    scale: Tensor = norm.where(norm > 0, 1.0) ** tau
    return weight / scale  # Eq. 4


def select_rows(original: Tensor, normalised: Tensor, eligible: Tensor | None) -> Tensor:
    """Row-wise choice between two score matrices, both [N, C+1] with background last.

    A row is taken from ``normalised`` where the arg-max of ``original`` is foreground and, if ``eligible`` [C] is
    given, the arg-max of ``normalised`` is an eligible class.
    """
    background = original.shape[1] - 1
    take = original.argmax(dim=1) != background
    if eligible is not None:
        chosen = normalised.argmax(dim=1)
        mask = torch.cat([eligible, eligible.new_zeros(1)])
        take &= mask[chosen]
    return torch.where(take[:, None], normalised, original)


class TauSelectHead(Head):
    """Softmax scores of the detector, replaced row-wise by those of the normalised classifier (``select_rows``)."""

    kind = "tau-select"

    eligible: Tensor | None

    def __init__(self, original: LinearHead, normalised: LinearHead, eligible: Tensor | None) -> None:
        super().__init__()
        self.original, self.normalised = original, normalised
        self.register_buffer("eligible", eligible)
        self.num_classes, self.feature_size = original.num_classes, original.feature_size

    def config(self) -> dict[str, Any]:
        """Both heads, and whether a class mask exists."""
        heads = {"original": self.original.config(), "normalised": self.normalised.config()}
        return {**heads, "masked": self.eligible is not None}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        original, normalised = LinearHead.build(config["original"]), LinearHead.build(config["normalised"])
        eligible = torch.zeros(original.num_classes, dtype=torch.bool) if config["masked"] else None
        return cls(original, normalised, eligible)

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1] probabilities."""
        original = self.original.full_scores(features, logits)
        return select_rows(original, self.normalised.full_scores(features), self.eligible)
