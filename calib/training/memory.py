"""A memory of features per class: some of the rows of each that the cache holds.

Letters: C classes, D feature size, M rows drawn.
"""

import numpy as np
import torch
from torch import Tensor

from calib.cache import Cache
from calib.cache.index import ClassIndex
from calib.parallel.distributed import World


class FeatureMemory:
    """At most ``each`` rows of every class, drawn by ``seed`` and read once, kept as the cache stores them."""

    def __init__(self, cache: Cache, each: int, seed: int, device: torch.device) -> None:
        index = ClassIndex.build(cache)
        chosen = [self._chosen(index.rows(c), each, seed, c) for c in range(index.background)]
        rows = np.concatenate(chosen)
        ascending, place = np.unique(rows, return_inverse=True)
        stored = torch.from_numpy(cache.features.checked(ascending))
        self._features = stored[torch.from_numpy(place)].to(device)
        self.count = torch.tensor([len(r) for r in chosen])
        self._start = self.count.cumsum(dim=0) - self.count

    def draw(self, labels: Tensor, generator: torch.Generator, world: World) -> Tensor:
        """[M] classes that have rows -> [m, D] rows of this process, drawn uniformly."""
        place = (torch.rand(len(labels), generator=generator) * self.count[labels]).long()
        at = (self._start[labels] + place.minimum(self.count[labels] - 1)).to(self._features.device)
        return self._features[world.shard(at)].float()

    @staticmethod
    def _chosen(
        rows: np.ndarray[tuple[int], np.dtype[np.int64]], each: int, seed: int, c: int
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        rng = np.random.default_rng([seed, 9, c])
        return rng.permutation(rows)[:each]
