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

_BLOCK = 16


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
    mask = flat > threshold
    blocks = flat[: len(flat) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
    if len(blocks) >= wanted:
        # The wanted-th largest of the block maxima bounds the wanted-th largest score from below.
        bound = np.partition(blocks.max(axis=1), -wanted)[-wanted]
        mask &= flat >= bound
    position = np.flatnonzero(mask)
    return position[np.argsort(-flat[position], kind="stable")]


def _walk(candidates: NDArray[np.int64], boxes: Boxes, num_classes: int, nms: Nms) -> NDArray[np.int64]:
    """Greedy NMS over candidates in score order; stops at ``max_detections``."""
    suppressed: dict[int, NDArray[np.bool_]] = {}  # class -> rows that a kept box of the class overlaps
    overlapped: dict[int, NDArray[np.bool_]] = {}  # row -> rows it overlaps, shared by classes when boxes are
    shared = boxes.ndim == 2
    kept: list[int] = []
    for position in candidates.tolist():
        row, category = divmod(position, num_classes)
        dead = suppressed.get(category)
        if dead is not None and dead[row]:
            continue
        kept.append(position)
        if len(kept) == nms.max_detections:
            break
        if not shared:
            over = _overlaps(boxes[:, category], row, nms.nms_iou)
        else:
            if row not in overlapped:
                overlapped[row] = _overlaps(boxes, row, nms.nms_iou)
            over = overlapped[row]
        suppressed[category] = over if dead is None else dead | over
    return np.asarray(kept, np.int64)


def _overlaps(boxes: Boxes, row: int, nms_iou: float) -> NDArray[np.bool_]:
    """[N] whether IoU with box ``row`` is greater than ``nms_iou``, in float32 as detectors compute it."""
    one, areas = boxes[row], area(boxes)
    sides = np.minimum(boxes[:, 2:], one[2:]) - np.maximum(boxes[:, :2], one[:2])
    inter = np.maximum(sides[:, 0], 0) * np.maximum(sides[:, 1], 0)
    union = areas[row] + areas - inter
    iou = np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
    over: NDArray[np.bool_] = iou.astype(np.float64) > nms_iou
    return over
