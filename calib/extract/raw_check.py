"""Checks of arrays that come from elsewhere; errors name the image and the row.

Letters: N proposals of one image, D feature size, C foreground classes.
"""

from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.annotations import LARGEST_PIXEL
from calib.boxes import Boxes
from calib.cache import Classifier
from calib.cache.schema import EXTRA_LOGITS
from calib.errors import FormatError, InputError, NonFiniteError, ShapeError

_AGREEMENT = 0.02  # of the largest logit: half-precision features and logits stay far below


def checked_classifier(classifier: Classifier, classes: int, activation: str, *, background_first: bool) -> Classifier:
    """``classifier`` with background last, in all stages, if its shapes are those of ``classes`` foreground classes.

    Raises:
        ShapeError: they are not. NonFiniteError: NaN or infinite weights.
    """
    own, *later = (_checked_stage(c, classes, activation, background_first) for c in classifier.stages)
    return replace(own, next=tuple(later))


def _checked_stage(classifier: Classifier, classes: int, activation: str, background_first: bool) -> Classifier:
    outputs = classes + EXTRA_LOGITS[activation]
    rows, d = classifier.weight.shape
    if rows != outputs:
        kinds = {
            "softmax": "a background row",
            "sigmoid": "no background row (sigmoid)",
            "seesaw": "an objectness pair",
        }
        kind = kinds[activation]
        raise ShapeError(
            f"the classifier has {rows} rows: {classes} categories and {kind} make {outputs}",
            hint="is it of another data set, or of another activation (softmax, sigmoid, seesaw)?",
        )
    for f in fields(classifier):
        tensor = getattr(classifier, f.name)
        if tensor is not None and not np.isfinite(tensor).all():
            raise NonFiniteError(f"{f.name} of the classifier holds NaN or infinity", hint="check the detector")
    box, box_bias = classifier.box_weight, classifier.box_bias
    if (box is None) != (box_bias is None):
        raise ShapeError("the classifier has one of box_weight and box_bias: give both or none")
    if box is not None and box_bias is not None:
        outputs = classes + (activation == "softmax")
        known = {4, 4 * classes, 4 * outputs}
        if box.ndim != 2 or len(box) not in known or box.shape[1] != d or box_bias.shape != (len(box),):
            raise ShapeError(
                f"box_weight has shape {list(box.shape)} and box_bias {list(box_bias.shape)}: expected [K, {d}] and "
                f"[K] with K one of {', '.join(map(str, sorted(known)))}"
            )
        if len(box) == 4 * outputs and outputs > classes:  # boxes of the background are never used
            own = slice(4, None) if background_first else slice(None, -4)
            classifier = replace(classifier, box_weight=box[own], box_bias=box_bias[own])
    if not background_first:
        return classifier
    bias = None if classifier.bias is None else np.roll(classifier.bias, -1)
    return replace(classifier, weight=np.roll(classifier.weight, -1, axis=0), bias=bias)


def check_agreement(where: str, given: NDArray[np.float32], computed: NDArray[np.float32]) -> None:
    """Raise InputError unless the logits [N, C+1] given are those computed, but for the rounding of float16."""
    largest = max(1.0, float(np.abs(given).max(initial=0)), float(np.abs(computed).max(initial=0)))
    off = np.abs(given - computed)
    if off.max(initial=0) > _AGREEMENT * largest:
        row, column = np.unravel_index(int(off.argmax()), off.shape)
        raise InputError(
            f"{where}: logits are not what the classifier makes of the features (row {row}, column "
            f"{column}: given {given[row, column]:.4g}, computed {computed[row, column]:.4g})",
            hint="background first or last? before softmax or sigmoid? is the feature the last layer's input?",
        )


def matrix(where: str, what: str, array: Any, width: int, n: int | None = None) -> NDArray[np.float32]:
    """``array`` as finite float32 [N, width], or raise ShapeError, FormatError, NonFiniteError."""
    a = np.asarray(array)
    if a.ndim != 2 or a.shape[1] != width or (n is not None and len(a) != n):
        rows = "N" if n is None else n
        raise ShapeError(f"{where}: {what} has shape {list(a.shape)}, expected [{rows}, {width}]")
    return _numbers(where, what, a)


def column(where: str, what: str, array: Any, n: int) -> NDArray[np.float64]:
    """``array`` as finite numbers [N], or raise ShapeError, FormatError, NonFiniteError."""
    a = np.asarray(array)
    if a.shape != (n,):
        raise ShapeError(f"{where}: {what} has shape {list(a.shape)}, expected [{n}]")
    return _numbers(where, what, a).astype(np.float64)


def _numbers(where: str, what: str, a: NDArray[Any]) -> NDArray[np.float32]:
    if a.dtype.kind not in "fiub":
        raise FormatError(f"{where}: {what} holds {a.dtype}, expected numbers")
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(a, np.float32)
    finite = np.isfinite(numbers)
    if not finite.all():
        row = int(np.argmin(finite.reshape(len(numbers), -1).all(axis=1)))
        raise NonFiniteError(f"{where}: {what} of row {row} holds NaN or infinity")
    return numbers


def checked_boxes(where: str, what: str, array: Any, n: int, size: tuple[int, int]) -> Boxes:
    """``array`` as boxes [N, 4] in pixels of an image of ``size`` (height, width), or raise FormatError and as
    ``matrix``."""
    boxes = matrix(where, what, array, 4, n)
    wrong = (boxes[:, 2:] < boxes[:, :2]).any(axis=1) | (np.abs(boxes) > LARGEST_PIXEL).any(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise FormatError(
            f"{where}: {what} of row {row} are {boxes[row].tolist()}",
            hint="boxes are x1, y1, x2, y2 in pixels, not x, y, width, height",
        )
    if n > 1 and min(size) > 8 and np.abs(boxes).max() <= 1.5:
        raise FormatError(
            f"{where} of {size[0]} x {size[1]} pixels: all {what} end at {np.abs(boxes).max():.4g}",
            hint="boxes are in pixels, not in shares of the image",
        )
    return boxes
