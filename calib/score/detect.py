"""Scores and boxes to detections: threshold, class-wise greedy NMS, the best ``max_detections`` of an image.

Exact and lazy: candidates are walked in score order and compared only with what was kept in their own class, and the
walk stops when enough are kept. The result, order included, is that of suppressing every class in full and taking
the best afterwards. Letters: N proposals, C foreground classes, K detections.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.boxes import Boxes, area
from calib.errors import NonFiniteError, ShapeError
from calib.settings import Nms

_DEPTH = 16
_AT_ONCE = 4096


@dataclass(frozen=True)
class Detections:
    """Detections of one image, best first; ``row`` is the proposal that each came from."""

    row: NDArray[np.int64]  # [K]
    category: NDArray[np.int64]  # [K] class index
    score: NDArray[np.float32]  # [K]
    box: Boxes  # [K, 4]


def detect(scores: NDArray[np.float32], boxes: Boxes, nms: Nms, *, min_box_side: float = 0.0) -> Detections:
    """Detections of one image.

    Args:
        scores: [N, C] in [0, 1].
        boxes: [N, 4] class-agnostic, or [N, C, 4].
        nms: thresholds; scores must be greater than ``score_threshold``, a box is suppressed by a better one of its
            class when their IoU is greater than ``nms_iou``. Ties keep the order of rows, then classes.
        min_box_side: smaller boxes are dropped, in pixels (torchvision uses 0.01).

    Raises:
        ShapeError: arrays that do not fit. NonFiniteError: NaN scores or boxes.
    """
    _check(scores, boxes)
    usable = _usable(scores, boxes, min_box_side)
    wanted = 4 * nms.max_detections
    while True:
        candidates = best_scores(usable, wanted, nms.score_threshold)
        kept = _walk(candidates, boxes, usable.shape[1], nms)
        if len(kept) == nms.max_detections or len(candidates) < wanted:
            break
        wanted *= 4
    row, category = np.divmod(kept, max(usable.shape[1], 1))
    box = boxes[row] if boxes.ndim == 2 else boxes[row, category]
    return Detections(row, category, usable[row, category], box)


def _check(scores: NDArray[np.float32], boxes: Boxes) -> None:
    n, c = scores.shape
    if boxes.shape not in ((n, 4), (n, c, 4)):
        raise ShapeError(f"boxes have shape {list(boxes.shape)}: expected {[n, 4]} or {[n, c, 4]} for {n} x {c} scores")
    if np.isnan(scores).any() or not np.isfinite(boxes).all():
        raise NonFiniteError("scores or boxes hold NaN or infinity")


def _usable(scores: NDArray[np.float32], boxes: Boxes, min_box_side: float) -> NDArray[np.float32]:
    """Scores with those of too small boxes set to -1."""
    if min_box_side <= 0:
        return scores
    sides = boxes[..., 2:] - boxes[..., :2]
    small = np.asarray((sides < np.float32(min_box_side)).any(axis=-1))  # [N] or [N, C]
    if not small.any():
        return scores
    return np.where(small if boxes.ndim == 3 else small[:, None], np.float32(-1), scores)


def best_scores(scores: NDArray[np.float32], wanted: int, threshold: float) -> NDArray[np.int64]:
    """Flat positions of the best scores above the threshold, in score order, ties by position.

    At least ``wanted`` of them where there are so many: those after the first ``wanted`` are not complete.
    """
    flat = scores.reshape(-1)
    length = len(flat) // _DEPTH
    if length >= wanted:
        # The wanted-th largest maximum of disjoint sets bounds the wanted-th largest score from below. The sets go
        # across the memory, so that their maxima are found in whole vectors.
        maxima = flat[: length * _DEPTH].reshape(_DEPTH, length).max(axis=0)
        bound = np.partition(maxima, -wanted)[-wanted]
        mask = flat >= bound if bound > threshold else flat > threshold
    else:
        mask = flat > threshold
    position = np.flatnonzero(mask)
    return position[np.argsort(-flat[position], kind="stable")]


def _walk(candidates: NDArray[np.int64], boxes: Boxes, num_classes: int, nms: Nms) -> NDArray[np.int64]:
    """Greedy NMS over candidates in score order; stops at ``max_detections``."""
    dead = np.zeros((num_classes, len(boxes)), np.bool_)  # overlapped by a kept box of the class
    overlapped: dict[int, NDArray[np.bool_]] = {}  # row -> rows it overlaps, shared by classes when boxes are
    shared = _Overlaps(boxes, nms.nms_iou) if boxes.ndim == 2 else None
    kept: list[int] = []
    for first in range(0, len(candidates), _AT_ONCE):
        part = candidates[first : first + _AT_ONCE]
        if first:  # where boxes lie in heaps nearly all are dead by now: looked up at once
            row, category = np.divmod(part, num_classes)
            part = part[~dead[category, row]]
        for position in part.tolist():
            row, category = divmod(position, num_classes)
            if dead[category, row]:
                continue
            kept.append(position)
            if len(kept) == nms.max_detections:
                return np.asarray(kept, np.int64)
            if shared is None:
                over = _Overlaps(boxes[:, category], nms.nms_iou).of(row)
            else:
                if row not in overlapped:
                    overlapped[row] = shared.of(row)
                over = overlapped[row]
            dead[category] |= over
    return np.asarray(kept, np.int64)


class _Overlaps:
    """Which of N boxes overlap one of them by an IoU greater than ``nms_iou``, in float32 as detectors compute it."""

    def __init__(self, boxes: Boxes, nms_iou: float) -> None:
        self._low = np.ascontiguousarray(boxes[:, :2].T)  # [2, N]
        self._high = np.ascontiguousarray(boxes[:, 2:].T)
        self._area = area(boxes)
        # A float32 is greater than nms_iou exactly if it is greater than the float32 just below or at nms_iou.
        bound = np.float32(nms_iou)
        self._bound = bound if bound <= nms_iou else np.nextafter(bound, np.float32(-1))

    def of(self, row: int) -> NDArray[np.bool_]:
        """[N]."""
        sides = np.minimum(self._high, self._high[:, row, None])
        sides -= np.maximum(self._low, self._low[:, row, None])
        np.maximum(sides, 0, out=sides)
        inter = sides[0] * sides[1]
        union = self._area + self._area[row]
        union -= inter
        with np.errstate(divide="ignore", invalid="ignore"):  # boxes without area overlap nothing: 0 / 0 > x is false
            over: NDArray[np.bool_] = inter / union > self._bound
        return over
