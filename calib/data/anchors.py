"""Anchors of a region proposal network from the boxes that it is to find.

Sizes are the square roots of areas, ratios are height over width. Both are clustered by k-means on their logarithms
(Lloyd's algorithm from quantiles: nothing is drawn). A box weighs the inverse square root of the number of boxes of its
category: with weight 1 the frequent categories alone would choose, with the inverse of the number rare ones would.
Letters: N boxes.
"""

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import InputError, SettingError

Floats = NDArray[np.float64]
LEVELS = 3
_ROUNDS = 100


@dataclass(frozen=True)
class Anchors:
    """``sizes`` in pixels for each of ``LEVELS`` levels, the finest first; ``ratios``, height over width, for all.

    ``covered`` is the share of boxes that have an IoU of at least 0.5 with an anchor at their own centre, and
    ``covered_per_category`` its mean over categories.
    """

    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[float, ...]
    covered: float
    covered_per_category: float

    def record(self) -> dict[str, Any]:
        """Plain metrics."""
        return asdict(self)


def fit_anchors(sides: Floats, label: NDArray[np.int64], *, per_level: int = 1, ratios: int = 3) -> Anchors:
    """Anchors for boxes of ``sides`` [N, 2] (width and height in pixels of the network) and category ``label`` [N].

    Raises:
        SettingError: no anchor is asked for. InputError: no box has an area.
    """
    if per_level < 1 or ratios < 1:
        raise SettingError(f"anchors: {per_level} sizes per level and {ratios} ratios, expected at least 1 of each")
    usable = (sides > 0).all(axis=1)
    sides, label = sides[usable], label[usable]
    if not len(sides):
        raise InputError("no box has an area: there is nothing to fit anchors to")
    _, of, number = np.unique(label, return_inverse=True, return_counts=True)
    weight = 1 / np.sqrt(number[of])
    found = np.exp(_clusters(0.5 * np.log(sides).sum(axis=1), weight, LEVELS * per_level)).round(1)
    sizes = tuple(tuple(map(float, part)) for part in found.reshape(LEVELS, per_level))
    shapes = tuple(map(float, np.exp(_clusters(np.log(sides[:, 1] / sides[:, 0]), weight, ratios)).round(3)))
    hit = _best_iou(sides, sizes, shapes) >= 0.5
    return Anchors(sizes, shapes, float(hit.mean()), float((np.bincount(of, hit) / number).mean()))


def _clusters(values: Floats, weight: Floats, k: int) -> Floats:
    """Centres of weighted k-means in one dimension, ascending. [N], [N] -> [k]"""
    order = np.argsort(values, kind="stable")
    values, weight = values[order], weight[order]
    share = np.cumsum(weight) / weight.sum()
    centres = values[np.minimum(np.searchsorted(share, (np.arange(k) + 0.5) / k), len(values) - 1)]
    for _ in range(_ROUNDS):
        of = np.searchsorted((centres[:-1] + centres[1:]) / 2, values)
        total = np.bincount(of, weight, minlength=k)
        means = np.divide(np.bincount(of, weight * values, minlength=k), total, out=centres.copy(), where=total > 0)
        if np.array_equal(means, centres):
            break
        centres = np.sort(means)
    return centres


def _best_iou(sides: Floats, sizes: tuple[tuple[float, ...], ...], ratios: tuple[float, ...]) -> Floats:
    """The best IoU of every box with an anchor at its centre, [N]."""
    best = np.zeros(len(sides))
    for size, ratio in product((s for level in sizes for s in level), ratios):
        anchor = np.array([size / np.sqrt(ratio), size * np.sqrt(ratio)])
        inter = np.minimum(sides, anchor).prod(axis=1)
        best = np.maximum(best, inter / (sides.prod(axis=1) + anchor.prod() - inter))
    return best
