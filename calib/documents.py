"""Parsed annotation and results documents (JSON) into typed columns; errors name the file and the row."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from calib.errors import FormatError, NonFiniteError, is_unicode


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


def encoded(document: Any, source: Path) -> bytes:
    """``document``, made of what ``source`` holds, as JSON.

    Raises:
        FormatError: it holds what JSON cannot: halves of surrogate pairs, integers beyond 64 bits.
    """
    try:
        return orjson.dumps(document)
    except TypeError as e:
        raise FormatError(f"{source} holds what JSON cannot: {e}", hint="write it again from its source") from e


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


def given(rows: Sequence[dict[str, Any]], key: str, where: str) -> list[Any] | None:
    """The value of ``key`` in every row; None if no row has one, null counting as none.

    Raises:
        FormatError: some rows have one and others have none.
    """
    column = [row.get(key) for row in rows]
    if None not in column:
        return column or None
    if any(value is not None for value in column):
        raise FormatError(f"{where}[{column.index(None)}] has no '{key}'")
    return None


def integers(rows: Sequence[dict[str, Any]], key: str, where: str) -> NDArray[np.int64]:
    """A column of whole numbers, int64 [N]; raises as ``values`` and ``whole_numbers``."""
    return whole_numbers(values(rows, key, where), key, where)


def whole_numbers(column: list[Any], key: str, where: str) -> NDArray[np.int64]:
    """``column`` as int64 [N]. Whole floats (3.0, as some writers give ids) are taken.

    Raises:
        FormatError: another kind of value.
    """
    if set(map(type, column)) <= {int}:
        try:
            return np.array(column, np.int64)
        except OverflowError:
            pass  # the row is named below
    row = next((i for i, value in enumerate(column) if not _is_whole(value)), None)
    if row is None:
        return np.array([int(value) for value in column], np.int64)
    raise FormatError(f"{where}[{row}]: '{key}' must be a whole number below 2^63, got {column[row]!r}")


def _is_whole(value: Any) -> bool:
    if isinstance(value, float):
        return value.is_integer() and abs(value) < 2**53  # beyond that it may be another number
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def flags(rows: Sequence[dict[str, Any]], key: str, where: str) -> NDArray[np.bool_]:
    """A column of yes and no, bool [N]: true, 1, 1.0; false, 0, 0.0, null or no key.

    Raises:
        FormatError: another value; text, for one, of which Python takes "0" and "false" for true.
    """
    column = [row.get(key) for row in rows]
    try:
        is_known = set(column) <= {0, 1, None}
    except TypeError:  # lists and objects have no hash
        is_known = False
    if not is_known:
        row = next(i for i, value in enumerate(column) if not _is_flag(value))
        raise FormatError(f"{where}[{row}]: '{key}' must be 0 or 1, got {column[row]!r}")
    return np.fromiter(map(bool, column), np.bool_, len(column))


def _is_flag(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and value in (0, 1))


def texts(rows: Sequence[dict[str, Any]], key: str, where: str) -> list[str | None]:
    """A column of text, None where it is null or the key is absent.

    Raises:
        FormatError: another kind of value, or text that no file can hold: half of a surrogate pair, which stands for a
            byte that is no UTF-8 where Python read the name of a file.
    """
    column = [row.get(key) for row in rows]
    row = next((i for i, value in enumerate(column) if not isinstance(value, str | None)), None)
    if row is not None:
        raise FormatError(f"{where}[{row}]: '{key}' must be text, got {column[row]!r}")
    if not is_unicode("".join(filter(None, column))):
        row = next(i for i, value in enumerate(column) if value and not is_unicode(value))
        raise FormatError(
            f"{where}[{row}]: '{key}' is no Unicode text: {column[row]!r}",
            hint="write names in UTF-8, whole characters",
        )
    return column


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
    """A column of finite numbers, float64 [N], or [N, width] when ``width`` > 1; raises as ``values`` and ``reals``."""
    return reals(values(rows, key, where), key, where, width)


def reals(column: list[Any], key: str, where: str, width: int = 1) -> NDArray[np.float64]:
    """``column`` of numbers, or of lists of ``width`` numbers, as float64 [N] or [N, width].

    Raises:
        FormatError: something else than ``width`` numbers. NonFiniteError: NaN or infinity.
    """
    shape = (len(column), width)[: 1 if width == 1 else 2]
    if not column:
        return np.zeros(shape)
    array = _plain(column, shape)
    if array is None:
        row = next((i for i, value in enumerate(column) if not _is_numbers(value, width)), None)
        if row is not None:
            expected = "a number" if width == 1 else f"a list of {width} numbers"
            raise FormatError(f"{where}[{row}]: '{key}' must be {expected}, got {column[row]!r}")
        array = np.array(column, np.float64)
    check_finite(array, f"'{key}'", where)
    return array


def _plain(column: list[Any], shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    """Python's own numbers as an array of ``shape``, in half the time of ``np.array``; None if there is another."""
    if len(shape) == 2:
        if set(map(type, column)) != {list} or set(map(len, column)) != {shape[1]}:
            return None
        column = list(chain.from_iterable(column))
    kinds = set(map(type, column))
    if not kinds <= {int, float}:
        return None
    try:
        array = np.fromiter(column, np.float64, len(column))
    except OverflowError:
        return None
    # Whole numbers beyond 64 bits are damage.
    return None if int in kinds and (np.abs(array) >= 2.0**63).any() else array.reshape(shape)


def _is_numbers(value: Any, width: int) -> bool:
    items = [value] if width == 1 else value
    if not isinstance(items, list | tuple | np.ndarray) or len(items) != width:
        return False
    return all(
        isinstance(x, float | np.floating | np.integer)
        or (isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**63)
        for x in items
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
            hint="find where the numbers stop being finite, in the detector or in what wrote the file",
        )
