"""Which detection finds which object, for all IoU thresholds and object sizes at once.

A *setting* is one of T IoU thresholds with one of A = 4 ranges of object area. Settings are the bits of a
uint64 (bit ``a * T + t``), so that one step of the greedy matching serves all 40 of them.

LVIS matches per image and category, per setting: each detection in score order takes, among the objects that
are still free and overlap it by at least the threshold, the best one that counts, and only if there is none
the best ignored one (flagged, or its area outside the range). Of equal overlaps the later object in the file
wins.

Only pairs with an overlap of at least the lowest threshold can match. They depend on the boxes alone, not on
the scores, which is why finding them and matching are two functions.

Source: lvis-api 7d7f07d, eval.py ``evaluate_img``; overlaps as pycocotools ``bbIou``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.errors import SettingError

from .ground_truth import GroundTruth, positions
from .select import Ranked

IOU_THRESHOLDS: NDArray[np.float64] = np.linspace(0.5, 0.95, 10)  # not 0.05 * k: the last digits matter
AREA_NAMES = ("all", "small", "medium", "large")
AREA_RANGES = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])  # pixels, closed at both ends
N_AREAS = len(AREA_RANGES)
NO_BITS = np.uint64(0)


@dataclass(frozen=True)
class Pairs:
    """Detections with candidates (M of them), and their P candidate objects, best first.

    The candidates of ``detection[m]`` are the entries ``first[m] : first[m] + count[m]`` of ``object`` and
    ``passes``.
    """

    detection: NDArray[np.int64]  # [M], index into Ranked, ascending
    first: NDArray[np.int64]  # [M]
    count: NDArray[np.int64]  # [M], >= 1
    object: NDArray[np.int64]  # [P], index into the ground truth's annotations
    passes: NDArray[np.uint64]  # [P], settings whose IoU threshold the pair reaches


@dataclass(frozen=True)
class Matches:
    """Per detection with candidates: the settings in which it found an object."""

    detection: NDArray[np.int64]  # [M], index into Ranked, ascending
    is_true: NDArray[np.uint64]  # [M], found an object that counts
    is_false: NDArray[np.uint64]  # [M], found none, and is to blame for it


def check_thresholds(iou_thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``iou_thresholds`` [T] as float64.

    Raises:
        SettingError: none, more than 16 (4 areas x 16 fill the 64 bits), or one outside (0, 1].
    """
    thresholds = np.asarray(iou_thresholds, np.float64)
    if thresholds.ndim != 1 or not 1 <= len(thresholds) <= 64 // N_AREAS:
        raise SettingError(f"iou_thresholds must be 1 to {64 // N_AREAS} numbers, got shape {thresholds.shape}")
    if not ((thresholds > 0) & (thresholds <= 1)).all():
        raise SettingError(f"iou_thresholds must lie in (0, 1], got {thresholds.tolist()}")
    return thresholds


def area_bits(outside: NDArray[np.bool_], n_thresholds: int) -> NDArray[np.uint64]:
    """Set all T bits of an area where ``outside`` is true. [N, A] -> [N]"""
    block = [((1 << n_thresholds) - 1) << (a * n_thresholds) for a in range(N_AREAS)]
    bits = np.where(outside, np.array(block, np.uint64), NO_BITS)
    return np.asarray(np.bitwise_or.reduce(bits, axis=1))


def outside_areas(area: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each area lies outside each range. [N] -> [N, A]"""
    return (area[:, None] < AREA_RANGES[:, 0]) | (area[:, None] > AREA_RANGES[:, 1])


def box_iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Overlap of boxes x, y, width, height row by row, rounded as the reference does. [P, 4] x 2 -> [P]"""
    low = np.maximum(a[:, :2], b[:, :2])
    high = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:])
    side = high - low
    inter = np.where((side > 0).all(axis=1), side[:, 0] * side[:, 1], 0.0)
    union = a[:, 2] * a[:, 3] + b[:, 2] * b[:, 3] - inter
    return np.divide(inter, union, out=np.zeros(len(a)), where=inter > 0)


def find_pairs(truth: GroundTruth, ranked: Ranked, iou_thresholds: NDArray[np.float64]) -> Pairs:
    """All (detection, object) pairs of one image and category that overlap by at least the lowest threshold.

    Raises:
        SettingError: see ``check_thresholds``.
    """
    # A threshold of exactly 1 would refuse perfect boxes that differ in the last bit.
    thresholds = np.minimum(check_thresholds(iou_thresholds), 1 - 1e-10)
    detection, index = _same_group(truth, ranked)
    with np.errstate(over="ignore", invalid="ignore"):
        iou = box_iou(ranked.box[detection], truth.box[index])
    near = iou >= thresholds.min()
    detection, index, iou = detection[near], index[near], iou[near]
    order = np.lexsort((-index, -iou, detection))  # the later of equal overlaps first
    detection, index, iou = detection[order], index[order], iou[order]
    first = np.flatnonzero(np.diff(detection, prepend=-1))
    return Pairs(
        detection=detection[first],
        first=first,
        count=np.diff(first, append=len(detection)),
        object=index,
        passes=_threshold_bits(iou, thresholds),
    )


def _same_group(truth: GroundTruth, ranked: Ranked) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every detection with every object of its image and category: indices of both."""
    n_categories = len(truth.category_ids)
    object_group = truth.image * n_categories + truth.category
    by_group = np.argsort(object_group, kind="stable")
    group, first, count = np.unique(object_group[by_group], return_index=True, return_counts=True)
    at = positions(group, ranked.image * n_categories + ranked.category)
    detection = np.flatnonzero(at >= 0)
    n = count[at[detection]]
    step = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
    return np.repeat(detection, n), by_group[np.repeat(first[at[detection]], n) + step]


def _threshold_bits(iou: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.uint64]:
    bits = np.zeros(len(iou), np.uint64)
    for t, threshold in enumerate(thresholds):
        of_all_areas = sum(1 << (a * len(thresholds) + t) for a in range(N_AREAS))
        bits |= np.where(iou >= threshold, np.uint64(of_all_areas), NO_BITS)
    return bits


def match(truth: GroundTruth, ranked: Ranked, pairs: Pairs, n_thresholds: int) -> Matches:
    """Match greedily in score order, all settings at once."""
    outside = outside_areas(truth.area) | truth.is_ignored[:, None]
    ignored_object = area_bits(outside, n_thresholds)
    taken = np.zeros(len(truth.area), np.uint64)
    found = np.zeros(len(pairs.detection), np.uint64)
    found_ignored = np.zeros(len(pairs.detection), np.uint64)
    for turn in _turns(ranked, pairs, len(truth.category_ids)):
        for counts in (True, False):
            for j in range(int(pairs.count[turn].max())):
                who = turn[pairs.count[turn] > j]
                pair = pairs.first[who] + j
                what = pairs.object[pair]
                eligible = ~ignored_object[what] if counts else ignored_object[what]
                new = pairs.passes[pair] & eligible & ~taken[what] & ~found[who]
                taken[what] |= new
                found[who] |= new
                if not counts:
                    found_ignored[who] |= new
    return Matches(pairs.detection, found & ~found_ignored, ~found & ~_excused(ranked, pairs, n_thresholds))


def _turns(ranked: Ranked, pairs: Pairs, n_categories: int) -> list[NDArray[np.int64]]:
    """Indices into ``pairs.detection``: first the best of every image and category, then the second best, ...

    Within one turn no two detections can want the same object, so a turn is one vector step.
    """
    n = len(pairs.detection)
    if n == 0:
        return []
    group = ranked.image[pairs.detection] * n_categories + ranked.category[pairs.detection]
    by_group = np.argsort(group, kind="stable")  # the ranking holds inside each group
    is_first = np.diff(group[by_group], prepend=-1) != 0
    turn = np.arange(n) - np.maximum.accumulate(np.where(is_first, np.arange(n), 0))
    by_turn = np.argsort(turn, kind="stable")
    return np.split(by_group[by_turn], np.cumsum(np.bincount(turn))[:-1])


def _excused(ranked: Ranked, pairs: Pairs, n_thresholds: int) -> NDArray[np.uint64]:
    """Settings in which an unmatched detection is not counted as false, [M]."""
    outside = outside_areas(ranked.area[pairs.detection])
    return area_bits(outside | ranked.is_open[pairs.detection, None], n_thresholds)
