"""Sampling of whole images in random order, as detectors are trained: every image alike, or by repeat factor."""

import numpy as np
from numpy.typing import NDArray

from calib.cache import Cache
from calib.errors import InputError
from calib.sampling.repeat_factor import RepeatCycle, cache_repeat_factors
from calib.sampling.step import Cycle, Step
from calib.settings import ImageBatches


class InstanceSampler:
    """A step is ``batches.chunks`` chunks of ``batches.images_per_chunk`` whole images that have a foreground row.

    Raises:
        InputError: no image has a foreground row.
    """

    def __init__(self, cache: Cache, batches: ImageBatches, *, seed: int) -> None:
        labels, start = cache.labels, cache.image_start
        foreground = np.concatenate([[0], np.cumsum((labels >= 0) & (labels < cache.background))])
        images: NDArray[np.int64] = np.flatnonzero(np.diff(foreground[start]) > 0)
        if len(images) == 0:
            raise InputError(f"cache {cache.path} has no foreground row to train on", hint="extract with --mode train")
        if batches.sampling == "natural":
            self._cycle: Cycle | RepeatCycle = Cycle(images, seed, 1)
        else:
            factors = cache_repeat_factors(cache, batches.repeat_threshold)
            self._cycle = RepeatCycle(images, factors[images], seed, 1)
        self._start = start
        self._usable = labels >= 0
        self._chunks, self._per_chunk = batches.chunks, batches.images_per_chunk
        self.identity = ("instance", batches, seed)

    def step(self, i: int) -> Step:
        """Images [i B, (i+1) B) of the endless reshuffled sequence, B = chunks * images_per_chunk."""
        batch = self._chunks * self._per_chunk
        images = self._cycle.take(i * batch, batch)
        parts = [np.arange(self._start[m], self._start[m + 1]) for m in images]
        chunk = np.repeat(np.arange(batch) // self._per_chunk, [len(p) for p in parts])
        rows = np.concatenate(parts)
        keep = self._usable[rows]
        return Step(rows[keep], chunk[keep], self._chunks)
