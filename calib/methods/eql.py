"""EQL: foreground proposals put no negative pressure on tail classes.

Paper: Tan et al., Equalization Loss for Long-Tailed Object Recognition, CVPR 2020.
Eq. 3 (loss): L = (1/N) sum_k sum_j w_kj BCE(z_kj, t_kj), w_kj = 1 - E(k) T(f_j) (1 - t_kj); E: k is foreground, T: f_j
below ``tail_share``, f = share of training images with class j. Scores: sigmoid(z).
Differs: nothing; 1.77e-3 selects exactly rare and common classes of LVIS v0.5, 1.1e-3 those of v1 (default, with a few
frequent ones). Fresh C sigmoids, biases -log(999).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.base import Head
from calib.heads.sigmoid import SigmoidHead, fresh_sigmoid
from calib.losses.sigmoid import eql_values
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, at_least
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings


@dataclass(frozen=True)
class EQL:
    """``tail_share``: lambda, classes in fewer than this share of the training images are tail; 0: plain BCE."""

    tail_share: float = 1.1e-3
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "tail_share": {"log": [0.001, 0.1]},
        "lr": {"log": [0.1, 10.0]},
        "weight_decay": {"log": [1e-07, 0.0001]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "tail_share")
        if self.tail_share > 1:
            raise SettingError(f"tail_share is {self.tail_share}: expected a share of the images, in [0, 1]")

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train fresh sigmoids."""
        head = SigmoidHead(fresh_sigmoid(len(cache.categories), cache.manifest.detector.feature_size, context.seed))
        share = cache.categories.image_count / max(len(cache.images), 1)
        is_tail = torch.from_numpy(share < self.tail_share).to(context.device)

        def objective(batch: Batch) -> Tensor:
            values = eql_values(head.classifier(batch.features), batch.labels, is_tail)
            return batch.chunk_mean(values)

        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(head, objective, sampler, cache, self.loop, context, label="eql")
        return head
