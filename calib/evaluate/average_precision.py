"""From matches to precision, recall and average precision per category.

Detections of a category are walked in score order over all images. With n objects that count, the k-th true
positive gives recall k / n and precision k / (k + false positives so far + eps). The envelope of that curve (the
best precision at this recall or beyond) is read at 101 recall points; the value at a point r belongs to the first
true positive with k / n >= r, and is 0 if there is none. Hence only the positions of true positives matter, and
AP is a weighted sum over them: each weighs as many points as are read from it.

Source: lvis-api 7d7f07d, eval.py ``accumulate`` (pycocotools' does the same); precision and recall are equal to it
to the last bit.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .areas import N_AREAS, outside_areas
from .ground_truth import GroundTruth
from .match import Matches
from .select import Ranked

RECALL_POINTS: NDArray[np.float64] = np.linspace(0.0, 1.0, 101)
EPS = np.spacing(1.0)  # as the reference: a lone true positive has precision 0.9999999999999998


@dataclass(frozen=True)
class Curves:
    """T thresholds, R = 101 recall points, C categories, A = 4 areas; -1 for categories without objects."""

    average_precision: NDArray[np.float64]  # [T, C, A]
    recall: NDArray[np.float64]  # [T, C, A], of all detections that count
    precision: NDArray[np.float64] | None  # [T, R, C, A], if it was asked for


class Objects:
    """What the curves need to know of the objects: their numbers, and which recall point each true positive serves."""

    def __init__(self, truth: GroundTruth) -> None:
        counts = ~outside_areas(truth.area) & ~truth.is_ignored[:, None]
        shape = (len(truth.category_ids), N_AREAS)
        self.n = np.zeros(shape, np.int64)  # [C, A], objects that count
        for a in range(N_AREAS):
            self.n[:, a] = np.bincount(truth.category[counts[:, a]], minlength=shape[0])
        self.needed = {int(n): true_positives_needed(int(n)) for n in np.unique(self.n) if n > 0}  # n -> [R]
        self.first = np.cumsum(self.n, axis=0) - self.n  # [C, A], where a category's weights begin
        self.weight = [self._weights(a) for a in range(N_AREAS)]

    def _weights(self, area: int) -> NDArray[np.float64]:
        """Recall points read from the k-th true positive, k = 1 to n, of each category in turn; [sum of n]."""
        served = {n: np.bincount(needed - 1, minlength=n) for n, needed in self.needed.items()}
        parts = [served[n] for n in self.n[:, area].tolist() if n]
        return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)


def true_positives_needed(n_objects: int) -> NDArray[np.int64]:
    """The k of the true positive that reaches each recall point: k / n >= r as doubles. [R]

    0.57 is 57 / 100, but the point is 0.5700000000000001: of 100 objects 58 are needed.
    """
    return 1 + np.searchsorted(np.arange(1, n_objects + 1) / n_objects, RECALL_POINTS, side="left")


def compute_curves(objects: Objects, ranked: Ranked, matches: Matches, n_thresholds: int, *, full: bool) -> Curves:
    """Average precision and recall in every setting; the whole precision array (39 MB for LVIS) only if ``full``."""
    n_categories = len(objects.n)
    shape = (n_thresholds, n_categories, N_AREAS)
    average, recall = np.full(shape, -1.0), np.full(shape, -1.0)
    precision = np.full((n_thresholds, len(RECALL_POINTS), *shape[1:]), -1.0) if full else None
    category = ranked.category[matches.detection]  # [M], ascending
    for a in range(N_AREAS):
        present = np.flatnonzero(objects.n[:, a])
        false_before = _plain_false(ranked, matches, a)
        for t in range(n_thresholds):
            walk = _Walk(category, matches, a * n_thresholds + t, false_before, n_categories)
            weight = objects.weight[a][objects.first[walk.category, a] + walk.rank]
            total = np.bincount(walk.category, weight * walk.envelope, minlength=n_categories)
            average[t, present, a] = total[present] / len(RECALL_POINTS)
            recall[t, present, a] = walk.n_found[present] / objects.n[present, a]
            if precision is not None:
                precision[t, :, present, a] = _read_points(objects, walk, present, a)
    return Curves(average, recall, precision)


def _plain_false(ranked: Ranked, matches: Matches, area: int) -> NDArray[np.int64]:
    """False positives without any candidate that come before each detection in its category, [M].

    They match nothing in any setting: false unless their area is outside or they are excused.
    """
    is_plain = ~ranked.is_open & ~outside_areas(ranked.area)[:, area]
    is_plain[matches.detection] = False
    before = np.concatenate([[0], np.cumsum(is_plain)])
    start = np.searchsorted(ranked.category, ranked.category[matches.detection])
    return np.asarray(before[matches.detection] - before[start])


class _Walk:
    """The true positives of every category in score order, in one setting. P of them."""

    def __init__(
        self, category: NDArray[np.int64], matches: Matches, bit: int, false_before: NDArray[np.int64], n: int
    ) -> None:
        is_false = (matches.is_false >> np.uint64(bit)) & np.uint64(1)
        before = np.concatenate([[0], np.cumsum(is_false, dtype=np.int64)])
        at = np.flatnonzero((matches.is_true >> np.uint64(bit)) & np.uint64(1))
        self.category = category[at]  # [P], ascending
        self.n_found = np.bincount(self.category, minlength=n)  # [C]
        self.first = np.cumsum(self.n_found) - self.n_found  # [C]
        self.rank = np.arange(len(at)) - self.first[self.category]  # [P], k - 1
        per_category = np.bincount(category, minlength=n)
        start = np.cumsum(per_category) - per_category
        n_false = false_before[at] + before[at] - before[start[self.category]]
        k = self.rank + 1
        self.envelope = best_beyond(k / (n_false + k + EPS), self.category)  # [P]


def best_beyond(value: NDArray[np.float64], group: NDArray[np.int64]) -> NDArray[np.float64]:
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


def _read_points(objects: Objects, walk: _Walk, present: NDArray[np.int64], area: int) -> NDArray[np.float64]:
    """Precision at the recall points, 0 at points that are not reached; [present, R]."""
    if len(present) == 0:
        return np.zeros((0, len(RECALL_POINTS)))
    needed = np.stack([objects.needed[n] for n in objects.n[present, area].tolist()])
    is_reached = needed <= walk.n_found[present, None]
    at = np.where(is_reached, walk.first[present, None] + needed - 1, len(walk.envelope))
    return np.append(walk.envelope, 0.0)[at]
