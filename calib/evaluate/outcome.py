"""What became of each detection at one IoU threshold: true, false, or not counted; and how well its box fits."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .areas import outside_areas
from .evaluation import Evaluator, Matched, Rescored
from .results import Detections
from .select import Caps, Ranked


@dataclass(frozen=True)
class Outcomes:
    """K detections in evaluation order: category, then score down."""

    ranked: Ranked
    is_true: NDArray[np.bool_]  # [K], found an object that counts
    is_false: NDArray[np.bool_]  # [K], found none and is to blame; the others count neither way
    object: NDArray[np.int64]  # [K], index of the object it took (one that counts or an ignored one), -1 for none
    iou: NDArray[np.float64]  # [K], overlap with that object, 0 for none


def outcomes(evaluator: Evaluator, detections: Detections | Rescored, caps: Caps, iou_threshold: float) -> Outcomes:
    """Judge every detection at one threshold, objects of all sizes.

    Args:
        iou_threshold: in [0, 1]; at 0 a detection takes any free object of its category in the image.

    Raises:
        InputError: detections of images that the ground truth does not have.
    """
    return _of(evaluator.match(detections, caps, np.array([iou_threshold])))


def settle(matched: Matched, bit: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether each ranked detection is true, and whether it is false, in the setting of a bit below T (all sizes)."""
    ranked, matches = matched.ranked, matched.matches
    is_true = np.zeros(len(ranked), np.bool_)
    is_false = ~ranked.is_open & ~outside_areas(ranked.area)[:, 0]
    mask = np.uint64(1 << bit)
    is_true[matches.detection] = (matches.is_true & mask) > 0
    is_false[matches.detection] = (matches.is_false & mask) > 0
    return is_true, is_false


def _of(matched: Matched) -> Outcomes:
    ranked, pairs, matches = matched.ranked, matched.pairs, matched.matches
    is_true, is_false = settle(matched, 0)
    taken, iou = np.full(len(ranked), -1), np.zeros(len(ranked))
    took = matches.pair >= 0
    taken[matches.detection[took]] = pairs.object[matches.pair[took]]
    iou[matches.detection[took]] = pairs.iou[matches.pair[took]]
    return Outcomes(ranked, is_true, is_false, taken, iou)
