"""SimCal: a second head trained on bi-level balanced proposals, used for the tail classes only.

Paper: Wang et al., The Devil is in Classification: A Simple Framework for Long-tail Instance Segmentation, ECCV 2020.

Eq. 1 (loss): L = (1 / (N_fg + N_bg)) sum_i -log softmax(z_cal(x_i))_{y_i}, mean cross entropy over the composed batch.
Eq. 2 (dual head): score_c = softmax(z_cal)_c where instance_count_c <= T, else softmax(z_orig)_c; background from the
original head; no renormalisation.
Differs: T is 300 with "<=" (paper); the last commit of twangnh/SimCal (e5f3076) has "< 100", but its log corresponds to
300. The paper's heads are trained on RoI maps (``form`` 2fc_rand, 3fc_rand, 3fc_ft; caches with --roi-maps); on cached
features the last layer (``linear``, from the detector's weights) or a small MLP (``mlp``) is trained.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.cache import Cache
from calib.cache.index import ClassIndex
from calib.errors import UnsupportedError
from calib.heads.base import Head
from calib.heads.box_head import BoxHead, input_rows, require_maps
from calib.heads.combine import AverageHead, DualHead
from calib.heads.linear import LinearHead
from calib.heads.mlp import MLPHead
from calib.losses.softmax import cross_entropy
from calib.sampling.bilevel import BilevelSampler
from calib.settings import Loop, at_least, one_of
from calib.training.bases import base_layer, head_below, refuse_base
from calib.training.batch import Objective
from calib.training.context import FitContext
from calib.training.fused_softmax import mean_over_rows
from calib.training.loop import Training, Trainings

# On RoI maps, as in the paper: two or three fresh layers, or the detector's three.
MAP_FORMS = ("2fc_rand", "3fc_rand", "3fc_ft")


def _loop() -> Loop:
    # Authors' code: plain SGD, no momentum, no decay; x0.1 after 7,000 and 10,000 steps of 12,000.
    return Loop(steps=12_000, lr=0.01, momentum=0.0, weight_decay=0.0, milestones=(7 / 12, 10 / 12), warmup_steps=0)


@dataclass(frozen=True)
class SimCal:
    """``threshold`` T: classes with at most T training instances take the calibrated scores (COCO-LT: 400).

    ``inference`` average takes the mean of both heads for every class instead (the paper's Table 5 compares them).
    """

    threshold: int = 300
    form: str = "linear"
    hidden: int = 1024
    inference: str = "select"
    classes_per_step: int = 16
    loop: Loop = field(default_factory=_loop)

    space: ClassVar[dict[str, Any]] = {
        "set": {"momentum": 0.9},
        "form": {"choice": ["linear", "mlp"]},
        "hidden": {"choice": [256, 1024]},
        "threshold": {"choice": [30, 100, 300, 1000]},
        "lr": {"log": [0.005, 0.5]},
        "weight_decay": {"log": [1e-05, 0.01]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "threshold")
        at_least(self, 1, "hidden", "classes_per_step")
        one_of(self, "form", ("linear", "mlp", *MAP_FORMS))
        one_of(self, "inference", ("select", "average"))

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train the calibrated head, compose it with the detector's own or the base."""
        calibrated = self._start(cache, context)
        index, max_iou = ClassIndex.build(cache), cache.meta("max_iou")[0]
        sampler = BilevelSampler(index, max_iou, classes_per_step=self.classes_per_step, seed=context.seed)
        objective, rows = _objective(calibrated), input_rows(cache, calibrated)
        yield Training(calibrated, objective, sampler, cache, self.loop, context, label="simcal", rows=rows)
        original = head_below(cache, context)
        original = BoxHead.of(cache, original) if self.form in MAP_FORMS else original
        if self.inference == "average":
            return AverageHead(calibrated, original)
        return DualHead(calibrated, original, is_tail(cache.categories.instance_count, self.threshold))

    def _start(self, cache: Cache, context: FitContext) -> LinearHead | MLPHead:
        if self.form == "linear":
            return LinearHead(base_layer(cache, context))
        if self.form == "3fc_ft":
            refuse_base(context, "form=3fc_ft goes on from the detector's three layers")
            return _from_detector(cache)
        size, inputs = cache.manifest.detector.feature_size, "features"
        if self.form in MAP_FORMS:
            size, inputs = require_maps(cache).shape[1], "maps"
        hidden = [self.hidden] * (2 if self.form == "3fc_rand" else 1)
        head = MLPHead([size, *hidden, len(cache.categories) + 1], inputs)
        head.reset(torch.Generator().manual_seed(context.seed))
        return head


def _objective(calibrated: LinearHead | MLPHead) -> Objective:
    """Eq. 1."""
    if isinstance(calibrated, LinearHead):
        return mean_over_rows(calibrated.classifier)
    return lambda batch: batch.row_mean(cross_entropy(calibrated.logits(batch.features), batch.labels))  # Eq. 1


def _from_detector(cache: Cache) -> MLPHead:
    """The detector's own three layers on RoI maps, all to be trained."""
    size, c = require_maps(cache).shape[1], cache.classifier
    assert c.fc1_bias is not None and c.fc2_bias is not None
    if c.bias is None:
        raise UnsupportedError(f"3fc_ft goes on from a linear classifier; cache {cache.path} has a cosine one")
    head = MLPHead([size, len(c.fc1_bias), len(c.fc2_bias), len(c.bias)], "maps")
    tensors = (c.fc1_weight, c.fc1_bias, c.fc2_weight, c.fc2_bias, c.weight, c.bias)
    with torch.no_grad():
        for parameter, tensor in zip(head.parameters(), tensors, strict=True):
            parameter.copy_(torch.as_tensor(tensor))
    return head


def is_tail(instance_count: object, threshold: int) -> Tensor:
    """[C] whether a class has at most ``threshold`` training instances."""
    return torch.as_tensor(instance_count) <= threshold  # Eq. 2
