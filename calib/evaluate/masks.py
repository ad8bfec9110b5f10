"""Masks as run-length codes of pycocotools, from any form that annotation and results files use."""

import re
from collections.abc import Sequence
from typing import Any

from calib.errors import FormatError

RunLengths = dict[str, Any]  # {"size": [height, width], "counts": bytes}

_CODES = re.compile(rb"[0-o]+")  # six bits each, as the characters from 48 on


def run_lengths(
    rows: list[dict[str, Any]], sizes: list[tuple[int, int]], where: str, names: Sequence[int] | None = None
) -> list[RunLengths]:
    """The mask of every row.

    Args:
        rows: with ``segmentation``: polygons [[x, y, x, y, ...], ...], or run lengths, compressed or not.
        sizes: (height, width) of the image of each row.
        where: file and list, named in errors.
        names: numbers of the rows in the file, if they are not all of them.

    Raises:
        FormatError: a row without a mask, with a malformed one, or with one of another size than the image.
    """
    masks = []
    for i, row, size in zip(names or range(len(rows)), rows, sizes, strict=True):
        try:
            masks.append(_run_length(row["segmentation"], *size))
        except KeyError:
            raise FormatError(f"{where}[{i}] has no 'segmentation'", hint="mask AP needs masks; or use bbox") from None
        except (TypeError, ValueError, OverflowError, IndexError, MemoryError) as e:
            raise FormatError(f"{where}[{i}]: malformed 'segmentation': {e}") from e
    return masks


def _run_length(segmentation: Any, height: int, width: int) -> RunLengths:
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError("a polygon is a list of at least three x, y pairs")
        if not segmentation:
            raise ValueError("no polygon")
        return dict(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
    if not isinstance(segmentation, dict) or "counts" not in segmentation or "size" not in segmentation:
        raise ValueError("expected polygons, or an object with 'size' and 'counts'")
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"size {list(segmentation['size'])}, but the image is {[height, width]}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if not all(isinstance(n, int) and n >= 0 for n in counts) or sum(counts) != height * width:
            raise ValueError(f"run lengths must be whole numbers with the sum {height * width}")
        return dict(coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width))
    text = counts.encode("ascii") if isinstance(counts, str) else counts
    if _CODES.sub(b"", text):
        raise ValueError("damaged compressed run lengths")
    mask = {"size": [height, width], "counts": text}
    if int(coco_mask.area(mask)) > height * width:
        raise ValueError("compressed run lengths of another image size")
    return mask
