"""Loss re-weighting by class counts: inverse, effective number, clipped reference, power.

Papers: the baselines of Li et al., Balanced Group Softmax, CVPR 2020 (inverse, effective) and of Wang et al., SimCal,
ECCV 2020, Sec. 4.1 (reference); effective number: Cui et al., Class-Balanced Loss, CVPR 2019, Eq. 2; power: Zhang et
al., Distribution Alignment, CVPR 2021, Eq. 11. Counts are ``instance_count``.

Eq. (loss): L = (1/K) sum_k (1 / rows in chunk k) sum_i w_{y_i} CE_i, w_bg = 1 unless it is set.
Differs: the sum is divided by the number of rows, as detectors do, not by the sum of weights, as torch does.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.base import Head
from calib.losses.softmax import cross_entropy
from calib.losses.weights import clipped_class_weights, power_class_weights, reference_class_weights
from calib.settings import ImageBatches, Loop, at_least, one_of
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Trainings
from calib.training.retrain import retrain


@dataclass(frozen=True)
class Reweight:
    """``by``: the formula, with ``beta`` (effective), ``reference``, ``rho`` (power); clip ``low``, ``high``;
    ``w_bg``: weight of the background rows, beside the formula."""

    by: str = "inverse"
    beta: float = 0.999
    reference: float = 100.0
    rho: float = 1.0
    low: float = 0.1
    high: float = 5.0
    w_bg: float = 1.0
    start: str = "detector"
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "by": {"choice": ["inverse", "effective", "power"]},
        "w_bg": {"log": [0.25, 4.0]},
        "lr": {"log": [0.02, 2.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
    }

    def __post_init__(self) -> None:
        one_of(self, "by", ("inverse", "effective", "reference", "power"))
        at_least(self, 0, "beta", "reference", "rho", "low", "high", "w_bg")
        one_of(self, "start", ("detector", "linear"))
        if not self.beta < 1:
            raise SettingError(f"beta is {self.beta}: expected below 1")
        if self.low > self.high:
            raise SettingError(f"low is {self.low}, high is {self.high}: expected low <= high")

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train the linear head with weighted cross entropy."""
        weights = self.weights(torch.from_numpy(cache.categories.instance_count)).to(context.device)

        def loss(z: Tensor, batch: Batch) -> Tensor:
            return batch.chunk_mean(weights[batch.labels] * cross_entropy(z, batch.labels))

        return retrain(cache, context, loss, start=self.start, images=self.images, loop=self.loop, label="reweight")

    def weights(self, counts: Tensor) -> Tensor:
        """[C] -> [C+1], the background's last."""
        if self.by == "power":
            weights = power_class_weights(counts, self.rho)
        elif self.by == "reference":
            weights = reference_class_weights(counts, self.reference, self.low, self.high)
        else:
            beta = self.beta if self.by == "effective" else None
            weights = clipped_class_weights(counts, beta, self.low, self.high)
        weights[-1] = self.w_bg
        return weights
