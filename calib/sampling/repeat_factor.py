"""Repeat-factor sampling: images with rare classes come several times per pass.

Paper: Gupta, Dollar, Girshick, LVIS: A Dataset for Large Vocabulary Instance Segmentation, CVPR 2019, Sec. 4.
r_c = max(1, sqrt(t / f_c)), f_c = share of images with class c; r(I) = max over the classes in I, 1 for an empty image.
A pass takes floor(r) copies of an image and one more with probability r - floor(r), drawn anew for every pass
(detectron2); ``ceil_copies`` is the fixed ceil(r) of mmdetection.
"""

import numpy as np
from numpy.typing import NDArray

from calib.cache import Cache
from calib.sampling.step import Rows

Factors = NDArray[np.float64]


def repeat_factors(image: Rows, category: Rows, n_images: int, threshold: float) -> Factors:
    """[M] image numbers and [M] classes of objects -> [n_images] r(I)."""
    pairs = np.unique(np.stack([image, category], axis=1), axis=0)
    images_with = np.bincount(pairs[:, 1]) if len(pairs) else np.zeros(0)
    with np.errstate(divide="ignore"):
        of_class = np.maximum(1.0, np.sqrt(threshold * n_images / images_with))
    factors = np.ones(n_images)
    np.maximum.at(factors, pairs[:, 0], of_class[pairs[:, 1]])
    return factors


def cache_repeat_factors(cache: Cache, threshold: float) -> Factors:
    """[images] factors from the ground truth of ``cache``."""
    table, ids = cache.annotations(), cache.images["image_id"].to_numpy()
    order = np.argsort(ids)
    image = order[np.searchsorted(ids[order], table["image_id"].to_numpy())]
    category = cache.categories.index_of(table["category_id"].to_numpy())
    return repeat_factors(image, category, len(ids), threshold)


def stochastic_copies(factors: Factors, rng: np.random.Generator) -> Rows:
    """How often each image comes in one pass."""
    whole = np.floor(factors)
    return (whole + (rng.random(len(factors)) < factors - whole)).astype(np.int64)


def ceil_copies(factors: Factors) -> Rows:
    """The deterministic form."""
    return np.ceil(factors).astype(np.int64)


class RepeatCycle:
    """Like ``Cycle``, over passes of different lengths: each draws its copies and its order from (seed, pass)."""

    def __init__(self, items: Rows, factors: Factors, *seed: int) -> None:
        self._items, self._factors, self._seed = items, factors, seed
        self._starts = [0]  # of the passes visited so far
        self._turn, self._order = -1, items

    def take(self, start: int, count: int) -> Rows:
        """``count`` items from position ``start``."""
        picked: list[Rows] = []
        while count:
            turn = self._turn_of(start)
            part = self._pass(turn)[start - self._starts[turn] :][:count]
            picked.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(picked) if picked else np.empty(0, np.int64)

    def _turn_of(self, position: int) -> int:
        while self._starts[-1] <= position:
            self._starts.append(self._starts[-1] + len(self._pass(len(self._starts) - 1)))
        return int(np.searchsorted(self._starts, position, side="right")) - 1

    def _pass(self, turn: int) -> Rows:
        if turn != self._turn:
            rng = np.random.default_rng([*self._seed, turn])
            self._order = rng.permutation(np.repeat(self._items, stochastic_copies(self._factors, rng)))
            self._turn = turn
        return self._order
