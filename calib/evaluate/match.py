"""Which detection finds which object, for all IoU thresholds and object sizes at once.

A *setting* is one of T IoU thresholds with one of A = 4 ranges of object area. Settings are the bits of a
uint64 (bit ``a * T + t``), so that one step of the greedy matching serves all 40 of them.

Per image and category, and per setting, each detection in score order takes, among the objects that are still
free and overlap it by at least the threshold, the best one that counts, and only if there is none the best
ignored one (flagged, or its area outside the range). Of equal overlaps the later object in the file wins. In COCO
style a crowd, always ignored, can be taken any number of times.

Source: lvis-api 7d7f07d, eval.py ``evaluate_img``; pycocotools 2.0.11, cocoeval.py ``evaluateImg``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .areas import area_bits, outside_areas
from .ground_truth import GroundTruth
from .overlaps import NO_BITS, Pairs
from .select import Ranked


@dataclass(frozen=True)
class Matches:
    """Per detection with candidates: the settings in which it found an object."""

    detection: NDArray[np.int64]  # [M], index into Ranked, ascending
    is_true: NDArray[np.uint64]  # [M], found an object that counts
    is_false: NDArray[np.uint64]  # [M], found none, and is to blame for it
    pair: NDArray[np.int64]  # [M], which of Pairs it took in the setting of bit 0, -1 for none


def match(truth: GroundTruth, ranked: Ranked, pairs: Pairs, n_thresholds: int) -> Matches:
    """Match greedily in score order, all settings at once."""
    ignored_object = area_bits(outside_areas(truth.area) | truth.is_ignored[:, None], n_thresholds)
    has_crowds = bool(truth.is_crowd.any())
    taken = np.zeros(len(truth.area), np.uint64)
    found = np.zeros(len(pairs.detection), np.uint64)
    found_ignored = np.zeros(len(pairs.detection), np.uint64)
    took = np.full(len(pairs.detection), -1)
    for turn in _turns(ranked, pairs, len(truth.category_ids)):
        for counts in (True, False):
            for j in range(int(pairs.count[turn].max())):
                who = turn[pairs.count[turn] > j]
                pair = pairs.first[who] + j
                what = pairs.object[pair]
                eligible = ~ignored_object[what] if counts else ignored_object[what]
                new = pairs.passes[pair] & eligible & ~taken[what] & ~found[who]
                taken[what] |= np.where(truth.is_crowd[what], NO_BITS, new) if has_crowds else new
                found[who] |= new
                took[who] = np.where(new & np.uint64(1), pair, took[who])
                if not counts:
                    found_ignored[who] |= new
    is_false = ~found & ~_excused(ranked, pairs, n_thresholds)
    return Matches(pairs.detection, found & ~found_ignored, is_false, took)


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
