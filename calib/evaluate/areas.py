"""Ranges of object area; LVIS and COCO use the same."""

import numpy as np
from numpy.typing import NDArray

AREA_NAMES = ("all", "small", "medium", "large")
AREA_RANGES = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])  # pixels, closed at both ends
N_AREAS = len(AREA_RANGES)


def outside_areas(area: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each area lies outside each range. [N] -> [N, A]"""
    return (area[:, None] < AREA_RANGES[:, 0]) | (area[:, None] > AREA_RANGES[:, 1])


def area_bits(outside: NDArray[np.bool_], n_thresholds: int) -> NDArray[np.uint64]:
    """Set all T bits of an area where ``outside`` is true. [N, A] -> [N]"""
    block = [((1 << n_thresholds) - 1) << (a * n_thresholds) for a in range(N_AREAS)]
    # One look-up per row in place of a reduction over four columns.
    table = np.zeros(1 << N_AREAS, np.uint64)
    for key in range(len(table)):
        table[key] = sum(b for a, b in enumerate(block) if key >> a & 1)
    return np.asarray(table[outside @ (1 << np.arange(N_AREAS))])
