"""Masks as run-length codes of pycocotools, from any form that annotation and results files use.

The C code of pycocotools trusts what it is given: runs that do not add up to the picture are compared for ever, codes
and coordinates out of range are read and written out of bounds. So every number is checked here before.
Source of the code: maskApi.c, ``rleFrString`` and ``rleFrPoly`` of pycocotools 2.0.11.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.documents import values
from calib.errors import FormatError

RunLengths = dict[str, Any]  # {"size": [height, width], "counts": bytes}
Size = tuple[int, int]  # height, width

# A run is coded as its difference to the last but one, five bits a character, the least first, the highest as the sign.
# In more than six characters pycocotools shifts bits out of its 32-bit integers.
_CODE_LENGTH = 6
MOST_PIXELS = 1 << 5 * _CODE_LENGTH - 1  # of a picture: every difference fits
FARTHEST = 100_000  # pixels of a coordinate outside its picture
LONGEST_OUTLINE = 4_000_000  # pixels around the polygons of one mask; pycocotools takes 80 bytes for each
_BYTES_AT_ONCE = 1 << 20  # of codes; a few arrays of 64-bit integers are made of them


def segmentations(rows: Sequence[dict[str, Any]], where: str) -> list[Any]:
    """What is given as the mask of every row; ``where`` names file and list in errors.

    Raises:
        FormatError: a row without a mask.
    """
    try:
        return values(rows, "segmentation", where)
    except FormatError as e:
        e.hint = "mask AP needs masks; or evaluate bbox"
        raise


def run_lengths(given: Sequence[Any], sizes: Sequence[Size], where: str) -> list[RunLengths]:
    """Every mask, in order.

    Args:
        given: polygons [[x, y, x, y, ...], ...], or run lengths, compressed or not.
        sizes: (height, width) of the image of each.
        where: file and list, named in errors.

    Raises:
        FormatError: a malformed mask, or one of another size than the image.
    """
    counts: list[bytes | list[Any]] = []
    for i, (segmentation, size) in enumerate(zip(given, sizes, strict=True)):
        try:
            counts.append(_checked(segmentation, *size))
        except (TypeError, ValueError, OverflowError) as e:
            raise FormatError(f"{where}[{i}]: malformed 'segmentation': {e}") from e
    for rows in _parts(counts):
        codes, pixels = [counts[i] for i in rows], np.array([sizes[i][0] * sizes[i][1] for i in rows], np.int64)
        found = _first_bad(codes, pixels)  # type: ignore[arg-type]
        if found is not None:
            raise FormatError(
                f"{where}[{rows[found[0]]}]: malformed 'segmentation': {found[1]}",
                hint="the run lengths were cut, changed, or made at another image size: write them again",
            )
    return [_coded(c, *size) for c, size in zip(counts, sizes, strict=True)]


def pixels(code: RunLengths) -> NDArray[np.uint8]:
    """0 and 1 of a mask of ``run_lengths``, [height, width]."""
    digit = np.frombuffer(code["counts"], np.uint8) - np.uint8(48)
    last = np.flatnonzero(digit < 32)
    run, _ = _runs(digit, last, np.diff(last, prepend=-1), np.array([len(last)]))
    values = np.resize(np.array([0, 1], np.uint8), len(run))
    height, width = code["size"]
    return np.repeat(values, run).reshape(width, height).T


def _checked(segmentation: Any, height: int, width: int) -> bytes | list[Any]:
    """Compressed run lengths, which are still to be checked; or checked run lengths or polygons."""
    if not (height >= 1 and width >= 1 and height * width < MOST_PIXELS):
        raise ValueError(f"masks are of pictures of 1 to {MOST_PIXELS - 1} pixels, the image is {height} x {width}")
    if isinstance(segmentation, list):
        _check_polygons(segmentation, height, width)
        return segmentation
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        raise ValueError("expected polygons, or an object with 'size' and 'counts'")
    size, counts = segmentation["size"], segmentation["counts"]
    if not isinstance(size, (list, tuple)) or list(size) != [height, width] or not _are_numbers(size):
        raise ValueError(f"size {size!r}, but the image is {[height, width]}")
    if isinstance(counts, list):
        if not all(type(n) is int and n >= 0 for n in counts) or sum(counts) != height * width:
            raise ValueError(f"run lengths must be whole numbers with the sum {height * width}")
        return counts
    if not isinstance(counts, (str, bytes)):
        raise ValueError(f"run lengths are text or a list of whole numbers, got {type(counts).__name__}")
    return counts.encode() if isinstance(counts, str) else counts


def _are_numbers(values: Any) -> bool:
    kinds = set(map(type, values))
    return kinds <= {int, float} or all(issubclass(k, (int, float, np.number)) and k is not bool for k in kinds)


def _check_polygons(polygons: list[Any], height: int, width: int) -> None:
    if not polygons:
        raise ValueError("no polygon")
    outline = 0.0
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not _are_numbers(polygon):
            raise ValueError("a polygon is a list of at least three x, y pairs of numbers")
        xy = np.array(polygon, np.float64)
        low, high = xy.min(), xy.max()
        if not (low >= -FARTHEST and high <= max(height, width) + FARTHEST):  # nor NaN
            bad = polygon[int(np.argmax(~(np.abs(xy - max(height, width) / 2) <= FARTHEST + max(height, width) / 2)))]
            raise ValueError(f"coordinate {bad!r} is far outside the image of {height} x {width} pixels")
        if len(polygon) * (high - low) > LONGEST_OUTLINE / len(polygons):  # else it is shorter
            points = xy.reshape(-1, 2)
            outline += float(np.abs(points - np.roll(points, -1, axis=0)).max(axis=1).sum())
    if outline > LONGEST_OUTLINE:
        raise ValueError(f"its polygons are {outline:.0f} pixels around, at most {LONGEST_OUTLINE} are read")


def _parts(counts: Sequence[Any]) -> Iterator[list[int]]:
    """Rows with compressed run lengths, a few megabytes of them at a time."""
    rows: list[int] = []
    size = 0
    for i, code in enumerate(counts):
        if isinstance(code, bytes):
            rows.append(i)
            size += len(code)
        if size > _BYTES_AT_ONCE:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _first_bad(codes: Sequence[bytes], pixels: NDArray[np.int64]) -> tuple[int, str] | None:
    """Index of compressed run lengths that are wrong, and how; None if all fill their ``pixels`` [K] exactly."""
    size = np.array([len(code) for code in codes])
    if not size.all():
        return int(np.argmin(size)), "no run lengths"
    stop = np.cumsum(size)
    digit = np.frombuffer(b"".join(codes), np.uint8) - np.uint8(48)  # characters before "0" become large
    last = np.flatnonzero(digit < 32)  # of every code; those before have bit 32
    length = np.diff(last, prepend=-1)
    for bad, what in (
        (np.flatnonzero(digit > 63), "a character that they do not have"),
        (stop[digit[stop - 1] >= 32] - 1, "the last one is cut"),
        (last[length > _CODE_LENGTH], f"a run of {MOST_PIXELS} pixels or more"),
    ):
        if len(bad):
            return int(np.searchsorted(stop, bad[0], side="right")), f"damaged compressed run lengths: {what}"
    run, first = _runs(digit, last, length, np.diff(np.searchsorted(last, stop), prepend=0))
    if (negative := np.minimum.reduceat(run, first) < 0).any():
        return int(np.argmax(negative)), "damaged compressed run lengths: a run is negative"
    total = np.add.reduceat(run, first)
    if (other := total != pixels).any():
        k = int(np.argmax(other))
        return k, f"its compressed run lengths have the sum {total[k]}, the image has {pixels[k]} pixels"
    return None


def _runs(
    digit: NDArray[np.uint8], last: NDArray[np.int64], length: NDArray[np.int64], n: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Runs of K masks and where those of each begin, from their codes. [characters], [R], [R], [K] -> [2 P], [K]

    A mask with an odd number of runs has one of no pixels at its end, so that those of one parity are a column.
    """
    value = np.zeros(len(last), np.int64)
    begin = last - length + 1
    value += digit[begin] & 31
    for k in range(1, int(length.max())):
        more = np.flatnonzero(length > k)
        value[more] += (digit[begin[more] + k] & 31).astype(np.int64) << 5 * k
    value -= (digit[last] >> 4 & 1).astype(np.int64) << 5 * length
    pairs = (n + 1) // 2
    row = np.cumsum(pairs) - pairs
    difference = np.zeros((int(pairs.sum()), 2), np.int64)
    difference.reshape(-1)[np.arange(len(value)) + np.repeat(2 * row - (np.cumsum(n) - n), n)] = value
    run = np.cumsum(difference, axis=0)
    # Of the first two nothing was subtracted, nor was the first from the third.
    before = run[row] - difference[row] * (0, 1)
    run -= np.repeat(before, pairs, axis=0)
    run[row, 0] = difference[row, 0]
    run[row + pairs - 1, 1] *= 1 - n % 2
    return run.reshape(-1), 2 * row


def _coded(counts: bytes | list[Any], height: int, width: int) -> RunLengths:
    """As pycocotools wants them. Checked counts or polygons only."""
    from pycocotools import mask as coco_mask

    if isinstance(counts, bytes):
        return {"size": [height, width], "counts": counts}
    if isinstance(counts[0], list):
        return dict(coco_mask.merge(coco_mask.frPyObjects(counts, height, width)))
    return dict(coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width))
