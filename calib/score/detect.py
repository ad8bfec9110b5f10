"""Scores and boxes to detections: threshold, class-wise greedy NMS, the best ``max_detections`` of an image.

Exact and lazy: the best box that is left is kept and suppresses those of its own class, until enough are kept. The
result, order included, is that of suppressing every class in full and taking the best afterwards. A class is looked
at when its best score is the best of all, so the work is one pass over the scores and O(N) for every kept box, whatever
the scores and boxes are. Letters: N proposals, C foreground classes, K detections.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from calib.boxes import Boxes, area
from calib.errors import NonFiniteError, ShapeError
from calib.settings import Nms

_DEPTH = 16
_AT_ONCE = 1 << 20
_REMEMBERED = 512  # rows whose overlaps are kept for further classes: N bytes each
_BETWEEN_CHECKS = 64


@dataclass(frozen=True)
class Detections:
    """Detections of one image, best first; ``row`` is the proposal that each came from."""

    row: NDArray[np.int64]  # [K]
    category: NDArray[np.int64]  # [K] class index
    score: NDArray[np.float32]  # [K]
    box: Boxes  # [K, 4]


def nothing() -> None:
    """Go on."""


def detect(
    scores: NDArray[np.float32],
    boxes: Boxes,
    nms: Nms,
    *,
    min_box_side: float = 0.0,
    check: Callable[[], None] = nothing,
) -> Detections:
    """Detections of one image.

    Args:
        scores: [N, C] in [0, 1].
        boxes: [N, 4] class-agnostic, or [N, C, 4].
        nms: thresholds; scores must be greater than ``score_threshold``, a box is suppressed by a better one of its
            class when their IoU is greater than ``nms_iou``. Ties keep the order of rows, then classes.
        min_box_side: smaller boxes are dropped, in pixels (torchvision uses 0.01).
        check: called now and then; whatever it raises ends the work.

    Raises:
        ShapeError: arrays that do not fit. NonFiniteError: NaN scores or boxes.
    """
    _check(scores, boxes)
    usable = _usable(scores, boxes, min_box_side)
    row, category = _greedy(usable, boxes, nms, check)
    box = boxes[row] if boxes.ndim == 2 else boxes[row, category]
    return Detections(row, category, usable[row, category], box)


def _check(scores: NDArray[np.float32], boxes: Boxes) -> None:
    n, c = scores.shape
    if boxes.shape not in ((n, 4), (n, c, 4)):
        raise ShapeError(f"boxes have shape {list(boxes.shape)}: expected {[n, 4]} or {[n, c, 4]} for {n} x {c} scores")
    if np.isnan(scores.max(initial=-1)) or not np.isfinite(boxes).all():  # NaN is the maximum where there is one
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
    """Flat positions of the ``wanted`` best scores above the threshold, in score order, ties by position."""
    flat = scores.reshape(-1)
    length = len(flat) // _DEPTH
    mask = flat > threshold
    if length >= wanted:
        # The wanted-th largest maximum of disjoint sets bounds the wanted-th largest score from below. The sets go
        # across the memory, so that their maxima are found in whole vectors.
        maxima = flat[: length * _DEPTH].reshape(_DEPTH, length).max(axis=0)
        bound = np.partition(maxima, -wanted)[-wanted]
        if bound > threshold:
            mask = flat > bound
            missing = wanted - int(np.count_nonzero(mask))
            if missing > 0:  # of any number of equal scores only the first
                mask[_first(flat, bound, missing)] = True
    position = np.flatnonzero(mask)
    return position[np.argsort(-flat[position], kind="stable")][:wanted]


def _first(flat: NDArray[np.float32], value: np.float32, wanted: int) -> NDArray[np.int64]:
    """The first ``wanted`` positions of ``value``, or all there are."""
    found = [np.zeros(0, np.int64)]
    for start in range(0, len(flat), _AT_ONCE):
        found.append(np.flatnonzero(flat[start : start + _AT_ONCE] == value)[:wanted] + start)
        wanted -= len(found[-1])
        if wanted == 0:
            break
    return np.concatenate(found)


def _greedy(
    scores: NDArray[np.float32], boxes: Boxes, nms: Nms, check: Callable[[], None]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and classes of what is kept, best first; at most ``max_detections``."""
    shared = lru_cache(_REMEMBERED)(_Overlaps(boxes, nms.nms_iou).of) if boxes.ndim == 2 else None
    threshold = float(np.float32(nms.score_threshold))
    best = scores.max(axis=0, initial=-1)  # [C]
    # Negative score, row, class: the smallest is the next. A class that was not looked at yet has no row, and comes
    # before all of its score.
    heap = [(-score, -1, c) for c, score in enumerate(best.tolist()) if score > threshold]
    heapify(heap)
    left: dict[int, NDArray[np.float32]] = {}  # class -> [N] scores, -1 where kept or suppressed
    kept: list[tuple[int, int]] = []
    while heap and len(kept) < nms.max_detections:
        _, row, category = heappop(heap)
        if row < 0:
            left[category] = column = scores[:, category].copy()
        else:
            if len(kept) % _BETWEEN_CHECKS == 0:
                check()
            kept.append((row, category))
            over = _Overlaps(boxes[:, category], nms.nms_iou).of(row) if shared is None else shared(row)
            column = left[category]
            np.putmask(column, over, -1)
            column[row] = -1
        row = int(column.argmax())
        score = float(column[row])
        if score > threshold:
            heappush(heap, (-score, row, category))
    rows, categories = np.array(kept, np.int64).reshape(-1, 2).T
    return rows, categories


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
