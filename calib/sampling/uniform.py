"""Labelled rows drawn uniformly, with replacement: every proposal alike, wherever it comes from."""

import numpy as np

from calib.cache import Cache
from calib.errors import InputError
from calib.sampling.step import Step


class UniformSampler:
    """``rows_per_step`` rows of those with a label, background among them.

    Raises:
        InputError: no row is foreground.
    """

    def __init__(self, cache: Cache, *, rows_per_step: int, seed: int) -> None:
        labels = cache.labels
        self._usable = np.flatnonzero(labels >= 0)
        if not (labels[self._usable] < cache.background).any():
            raise InputError(f"cache {cache.path} has no foreground row to train on", hint="extract with --mode train")
        self._n, self._seed = rows_per_step, seed
        self.identity = ("uniform", rows_per_step, seed)

    def step(self, i: int) -> Step:
        """Rows drawn by (seed, i), ascending, which a disk reads faster."""
        drawn = np.random.default_rng([self._seed, 5, i]).integers(len(self._usable), size=self._n)
        return Step(self._usable[np.sort(drawn)], np.zeros(self._n, np.int64), 1)
