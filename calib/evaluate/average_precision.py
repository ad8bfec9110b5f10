"""From matches to precision, recall and average precision per category.

Detections of a category are walked in score order over all images. With n objects that count, the k-th true
positive gives recall k / n and precision k / (k + false positives so far + eps). LVIS reads the envelope of
that curve (the best precision at this recall or beyond) at 101 recall points; the value at a point r belongs
to the first true positive with k / n >= r, and is 0 if there is none. Hence only the positions of true
positives matter.

Source: lvis-api 7d7f07d, eval.py ``accumulate``; equal to it to the last bit.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .ground_truth import GroundTruth
from .match import N_AREAS, Matches, outside_areas
from .select import Ranked

RECALL_POINTS: NDArray[np.float64] = np.linspace(0.0, 1.0, 101)
EPS = np.spacing(1.0)  # as the reference: a lone true positive has precision 0.9999999999999998


@dataclass(frozen=True)
class Curves:
    """T thresholds, R = 101 recall points, C categories, A = 4 areas; -1 for categories without objects."""

    n_objects: NDArray[np.int64]  # [C, A], objects that count
    average_precision: NDArray[np.float64]  # [T, C, A]
    recall: NDArray[np.float64]  # [T, C, A], of all detections that count
    precision: NDArray[np.float64] | None  # [T, R, C, A], if it was asked for


def count_objects(truth: GroundTruth) -> NDArray[np.int64]:
    """Objects per category and area that are not ignored, [C, A]."""
    counts = np.zeros((len(truth.category_ids), N_AREAS), np.int64)
    for a, outside in enumerate(outside_areas(truth.area).T):
        category = truth.category[~outside & ~truth.is_ignored]
        counts[:, a] = np.bincount(category, minlength=len(counts))
    return counts


def compute_curves(truth: GroundTruth, ranked: Ranked, matches: Matches, n_thresholds: int, *, full: bool) -> Curves:
    """Precision and recall in every setting; the whole precision array (39 MB for LVIS) only if ``full``."""
    n_objects = count_objects(truth)
    shape = (n_thresholds, *n_objects.shape)
    average, recall = np.full(shape, -1.0), np.full(shape, -1.0)
    precision = np.full((n_thresholds, len(RECALL_POINTS), *n_objects.shape), -1.0) if full else None
    for a in range(N_AREAS):
        present = np.flatnonzero(n_objects[:, a])
        needed = true_positives_needed(n_objects[present, a])
        walk = _Walk(truth, ranked, matches, a)
        for t in range(n_thresholds):
            envelope, first, n_found = walk.envelope(a * n_thresholds + t)
            points = _read_points(envelope, first[present], n_found[present], needed)
            average[t, present, a] = points.mean(axis=1)
            recall[t, present, a] = n_found[present] / n_objects[present, a]
            if precision is not None:
                precision[t, :, present, a] = points
    return Curves(n_objects, average, recall, precision)


def true_positives_needed(n_objects: NDArray[np.int64]) -> NDArray[np.int64]:
    """The k of the true positive that reaches each recall point: k / n >= r as doubles. [K] -> [K, R]

    0.57 is 57 / 100, but the point is 0.5700000000000001: of 100 objects 58 are needed.
    """
    needed = np.empty((len(n_objects), len(RECALL_POINTS)), np.int64)
    for n in np.unique(n_objects):
        reached = np.arange(1, n + 1) / n
        needed[n_objects == n] = 1 + np.searchsorted(reached, RECALL_POINTS, side="left")
    return needed


class _Walk:
    """The detections of every category in score order, for one area, before any threshold."""

    def __init__(self, truth: GroundTruth, ranked: Ranked, matches: Matches, area: int) -> None:
        self.matches = matches
        self.category = ranked.category[matches.detection]  # [M], ascending
        self.edges = np.arange(len(truth.category_ids) + 1)
        # Detections without candidates match nothing in any setting: false unless outside or excused.
        is_plain = ~ranked.is_open & ~outside_areas(ranked.area)[:, area]
        is_plain[matches.detection] = False
        before = np.concatenate([[0], np.cumsum(is_plain)])
        start = np.searchsorted(ranked.category, self.edges)
        self.plain_false = before[matches.detection] - before[start[self.category]]  # [M]
        self.start = np.searchsorted(self.category, self.edges)  # [C + 1]

    def envelope(self, bit: int) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
        """Envelope at each true positive, and per category its first entry there and their number."""
        is_false = (self.matches.is_false >> np.uint64(bit)) & np.uint64(1)
        before = np.concatenate([[0], np.cumsum(is_false, dtype=np.int64)])
        at = np.flatnonzero((self.matches.is_true >> np.uint64(bit)) & np.uint64(1))
        category = self.category[at]
        n_false = self.plain_false[at] + before[at] - before[self.start[category]]
        start = np.searchsorted(category, self.edges)
        k = np.arange(1, len(at) + 1) - start[category]
        return _best_beyond(k / (n_false + k + EPS), category), start[:-1], np.diff(start)


def _best_beyond(value: NDArray[np.float64], group: NDArray[np.int64]) -> NDArray[np.float64]:
    """Running maximum from the right inside each group of equal ``group`` (ascending). [N], [N] -> [N]

    By doubling: after the step of width d each entry holds the maximum of the next 2 d entries of its group.
    """
    best = value.copy()
    longest = int(np.bincount(group).max(initial=0))
    width = 1
    while width < longest:
        same = group[width:] == group[:-width]
        best[:-width] = np.where(same, np.maximum(best[:-width], best[width:]), best[:-width])
        width *= 2
    return best


def _read_points(
    envelope: NDArray[np.float64],
    first: NDArray[np.int64],
    n_found: NDArray[np.int64],
    needed: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Precision at the recall points; 0 at points that are not reached. [N], [K], [K], [K, R] -> [K, R]"""
    is_reached = needed <= n_found[:, None]
    at = np.where(is_reached, first[:, None] + needed - 1, len(envelope))
    return np.append(envelope, 0.0)[at]
