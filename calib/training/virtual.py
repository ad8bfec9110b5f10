"""Virtual features: rows of rare classes that are drawn from Gaussians, beside the rows of any training.

Paper: Zang et al., FASA: Feature Augmentation and Sampling Adaptation for Long-Tailed Instance Segmentation, ICCV 2021.
Eq. (features): every chunk draws class c with probability p_c: mean + deviation times normal numbers, both running over
the foreground rows of the batches with the rate 0.1.
Eq. (loss): L of the batch + weight L of the virtual rows, whatever L is.
Eq. (start): p_c = scale (1 / n_c) / sum_k (1 / n_k), n_c = ``instance_count``, at most 1.
Eq. (adaptation): every so many steps p_c times 1.1 where the loss of c has fallen since the last time, 0.9 where it has
grown, at most 1. Nothing is drawn before the first time.
Differs: the authors (yuhangzang/FASA 01d08a7) adapt once an epoch, by losses on the evaluation split, and groups of
classes together, which affinity propagation finds. Here the loss is -log of the true class's score on the batches since
the last time, and every class stands alone: a cache has rows of all that train.

Letters: C classes, D feature size, M virtual rows.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from calib.cache import Cache
from calib.cache.rows import RowMatrix
from calib.errors import UnsupportedError
from calib.heads.base import Head
from calib.settings import Loop
from calib.training.batch import Batch
from calib.training.gaussians import RunningGaussians

RATE, UP, DOWN = 0.1, 1.1, 0.9


class VirtualFeatures(nn.Module):
    """What is drawn: Gaussians and ``probability`` [C], and losses [C] since the last adaptation and before it."""

    probability: Tensor
    loss: Tensor
    rows: Tensor
    before: Tensor

    def __init__(self, cache: Cache, loop: Loop, head: Head, features: RowMatrix) -> None:
        """
        Raises:
            UnsupportedError: the head works on RoI maps.
        """
        super().__init__()
        if head.inputs != "features":
            raise UnsupportedError(
                "virtual features are drawn for heads on features, not on RoI maps", hint="virtual=0"
            )
        c = len(cache.categories)
        self.gaussians = RunningGaussians(c, features.shape[1], RATE)
        self._every, self._head = loop.virtual_every, [head]  # a list: the head is no part of this module
        counts = torch.from_numpy(cache.categories.instance_count)
        self.register_buffer("probability", first_probability(counts, loop.virtual_scale))
        for name, start in (("loss", 0.0), ("rows", 0.0), ("before", -1.0)):
            self.register_buffer(name, torch.full((c,), start))

    @torch.no_grad()
    def beside(self, batch: Batch) -> Batch | None:
        """The virtual rows of a step, in the chunks of ``batch``; None where nothing is drawn."""
        self.gaussians.update(batch.features, batch.labels, batch.all_labels, batch.world)
        self._add_losses(batch)
        if batch.step and batch.step % self._every == 0:
            self._adapt()
        if batch.step < self._every:
            return None
        generator = torch.Generator().manual_seed(batch.generator.initial_seed() ^ 1)
        possible = (self.probability * self.gaussians.seen).cpu()
        chunk, labels = torch.nonzero(torch.rand(batch.n_chunks, len(possible), generator=generator) < possible).T
        if len(labels) == 0:
            return None
        features = self.gaussians.draw(labels, generator, batch.world)
        nothing = replace(
            batch,
            features=features[:0],
            all_labels=batch.all_labels[:0],
            all_chunk=batch.all_chunk[:0],
            rows=batch.rows[:0],
            generator=generator,
        )
        return nothing.extended(features, labels.to(features.device), chunk.to(features.device))

    def _add_losses(self, batch: Batch) -> None:
        own = batch.labels < len(self.rows)
        y = batch.labels[own]
        p = self._head[0].full_scores(batch.features[own]).gather(1, y[:, None])[:, 0]
        sums = torch.zeros(2, len(self.rows), device=y.device)
        sums.index_add_(1, y, torch.stack([-p.clamp_min(1e-12).log(), torch.ones_like(p)]))
        batch.world.all_reduce([sums])
        self.loss, self.rows = self.loss + sums[0], self.rows + sums[1]

    def _adapt(self) -> None:
        now = torch.where(self.rows > 0, self.loss / self.rows.clamp_min(1), self.before)
        before = torch.where(self.before < 0, now, self.before)
        self.probability = adapted(self.probability, before, now, torch.arange(len(now), device=now.device))
        self.before, self.loss, self.rows = now, torch.zeros_like(now), torch.zeros_like(now)


def first_probability(counts: Tensor, scale: float) -> Tensor:
    """[C] -> [C] scale (1 / n) / sum(1 / n), at most 1; a class without instances counts as one of them."""
    inverse = 1 / counts.double().clamp_min(1)
    return (scale * inverse / inverse.sum()).clamp_max(1).float()


def adapted(probability: Tensor, before: Tensor, now: Tensor, group: Tensor) -> Tensor:
    """[C], [C], [C] losses, [C] groups -> [C]: times UP where the group's loss has fallen, DOWN where it has grown."""
    change = (now - before).new_zeros(int(group.max()) + 1).index_add(0, group, now - before)[group]
    factor = torch.where(change < 0, UP, torch.where(change > 0, DOWN, 1.0))
    return (probability * factor).clamp_max(1)


def head_in(module: nn.Module) -> Head:
    """The head that a training trains.

    Raises:
        UnsupportedError: it trains something else.
    """
    found = module["head"] if isinstance(module, nn.ModuleDict) and "head" in module else module
    if not isinstance(found, Head):
        raise UnsupportedError("virtual features need a head that scores while it trains", hint="leave virtual at 0")
    return found
