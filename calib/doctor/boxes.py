"""Boxes of the annotation file, by their numbers alone: outside their pictures, empty, double, of another format.

``bbox`` is x, y, width, height in pixels of the picture. Another format is reported where its reading puts nearly all
boxes into their pictures with sides above 0, and the plain reading does not. Letter: N boxes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.annotations import Floats, Integers, beyond
from calib.doctor.findings import EXAMPLES, Finding, first, share
from calib.doctor.reading import Split

LEAST = 20  # boxes, below which no format is reported
BEYOND, WITHIN = (
    0.05,
    0.005,
)  # shares of boxes beyond their pictures: of a wrong reading at least, of a right one at most
MANY_BEYOND = 0.01
SLACK = 0.01  # of a picture's side, and a pixel: by so much a box may reach beyond it
UNIT = 1.001  # the largest normalised number, with rounding
CORNER = 0.75  # of both sides: boxes that never reach further are of a smaller picture
MOST_SCALED = 100

Reading = Callable[[Floats, Floats], Floats]  # bbox [N, 4], width and height [N, 2] -> xyxy [N, 4] in pixels


@dataclass(frozen=True)
class Format:
    """What the four numbers of ``bbox`` are taken for."""

    code: str
    meaning: str
    corners: Reading
    edit: str  # Python that makes b the x, y, width, height of pixels


def _plain(box: Floats) -> Floats:
    return np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1)


def _centre(box: Floats) -> Floats:
    return np.concatenate([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], axis=1)


def _twice(size: Floats) -> Floats:
    return np.concatenate([size, size], axis=1)


AS_IS = Format("as-is", "x, y, width, height", lambda b, s: _plain(b), "")
_SIZED = "w, h = image['width'], image['height']; "
FORMATS = (
    Format("boxes-xyxy", "x1, y1, x2, y2", lambda b, s: b, "b = [b[0], b[1], b[2] - b[0], b[3] - b[1]]"),
    Format(
        "boxes-centre",
        "centre x, centre y, width, height",
        lambda b, s: _centre(b),
        "b = [b[0] - b[2] / 2, b[1] - b[3] / 2, b[2], b[3]]",
    ),
    Format("boxes-yx", "y, x, height, width", lambda b, s: _plain(b[:, [1, 0, 3, 2]]), "b = [b[1], b[0], b[3], b[2]]"),
    Format(
        "boxes-yxyx",
        "y1, x1, y2, x2",
        lambda b, s: b[:, [1, 0, 3, 2]],
        "b = [b[1], b[0], b[3] - b[1], b[2] - b[0]]",
    ),
)
XYXY, YXYX = FORMATS[0], FORMATS[3]
NORMALISED = (
    Format(
        "boxes-normalised",
        "x, y, width, height as shares of the picture",
        lambda b, s: _plain(b) * _twice(s),
        _SIZED + "b = [b[0] * w, b[1] * h, b[2] * w, b[3] * h]",
    ),
    Format(
        "boxes-normalised",
        "x1, y1, x2, y2 as shares of the picture",
        lambda b, s: b * _twice(s),
        _SIZED + "b = [b[0] * w, b[1] * h, (b[2] - b[0]) * w, (b[3] - b[1]) * h]",
    ),
    Format(
        "boxes-normalised",
        "centre x, centre y, width, height as shares of the picture",
        lambda b, s: _centre(b) * _twice(s),
        _SIZED + "b = [(b[0] - b[2] / 2) * w, (b[1] - b[3] / 2) * h, b[2] * w, b[3] * h]",
    ),
)


def scaled(factor: float) -> Format:
    """Boxes of pictures of another size: pixels are ``factor`` times theirs."""
    return Format(
        "boxes-scale",
        f"x, y, width, height of pictures {1 / factor:.3g} times as large",
        lambda b, s: _plain(b) * factor,
        f"b = [x * {factor:.4g} for x in b]",
    )


def edit(form: Format) -> str:
    """What to do about boxes of ``form``."""
    return f"write them as x, y, width, height in pixels, for every annotation: {form.edit}"


def misfits(corners: Floats, size: Floats) -> NDArray[np.bool_]:
    """Boxes [N, 4] xyxy without area, or beyond pictures of ``size`` [N, 2] (width, height; 0 where unknown). [N]"""
    limit = _twice(size) + 1 + SLACK * _twice(size)
    outside = (corners < -1 - SLACK * _twice(size)) | ((corners > limit) & (_twice(size) > 0))
    empty = (corners[:, 2:] <= corners[:, :2]).any(axis=1)
    return np.asarray(outside.any(axis=1) | empty)


def check_boxes(split: Split, size: Integers) -> tuple[list[Finding], Format]:
    """Findings, and the format that the boxes are seen to have; ``size`` [I, 2] is height and width, 0: unknown."""
    read = split.read
    if not len(read.id):
        return [], AS_IS
    form = format_of_numbers(read.box, size[read.image, ::-1].astype(np.float64))
    found = [_format(split, form, size)] if form is not AS_IS else [*_beyond(split, size), *_in_a_corner(split, size)]
    return [*found, *_empty(split), *_twice_there(split)], form


def format_of_numbers(box: Floats, size: Floats) -> Format:
    """What the numbers alone tell of the format; ``AS_IS`` in doubt. [N, 4], [N, 2] width and height, 0: unknown."""
    if float(np.abs(box).max(initial=0)) <= UNIT:
        return _best(NORMALISED, box, np.where(size > 0, size, 1000.0)) or NORMALISED[0]
    known = (size > 0).all(axis=1) & (box[:, 2:] > 0).all(axis=1)
    box, size = box[known], size[known]
    if len(box) < LEAST or misfits(AS_IS.corners(box, size), size).mean() < BEYOND:
        return AS_IS
    q = np.quantile((box[:, :2] + box[:, 2:]) / size, 0.99, axis=0)
    larger = [scaled(float(1 / q.max()))] if q.min() > 1.2 and q.max() < 1.1 * q.min() else []
    return _best((*FORMATS, *larger), box, size) or AS_IS


def _best(formats: Iterable[Format], box: Floats, size: Floats) -> Format | None:
    """The reading that fits best, if it fits; the first of equals."""
    misfit = [(float(misfits(f.corners(box, size), size).mean()), f) for f in formats]
    least, form = min(misfit, key=lambda pair: pair[0])
    return form if least <= WITHIN else None


def _format(split: Split, form: Format, size: Integers) -> Finding:
    read = split.read
    own = size[read.image, ::-1].astype(np.float64)
    n = int(misfits(AS_IS.corners(read.box, own), own).sum())
    numbers = read.box.tolist()[:EXAMPLES]
    text = f"bbox holds {form.meaning}: so read, boxes lie in their pictures; read as x, y, width, height, "
    text += f"{share(n, len(read.box))} do not"
    if form.code == "boxes-normalised":
        text = f"no number of {len(read.box):,} boxes is above 1: bbox holds {form.meaning}"
    if form is XYXY and misfits(YXYX.corners(read.box, own), own).mean() <= WITHIN:
        text += "; y1, x1, y2, x2 would fit as well, which numbers do not tell apart here: --detector does"
    details = {"boxes": len(read.box), "misfits": n, "meaning": form.meaning}
    return Finding(form.code, "error", split.where, text, edit(form), tuple(map(str, numbers)), details)


def _beyond(split: Split, size: Integers) -> list[Finding]:
    read = split.read
    n = beyond(read.box, read.image, size)
    if not n:
        return []
    within = size[read.image, ::-1].astype(np.float64)
    low, high = read.box[:, :2], read.box[:, :2] + read.box[:, 2:]
    outside = (within > 0).all(axis=1) & ((low >= within) | (high <= 0)).any(axis=1)
    wrong = np.flatnonzero((within > 0).all(axis=1) & ((high >= within + 1) | (low <= -1)).any(axis=1))
    examples = tuple(
        f"annotation {read.id[k]}: {read.box[k].tolist()} in {size[read.image[k], 1]} x {size[read.image[k], 0]}"
        for k in wrong[:EXAMPLES]
    )
    part = n / len(read.id)
    severity = "error" if part > 0.5 else "warning" if part > MANY_BEYOND or outside.any() else "note"
    text = f"{share(n, len(read.id))} boxes reach a pixel or more beyond their pictures, {int(outside.sum())} lie "
    text += f"outside altogether: {first(examples)}"
    remedy = (
        "cut boxes at the border, leave out those outside; is bbox x, y, width, height in pixels of these pictures?"
    )
    details = {"boxes": n, "outside": int(outside.sum()), "of": len(read.id)}
    return [Finding("boxes-beyond", severity, split.where, text, remedy, examples, details)]


def _in_a_corner(split: Split, size: Integers) -> list[Finding]:
    """Boxes that all lie near the origin are of smaller pictures, as far as numbers can tell."""
    read = split.read
    known = (size[read.image] > 0).all(axis=1)
    factor = corner(read.box[known], size[read.image[known], ::-1].astype(np.float64))
    if factor is None:
        return []
    text = f"no box of {len(read.id):,} reaches further than {100 / factor:.0f} % of its picture from the left or the "
    text += "top, while they do touch these: were they made on smaller pictures?"
    remedy = f"if so: {edit(scaled(factor))}; with --detector the detector's own proposals tell"
    return [Finding("boxes-in-a-corner", "warning", split.where, text, remedy, (), {"factor": factor})]


def corner(box: Floats, size: Floats) -> float | None:
    """By how much boxes would have to grow to fill their pictures, if they all lie in the upper left corner."""
    if len(box) < MOST_SCALED:
        return None
    low, high = box[:, :2] / size, (box[:, :2] + box[:, 2:]) / size
    far, near = np.quantile(high, 0.995, axis=0), np.quantile(low, 0.005, axis=0)
    if (far > CORNER).any() or (near > 0.25 * (1 - far)).any() or far.max() > 1.1 * far.min():
        return None
    return float(1 / far.max())


def _empty(split: Split) -> list[Finding]:
    read = split.read
    empty = np.flatnonzero((read.box[:, 2:] <= 0).any(axis=1))
    if not len(empty):
        return []
    examples = tuple(f"annotation {read.id[k]}: {read.box[k].tolist()}" for k in empty[:EXAMPLES])
    text = f"{share(len(empty), len(read.id))} boxes have no area: {first(examples)}; nothing can be matched with them"
    details = {"boxes": len(empty), "of": len(read.id)}
    return [Finding("boxes-empty", "warning", split.where, text, "take them out", examples, details)]


def _twice_there(split: Split) -> list[Finding]:
    """The same box twice in an image: of one category, or of two."""
    read, found = split.read, []
    rows = np.column_stack([read.image, read.box])[~read.crowd]
    category, ids = read.category[~read.crowd], read.id[~read.crowd]
    _, place = np.unique(rows, axis=0, return_inverse=True)
    place = place.reshape(-1)
    order = np.lexsort((category, place))
    same_place = place[order][1:] == place[order][:-1]
    same_class = category[order][1:] == category[order][:-1]
    for code, severity, at, what, remedy in (
        (
            "boxes-duplicate",
            "warning",
            same_place & same_class,
            "stand there once more, in the same image, of the same category",
            "take the second ones out: a detector finds an object once, the other counts as missed",
        ),
        (
            "boxes-of-two-categories",
            "note",
            same_place & ~same_class,
            "are those of another annotation of another category",
            "nothing, if objects do have two categories here",
        ),
    ):
        n = int(at.sum())
        if n:
            pairs = np.flatnonzero(at)[:EXAMPLES]
            examples = tuple(f"annotations {ids[order[k]]} and {ids[order[k + 1]]}" for k in pairs)
            text = f"{share(n, len(read.id))} boxes {what}: {first(examples)}"
            found.append(Finding(code, severity, split.where, text, remedy, examples, {"boxes": n, "of": len(read.id)}))
    return found
