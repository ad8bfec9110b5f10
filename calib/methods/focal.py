"""Focal loss on the classifier.

Paper: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017.
Eq. 4 (softmax form): -(1 - p_y)^gamma log p_y, background an ordinary class, mean over rows.
Eq. 5 (sigmoid form): sum over the C + 1 columns of alpha_t (1 - p_t)^gamma BCE, divided by C + 1, mean over rows: the
baseline of Li et al., Balanced Group Softmax, CVPR 2020, whose scores stay a softmax.
Differs: the focusing strength of the softmax form is not given in the papers that use it as a baseline; 2 here.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from calib.cache import Cache
from calib.heads.base import Head
from calib.losses.margin import focal_values
from calib.losses.sigmoid import sigmoid_focal_values
from calib.settings import ImageBatches, Loop, at_least, one_of
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Trainings
from calib.training.retrain import retrain


@dataclass(frozen=True)
class Focal:
    """``gamma`` 0 with ``form`` softmax is ``natural``; ``alpha`` belongs to the sigmoid form."""

    gamma: float = 2.0
    form: str = "softmax"
    alpha: float = 0.25
    start: str = "detector"
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "gamma": {"range": [0.0, 3.0]},
        "lr": {"log": [0.02, 2.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "gamma", "alpha")
        one_of(self, "form", ("softmax", "sigmoid"))
        one_of(self, "start", ("detector", "linear"))

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train the linear head."""

        def loss(z: Tensor, batch: Batch) -> Tensor:
            if self.form == "softmax":
                values = focal_values(z, batch.labels, self.gamma)
            else:
                values = sigmoid_focal_values(z, batch.labels, self.gamma, self.alpha) / z.shape[1]
            return batch.chunk_mean(values)

        return retrain(cache, context, loss, start=self.start, images=self.images, loop=self.loop, label="focal")
