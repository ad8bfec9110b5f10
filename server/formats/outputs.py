"""What a request may ask for: dense scores, the best scores of every image, or detections after NMS.

Letters: N proposals in all, B images, C foreground classes, K entries over all images; the entries of image b are
``OFFSETS[b] : OFFSETS[b + 1]``, rows are numbers of proposals in the request.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import SettingError
from calib.heads.base import Head
from calib.score.by_size import by_size
from calib.score.detect import best_scores, detect
from calib.settings import Nms

from ..errors import BadRequestError, shown

SCORES = "SCORES"
TOP = ("TOP_SCORES", "TOP_ROWS", "TOP_CLASSES", "TOP_OFFSETS")
DETECTIONS = ("DET_BOXES", "DET_SCORES", "DET_CLASSES", "DET_ROWS", "DET_OFFSETS")
KNOWN = (SCORES, *TOP, *DETECTIONS)
MAX_PER_IMAGE = 10_000

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Wanted:
    """Checked parameters of a request. ``topk`` is per image; SCORES go out as ``score_dtype``."""

    nms: Nms
    topk: int = 300
    score_threshold: float = 0.0
    score_dtype: str = "FP32"


def wanted(parameters: dict[str, Any], detector: Nms) -> Wanted:
    """Read ``score_threshold``, ``nms_iou``, ``max_detections``, ``topk`` and ``score_dtype``; others are not ours.

    Detections use the detector's own settings where none are given; TOP_* keep every score then.

    Raises:
        BadRequestError: a value of another type or out of range.
    """
    given: dict[str, Any] = {name: parameters[name] for name in ("score_threshold", "nms_iou") if name in parameters}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise BadRequestError(f"parameter '{name}' is {shown(value)}: expected a number in [0, 1]")
    counts: dict[str, Any] = {name: parameters[name] for name in ("max_detections", "topk") if name in parameters}
    for name, value in counts.items():
        if type(value) is not int or not 1 <= value <= MAX_PER_IMAGE:
            raise BadRequestError(f"parameter '{name}' is {shown(value)}: expected 1 to {MAX_PER_IMAGE}")
    dtype = parameters.get("score_dtype", "FP32")
    if dtype not in ("FP32", "FP16"):
        raise BadRequestError(f"parameter 'score_dtype' is {shown(dtype)}: expected FP32 or FP16")
    topk = counts.pop("topk", 300)
    try:
        nms = replace(detector, **given, **counts)
    except SettingError as e:
        raise BadRequestError(str(e)) from None
    return Wanted(nms, topk, float(given.get("score_threshold", 0.0)), dtype)


def image_edges(sizes: NDArray[np.int32] | None, rows: int, max_images: int) -> NDArray[np.int64]:
    """First row of each image and the end, [B + 1], from IMAGE_SIZES; all rows are one image without them.

    Raises:
        BadRequestError: too many images, a negative size, or another sum than the number of rows.
    """
    if sizes is None:
        return np.array([0, rows])
    if len(sizes) > max_images:
        raise BadRequestError(f"IMAGE_SIZES has {len(sizes)} images: at most {max_images} are accepted")
    if (sizes < 0).any() or int(sizes.sum(dtype=np.int64)) != rows:
        raise BadRequestError(f"IMAGE_SIZES must be sizes with the sum {rows}, the rows of FEATURES")
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def top(scores: NDArray[np.float32], edges: NDArray[np.int64], asked: Wanted) -> Arrays:
    """The ``topk`` best scores of every image above the threshold, best first, ties by row and class. [N, C]"""
    columns: list[tuple[NDArray[Any], ...]] = []
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = np.ascontiguousarray(scores[start:stop])
        position = best_scores(part, asked.topk, asked.score_threshold)
        row, category = np.divmod(position, max(part.shape[1], 1))
        columns.append((part.reshape(-1)[position], row + start, category))
    values, rows, classes = _joined(columns, (np.float32, np.int32, np.int32))
    return dict(zip(TOP, (values, rows, classes, _offsets(columns)), strict=True))


def detections(
    head: Head,
    scores: NDArray[np.float32],
    boxes: NDArray[np.float32],
    edges: NDArray[np.int64],
    asked: Wanted,
    min_box_side: float,
    check: Callable[[], None],
) -> Arrays:
    """Detections of every image by ``head``, best first. [N, C], [N, 4] or [N, C, 4]

    What ``check`` raises ends the work.
    """
    columns: list[tuple[NDArray[Any], ...]] = []
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = np.ascontiguousarray(scores[start:stop])
        found = detect(part, boxes[start:stop], asked.nms, min_box_side=min_box_side, check=check)
        found = by_size(head, found)
        columns.append((found.box.reshape(-1, 4), found.score, found.category, found.row + start))
    box, score, category, row = _joined(columns, (np.float32, np.float32, np.int32, np.int32))
    return dict(zip(DETECTIONS, (box.reshape(-1, 4), score, category, row, _offsets(columns)), strict=True))


def _joined(columns: list[tuple[NDArray[Any], ...]], dtypes: tuple[Any, ...]) -> list[NDArray[Any]]:
    empty = [np.zeros(0, dtype) for dtype in dtypes]
    if not columns:
        return empty
    return [np.concatenate([c[k] for c in columns]).astype(dtype) for k, dtype in enumerate(dtypes)]


def _offsets(columns: list[tuple[NDArray[Any], ...]]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum([len(c[-1]) for c in columns])]).astype(np.int32)
