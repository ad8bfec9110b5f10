"""A Gaussian with independent coordinates for every class, from running means and variances of features.

Letters: C classes, D feature size, n rows of this process, U classes present in a batch.
"""

import torch
from torch import Tensor, nn

from calib.parallel.distributed import World


class RunningGaussians(nn.Module):
    """``mean``, ``variance`` [C, D], ``seen`` [C]: of the batches so far; the first one of a class replaces nothing."""

    mean: Tensor
    variance: Tensor
    seen: Tensor

    def __init__(self, num_classes: int, feature_size: int, rate: float) -> None:
        super().__init__()
        self._rate = rate
        self.register_buffer("mean", torch.zeros(num_classes, feature_size))
        self.register_buffer("variance", torch.zeros(num_classes, feature_size))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, all_labels: Tensor, world: World) -> None:
        """[n, D], [n], and [N] labels of all processes: classes of the batch take ``rate`` of its mean and unbiased
        variance; of a single row that is 0."""
        own = labels < len(self.seen)
        present, count = torch.unique(all_labels[all_labels < len(self.seen)], return_counts=True)
        x, at = features[own], torch.searchsorted(present, labels[own])
        n = count[:, None].to(x)
        mean = self._sums(x, at, len(present), world) / n
        variance = self._sums((x - mean[at]).square(), at, len(present), world) / (n - 1).clamp_min(1)
        rate = torch.where(self.seen[present], self._rate, 1.0)[:, None]
        self.mean = self.mean.index_copy(0, present, torch.lerp(self.mean[present], mean, rate))
        self.variance = self.variance.index_copy(0, present, torch.lerp(self.variance[present], variance, rate))
        self.seen = self.seen.index_fill(0, present, True)

    def draw(self, labels: Tensor, generator: torch.Generator, world: World) -> Tensor:
        """[M] classes that were seen -> [m, D] of this process: mean + deviation times normal numbers."""
        noise = torch.randn(len(labels), self.mean.shape[1], generator=generator)
        own = world.shard(labels.to(self.mean.device))
        return self.mean[own] + self.variance[own].sqrt() * world.shard(noise).to(self.mean.device)

    @staticmethod
    def _sums(x: Tensor, at: Tensor, groups: int, world: World) -> Tensor:
        sums = x.new_zeros(groups, x.shape[1]).index_add(0, at, x)
        world.all_reduce([sums])
        return sums
