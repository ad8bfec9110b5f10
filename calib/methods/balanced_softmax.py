"""Balanced softmax: the class prior enters the loss and is left out of the scores.

Paper: Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020.
Eq. 3 (softmax form): CE(z + log n_c); scores = softmax(z).
Eq. (sigmoid form, the authors' detector): C sigmoids; foreground rows see z_j - log((1 - f_j) / f_j), f_j the share of
training images with class j, background rows plain z; (1/N) sum BCE; scores = sigmoid(z).
Differs: the paper's softmax has no background; here it has no prior (``background=zero``, better in the demo), or that
of its rows in the cache (``count``). A class without samples counts as one.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from calib.cache import Cache
from calib.heads.base import Head
from calib.heads.sigmoid import SigmoidHead, fresh_sigmoid
from calib.losses.margin import log_prior, shifted_values
from calib.losses.sigmoid import balanced_sigmoid_values
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, one_of
from calib.training.bases import refuse_base
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings
from calib.training.retrain import retrain


@dataclass(frozen=True)
class BalancedSoftmax:
    """``form`` softmax goes on from the detector's linear head; sigmoid trains a fresh one."""

    form: str = "softmax"
    background: str = "zero"
    start: str = "detector"
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "background": {"choice": ["zero", "count"]},
        "lr": {"log": [0.02, 2.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
    }

    def __post_init__(self) -> None:
        one_of(self, "form", ("softmax", "sigmoid"))
        one_of(self, "background", ("count", "zero"))
        one_of(self, "start", ("detector", "linear"))

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train with the prior."""
        return self._softmax(cache, context) if self.form == "softmax" else self._sigmoid(cache, context)

    def _softmax(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        shift = self.prior(cache).to(context.device)

        def loss(z: Tensor, batch: Batch) -> Tensor:
            return batch.chunk_mean(shifted_values(z, batch.labels, shift))

        return retrain(
            cache, context, loss, start=self.start, images=self.images, loop=self.loop, label="balanced-softmax"
        )

    def prior(self, cache: Cache) -> Tensor:
        """[C+1] log prior."""
        counts = torch.from_numpy(cache.categories.instance_count)
        if self.background == "zero":
            return torch.cat([log_prior(counts), torch.zeros(1)])
        foreground = int(np.sum((cache.labels >= 0) & (cache.labels < cache.background)))
        background = int(np.sum(cache.labels == cache.background)) / max(foreground, 1) * int(counts.sum())
        return torch.cat([log_prior(counts), log_prior(torch.tensor([background]))])

    def _sigmoid(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        refuse_base(context, "form=sigmoid draws a fresh layer")
        head = SigmoidHead(fresh_sigmoid(len(cache.categories), cache.manifest.detector.feature_size, context.seed))
        images = max(len(cache.images), 1)
        share = torch.from_numpy(cache.categories.image_count / images).clamp(1 / (2 * images), 1 - 1 / (2 * images))
        share = share.float().to(context.device)

        def objective(batch: Batch) -> Tensor:
            values = balanced_sigmoid_values(head.classifier(batch.features), batch.labels, share)
            return batch.chunk_mean(values)

        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(head, objective, sampler, cache, self.loop, context, label="balanced-softmax")
        return head
