"""BACL: pairwise margins from a confusion matrix, and hallucinated features of classes that are confused.

Paper: Qi et al., Balanced Classification: A Unified Framework for Long-Tailed Object Detection, arXiv 2308.02213.
M: mean softmax over the foreground logits of the rows of every true class, over all steps so far.
Eq. (loss): (1/N) sum_k sum_j w_kj BCE(z_kj + alpha log(M_yj / M_jy), t_kj), C + 1 sigmoids; on foreground rows w is 1
for the background and for classes that score at least as high as the true one or ``threshold``, else 0.
Eq. (features): every chunk gains ``draw_classes`` classes, drawn with probability 1 - M_cc, and ``draw_features``
features of each: mean + deviation times normal numbers, both running with the rate ``rate``.
Eq. (scores): sigmoid(z_c) (1 - sigmoid(z_bg)).
Differs: their second stage (Tianhao-Qi/BACL 6553662) goes on from a layer that plain binary cross entropy has trained
as long; here that is the part before ``begin`` of the steps. Means and deviations are those of foreground rows; theirs
of ground truth boxes that are jittered 16 times.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.base import Head
from calib.heads.sigmoid import SigmoidHead, fresh_sigmoid
from calib.losses.confusion import class_sums
from calib.losses.pairwise import error_probability, pairwise_values
from calib.losses.sigmoid import one_hot, weighted_bce
from calib.parallel.distributed import ALONE, World
from calib.sampling.instance import InstanceSampler
from calib.sampling.weighted import classes_per_chunk
from calib.settings import ImageBatches, Loop, at_least
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.gaussians import RunningGaussians
from calib.training.loop import Training, Trainings


@dataclass(frozen=True)
class BACL:
    """``alpha``: strength of the margins; ``threshold``: score from which a class always counts; ``begin``: share of
    the steps before, of plain binary cross entropy; ``draw_classes`` 0: no feature is hallucinated."""

    alpha: float = 0.85
    threshold: float = 0.7
    begin: float = 0.5
    draw_classes: int = 8
    draw_features: int = 12
    rate: float = 0.1
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "alpha": {"range": [0.0, 1.5]},
        "begin": {"choice": [0.0, 0.5]},
        "draw_classes": {"choice": [8, 0]},
        "lr": {"log": [0.05, 5.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "alpha", "threshold", "begin", "draw_classes", "rate")
        at_least(self, 1, "draw_features")
        if max(self.begin, self.rate) > 1:
            raise SettingError("begin and rate are shares: expected numbers in [0, 1]")

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train fresh sigmoids, one of them for the background."""
        c, d = len(cache.categories), cache.manifest.detector.feature_size
        head = SigmoidHead(fresh_sigmoid(c + 1, d, context.seed), has_background=True)
        confusion, gaussians = Confusion(c, self.alpha, self.threshold), RunningGaussians(c, d, self.rate)

        def objective(batch: Batch) -> Tensor:
            if batch.step < self.begin * self.loop.steps:
                z = head.classifier(batch.features)
                return batch.chunk_mean(weighted_bce(z, one_hot(batch.labels, c + 1), torch.ones_like(z)))
            more = self._extended(batch, gaussians, confusion.mean)
            return more.chunk_mean(confusion.values(head.classifier(more.features), more.labels, batch.world))

        model = nn.ModuleDict({"head": head, "confusion": confusion, "gaussians": gaussians})
        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(model, objective, sampler, cache, self.loop, context, label="bacl")
        return head

    def _extended(self, batch: Batch, gaussians: RunningGaussians, matrix: Tensor) -> Batch:
        """The batch and what every chunk hallucinates; a class that was not seen gives nothing."""
        if self.draw_classes == 0:
            return batch
        gaussians.update(batch.features, batch.labels, batch.all_labels, batch.world)
        drawn = classes_per_chunk(error_probability(matrix), self.draw_classes, batch.n_chunks, batch.generator)
        chunk = torch.arange(batch.n_chunks).repeat_interleave(self.draw_classes)
        labels, seen = drawn.flatten(), gaussians.seen.cpu()[drawn.flatten()]
        labels, chunk = (t[seen].repeat_interleave(self.draw_features) for t in (labels, chunk))
        device = batch.all_labels.device
        features = gaussians.draw(labels, batch.generator, batch.world)
        return batch.extended(features, labels.to(device), chunk.to(device))


class Confusion(nn.Module):
    """``total`` [C, C] softmax over the foreground, summed over the rows of every true class; ``count`` [C] rows."""

    total: Tensor
    count: Tensor

    def __init__(self, num_classes: int, alpha: float, threshold: float) -> None:
        super().__init__()
        self._alpha, self._threshold = alpha, threshold
        self.register_buffer("total", torch.zeros(num_classes, num_classes))
        self.register_buffer("count", torch.zeros(num_classes))

    @property
    def mean(self) -> Tensor:
        """[C, C]; rows of classes without a row are 0."""
        return self.total / self.count.clamp_min(1)[:, None]

    def values(self, logits: Tensor, labels: Tensor, world: World = ALONE) -> Tensor:
        """[n, C+1], [n] -> [n] losses; then the rows of all processes are added."""
        values = pairwise_values(logits, labels, self.mean, self._alpha, self._threshold)
        foreground = labels < len(self.count)
        total, count = class_sums(logits.detach()[foreground, :-1].softmax(dim=1), labels[foreground])
        world.all_reduce([total, count])
        self.total, self.count = self.total + total, self.count + count
        return values
