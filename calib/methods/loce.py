"""LOCE, second stage: margins follow the mean score of every class, and a memory feeds those that score low.

Paper: Feng et al., Exploring Classification Equilibrium in Long-Tailed Object Detection, ICCV 2021.
m_c: running mean of the true class's score, an object's proposals counting once; 0.01 at the start; background 0.01.
Eq. (loss): -log(m_y e^{z_y} / sum_k m_k e^{z_k}), m after this step's scores.
Eq. (mean scores): m_c <- a m_c + (1 - a) mean over the class's objects in the step, a = ``momentum``^objects.
Eq. (memory): every chunk gains ``draw_classes`` classes, drawn with probability 1 / m_c, and ``draw_features``
features of each from the memory of its class. Scores: softmax(z).
Differs: the authors (fcjian/LOCE 0a0194d) keep the latest ``memory`` RoI maps of jittered ground truth per class,
filled by a pass over the data before training; features that are frozen need no refreshing, so the memory is
``memory`` rows of the class in the cache, proposals among them. Their second stage trains the RPN and the boxes too.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.base import Head
from calib.heads.linear import LinearHead
from calib.losses.equilibrium import drawing_probability, equilibrium_values, updated_scores
from calib.sampling.instance import InstanceSampler
from calib.sampling.weighted import classes_per_chunk
from calib.settings import ImageBatches, Loop, at_least, one_of
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings
from calib.training.memory import FeatureMemory
from calib.training.retrain import classifier_from


def _images() -> ImageBatches:
    return ImageBatches(sampling="repeat-factor")


def _loop() -> Loop:
    # 6 epochs of some 6,250 steps of 16 images on LVIS v1, x0.1 after epochs 3 and 5.
    return Loop(steps=37_500, lr=0.02, milestones=(3 / 6, 5 / 6), warmup_steps=500)


@dataclass(frozen=True)
class LOCE:
    """``momentum``: of a mean score per object; ``first_score``: of every class at the start; ``background_score``: the
    background's, fixed; ``memory``: rows per class; ``draw_classes`` 0: none is drawn."""

    momentum: float = 0.9
    first_score: float = 0.01
    background_score: float = 0.01
    memory: int = 80
    draw_classes: int = 8
    draw_features: int = 4
    start: str = "detector"
    images: ImageBatches = field(default_factory=_images)
    loop: Loop = field(default_factory=_loop)

    space: ClassVar[dict[str, Any]] = {
        "background_score": {"log": [0.001, 0.3]},
        "draw_classes": {"choice": [8, 0]},
        "lr": {"log": [0.02, 2.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
        "repeat_threshold": {"choice": [0.001, 0.02, 0.05]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "momentum", "first_score", "background_score", "draw_classes")
        at_least(self, 1, "memory", "draw_features")
        one_of(self, "start", ("detector", "linear", "cosine", "normed"))
        if self.momentum > 1:
            raise SettingError(f"momentum is {self.momentum}: expected a number in [0, 1]")
        if not (0 < self.first_score <= 1 and 0 < self.background_score <= 1):
            raise SettingError("first_score and background_score are scores: expected numbers in (0, 1]")

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train the layer on."""
        c = len(cache.categories)
        head = LinearHead(classifier_from(cache, context, self.start, c + 1))
        scores = MeanScores(c, self.momentum, self.first_score, self.background_score)
        memory = FeatureMemory(cache, self.memory, context.seed, context.device)
        of_row = cache.meta("gt_id")[0]

        def objective(batch: Batch) -> Tensor:
            more = self._extended(batch, memory, scores.mean)
            z = head.logits(more.features)
            scores.observe(z, more, of_row)
            return more.chunk_mean(equilibrium_values(z, more.labels, scores.mean))

        model = nn.ModuleDict({"head": head, "scores": scores})
        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(model, objective, sampler, cache, self.loop, context, label="loce")
        return head

    def _extended(self, batch: Batch, memory: FeatureMemory, mean_score: Tensor) -> Batch:
        """The batch and what every chunk draws from the memory; a class without rows gives none."""
        if self.draw_classes == 0:
            return batch
        probability = drawing_probability(mean_score)
        drawn = classes_per_chunk(probability, self.draw_classes, batch.n_chunks, batch.generator)
        chunk = torch.arange(batch.n_chunks).repeat_interleave(self.draw_classes)
        labels, has_rows = drawn.flatten(), memory.count[drawn.flatten()] > 0
        labels, chunk = (t[has_rows].repeat_interleave(self.draw_features) for t in (labels, chunk))
        device = batch.all_labels.device
        features = memory.draw(labels, batch.generator, batch.world)
        return batch.extended(features, labels.to(device), chunk.to(device))


class MeanScores(nn.Module):
    """``mean`` [C+1]: the running mean score of every class; the background's stays."""

    mean: Tensor

    def __init__(self, num_classes: int, momentum: float, first: float, background: float) -> None:
        super().__init__()
        self._momentum = momentum
        self.register_buffer("mean", torch.cat([torch.full((num_classes,), first), torch.tensor([background])]))

    @torch.no_grad()
    def observe(self, logits: Tensor, batch: Batch, of_row: NDArray[np.int64]) -> None:
        """[n, C+1] logits of ``batch``; ``of_row``: the object of every row of the cache, -1 for none. Rows that were
        added count once per class and chunk."""
        entry, label = entries_of(batch, of_row, len(self.mean) - 1)
        own, count = batch.own(entry), torch.bincount(entry[entry >= 0], minlength=len(label))
        scored = own >= 0
        p = logits.softmax(dim=1).gather(1, batch.labels[:, None])[:, 0]
        total = p.new_zeros(len(label)).index_add(0, own[scored], p[scored])
        batch.world.all_reduce([total])
        foreground = updated_scores(self.mean, total / count.clamp_min(1), label, self._momentum)
        self.mean = torch.cat([foreground[:-1], self.mean[-1:]])


def entries_of(batch: Batch, of_row: NDArray[np.int64], background: int) -> tuple[Tensor, Tensor]:
    """[N] entry of every row, -1 for none, and [E] the class of every entry: the objects that the sampler's rows belong
    to, and the classes of every chunk among the rows that were added."""
    first = len(batch.all_labels) - sum(batch.added)
    labels, chunk = batch.all_labels.cpu().numpy(), batch.all_chunk.cpu().numpy()
    key = np.full(len(labels), -1, np.int64)
    known = (of_row[batch.rows] >= 0) & (labels[:first] < background)
    key[:first] = np.where(known, 2 * of_row[batch.rows], -1)
    key[first:] = 2 * (chunk[first:] * background + labels[first:]) + 1  # odd, objects are even
    known = key >= 0
    _, at, entry = np.unique(key[known], return_index=True, return_inverse=True)
    entries = np.full(len(labels), -1, np.int64)
    entries[known] = entry
    device = batch.all_labels.device
    return torch.from_numpy(entries).to(device), torch.from_numpy(labels[known][at]).to(device)
