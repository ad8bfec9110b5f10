"""Parsed annotation and results documents (JSON) into typed columns; errors name the file and the row."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import FormatError, NonFiniteError


def records(document: Any, key: str, path: Path) -> list[dict[str, Any]]:
    """The list of objects under ``key`` of a ground-truth document.

    Raises:
        FormatError: no such key, or not a list of objects.
    """
    rows = document.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise FormatError(
            f"{path}: expected a list of objects under '{key}', got {kind_of(rows)}",
            hint="a LVIS ground-truth file holds images, categories and annotations",
        )
    return rows


def kind_of(value: Any) -> str:
    """What a JSON value is, for errors: of a list, what the first entry is that is no object."""
    if not isinstance(value, list):
        return "nothing" if value is None else type(value).__name__
    odd = next((entry for entry in value if not isinstance(entry, dict)), None)
    return f"a list with {type(odd).__name__} in it"


def values(rows: Sequence[dict[str, Any]], key: str, where: str) -> list[Any]:
    """The value of ``key`` in every row; ``where`` names file and list in errors.

    Raises:
        FormatError: a row without the key.
    """
    try:
        return [row[key] for row in rows]
    except KeyError:
        row = next(i for i, row in enumerate(rows) if key not in row)
        raise FormatError(f"{where}[{row}] has no '{key}'") from None


def integers(rows: Sequence[dict[str, Any]], key: str, where: str) -> NDArray[np.int64]:
    """A column of whole numbers, int64 [N]. Whole floats (3.0, as some writers give ids) are taken.

    Raises:
        FormatError: a row without the key, or with another kind of value.
    """
    column = values(rows, key, where)
    if all(type(value) is int and abs(value) < 2**63 for value in column):
        return np.array(column, np.int64)
    row = next((i for i, value in enumerate(column) if not _is_whole(value)), None)
    if row is None:
        return np.array([int(value) for value in column], np.int64)
    raise FormatError(f"{where}[{row}]: '{key}' must be a whole number below 2^63, got {column[row]!r}")


def _is_whole(value: Any) -> bool:
    if isinstance(value, float):
        return value.is_integer() and abs(value) < 2**53  # beyond that it may be another number
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def unique(ids: NDArray[np.int64], where: str) -> NDArray[np.int64]:
    """``ids`` [N], if no two are the same.

    Raises:
        FormatError: names an id that occurs more than once.
    """
    found, count = np.unique(ids, return_counts=True)
    if len(found) < len(ids):
        raise FormatError(
            f"{where}: id {found[np.argmax(count > 1)]} occurs {count.max()} times, ids must be unique",
            hint="were two splits joined without renumbering?",
        )
    return ids


def numbers(rows: Sequence[dict[str, Any]], key: str, where: str, width: int = 1) -> NDArray[np.float64]:
    """A column of finite numbers, float64 [N], or [N, width] when ``width`` > 1.

    Raises:
        FormatError: a row without the key, or with something else than ``width`` numbers.
        NonFiniteError: NaN or infinity.
    """
    column = values(rows, key, where)
    shape = (len(column), width)[: 1 if width == 1 else 2]
    if not column:
        return np.zeros(shape)
    try:
        array = np.array(column)
    except ValueError:  # lists of unequal lengths
        array = np.array(None)
    # numpy takes true for 1 where it stands among numbers.
    items = column if width == 1 else chain.from_iterable(column) if array.shape == shape else ()
    if array.shape != shape or array.dtype.kind not in "if" or bool in set(map(type, items)):
        row = next(i for i, value in enumerate(column) if not _is_numbers(value, width))
        expected = "a number" if width == 1 else f"a list of {width} numbers"
        raise FormatError(f"{where}[{row}]: '{key}' must be {expected}, got {column[row]!r}")
    check_finite(array, f"'{key}'", where)
    return array.astype(np.float64)


def _is_numbers(value: Any, width: int) -> bool:
    items = [value] if width == 1 else value
    if not isinstance(items, list) or len(items) != width:
        return False
    # Whole numbers beyond 64 bits would silently become Python objects in an array.
    return all(
        isinstance(x, float) or (isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**63) for x in items
    )


def check_finite(array: NDArray[Any], what: str, where: str) -> None:
    """Refuse NaN and infinity in ``array`` [N] or [N, k].

    Raises:
        NonFiniteError: names the first bad row.
    """
    finite = np.isfinite(array)
    if not finite.all():
        row = int(np.argmin(finite.reshape(len(array), -1).all(axis=1)))
        raise NonFiniteError(
            f"{where}[{row}]: {what} must be finite, got {array[row].tolist()}",
            hint="a detector that gives NaN has diverged; find where the numbers stop being finite",
        )
