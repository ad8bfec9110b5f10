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
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import UnsupportedError
from calib.heads.base import Head
from calib.heads.combine import SelectHead
from calib.heads.linear import LinearClassifier, LinearHead
from calib.heads.sigmoid import SigmoidHead
from calib.settings import at_least, one_of
from calib.training.bases import activation_of, base_layer, head_below
from calib.training.context import FitContext


@dataclass(frozen=True)
class TauNorm:
    """``tau`` 0 is the detector, 1 gives every class a weight of norm 1 (the released code's default).

    ``form`` original divides the background's row too and drops the bias.
    """

    tau: float = 1.0
    form: str = "detection"
    select: str = "none"
    tail_below: int = 100

    space: ClassVar[dict[str, Any]] = {
        "tau": {"range": [0.0, 1.5]},
        "select": {"choice": ["none", "foreground", "tail"]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "tau", "tail_below")
        one_of(self, "form", ("detection", "original"))
        one_of(self, "select", ("none", "foreground", "tail"))

    def fit(self, cache: Cache, context: FitContext) -> Head:
        """Rescale the weights of the detector or the base; nothing is trained."""
        is_sigmoid = activation_of(cache, context) == "sigmoid"
        every_row = is_sigmoid or self.form == "original"
        classifier = normalised_classifier(base_layer(cache, context), self.tau, every_row=every_row)
        if self.form == "original":
            classifier.bias = None
        if is_sigmoid:
            if self.select != "none":
                raise UnsupportedError("select compares with background, which a sigmoid detector has no column for")
            return SigmoidHead(classifier)
        normalised = LinearHead(classifier)
        if self.select == "none":
            return normalised
        counts = torch.from_numpy(cache.categories.instance_count)
        eligible = counts < self.tail_below if self.select == "tail" else None
        return SelectHead(head_below(cache, context), normalised, eligible)


def normalised_classifier(classifier: LinearClassifier, tau: float, *, every_row: bool = False) -> LinearClassifier:
    """A copy with the foreground rows normalised; biases stay, and the last row, background's, unless ``every_row``."""
    copy = LinearClassifier(classifier.weight, classifier.bias, classifier.scale, classifier.form)
    rows = slice(None) if every_row else slice(-1)
    with torch.no_grad():
        copy.weight[rows] = tau_normalised(copy.weight[rows], tau)
    return copy


def tau_normalised(weight: Tensor, tau: float) -> Tensor:
    """[C, D] -> [C, D]: w_c / |w_c|^tau; zero rows stay zero."""
    norm = weight.norm(dim=1, keepdim=True)
    scale: Tensor = norm.where(norm > 0, 1.0) ** tau
    return weight / scale  # Eq. 4
