"""ECM: binary margins between a class and all others, from counts, out of a bound on average precision.

Paper: Cho and Krahenbuhl, Long-tail Detection with Effective Class-Margins, ECCV 2022.
Eq. (margins): with n_c images of positives and m_c = sum n - n_c of negatives, a positive's logit is moved by
-log(m_c^1/4 / (n_c^1/4 + m_c^1/4)), a negative's by -log(n_c^1/4 / (n_c^1/4 + m_c^1/4)).
Eq. (loss): (1/N) sum_k sum_j w_j BCE(2 z_kj + (log n_j - log m_j) / 4, t_kj) over C + 1 columns, the pair of moved
exponentials in one; w = a log((1 + a) / a), a = m / n.
Eq. (scores): sigmoid(z_c) (1 - sigmoid(z_bg)).
Differs: the background's count is ``background_ratio`` times all others, 6.3313 as the authors measured it on Mask
R-CNN (janghyuncho/ECM-Loss a637240); none takes the ratio of rows in the cache. ``power`` is their 1/4, ``weighted``
their w. A class without images counts as one image.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from calib.cache import Cache
from calib.heads.base import Head
from calib.heads.linear import LinearClassifier
from calib.heads.sigmoid import SigmoidHead
from calib.losses.sigmoid import ecm_shift, ecm_weights, one_hot, weighted_bce
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, at_least
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings


def _images() -> ImageBatches:
    return ImageBatches(sampling="repeat-factor")


def _loop() -> Loop:
    # Their 1x schedule: 12 epochs of some 6,250 steps of 16 images on LVIS v1.
    return Loop(
        steps=75_000, lr=0.02, milestones=(8 / 12, 11 / 12), warmup_steps=10_000, warmup_factor=1e-4, clip_norm=5.0
    )


@dataclass(frozen=True)
class ECM:
    """``power``: of the counts in the margins; ``tau``: scale of the normalised layer; 0 switches either off."""

    power: float = 0.25
    weighted: bool = True
    background_ratio: float | None = 6.3313
    tau: float = 20.0
    images: ImageBatches = field(default_factory=_images)
    loop: Loop = field(default_factory=_loop)

    space: ClassVar[dict[str, Any]] = {
        "power": {"range": [0.0, 0.5]},
        "background_ratio": {"choice": [6.3313, None]},
        "lr": {"log": [0.01, 1.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
        "repeat_threshold": {"choice": [0.001, 0.02, 0.05]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "power", "tau")
        if self.background_ratio is not None:
            at_least(self, 0, "background_ratio")

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train fresh sigmoids, one of them for the background."""
        head = SigmoidHead(self._start(cache, context.seed), has_background=True)
        counts = self.counts(cache)
        shift = ecm_shift(counts, self.power).to(context.device)
        weights = (ecm_weights(counts) if self.weighted else torch.ones(len(counts))).to(context.device)

        def objective(batch: Batch) -> Tensor:
            z = head.classifier(batch.features)
            return batch.chunk_mean(weighted_bce(2 * z + shift, one_hot(batch.labels, len(shift)), weights))

        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(head, objective, sampler, cache, self.loop, context, label="ecm")
        return head

    def counts(self, cache: Cache) -> Tensor:
        """[C+1] images with every class, and the background's count."""
        n = torch.from_numpy(cache.categories.image_count).double().clamp_min(1)
        ratio = self.background_ratio
        if ratio is None:
            background = int(np.sum(cache.labels == cache.background))
            foreground = int(np.sum((cache.labels >= 0) & (cache.labels < cache.background)))
            ratio = background / max(foreground, 1)
        return torch.cat([n, (n.sum() * ratio).clamp_min(1)[None]])

    def _start(self, cache: Cache, seed: int) -> LinearClassifier:
        size, generator = cache.manifest.detector.feature_size, torch.Generator().manual_seed(seed)
        form = "normed" if self.tau else "linear"
        classifier = LinearClassifier.fresh(len(cache.categories) + 1, size, form, generator)
        if classifier.scale is not None:
            classifier.scale.data.fill_(self.tau)
        return classifier
