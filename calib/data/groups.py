"""Which images belong together: frames of a video, pictures of a scene, a patient or a place."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import InputError, SettingError, UnknownNameError

EXAMPLE = r"for example --group-by video_id, or --group-by 'file_name:^(scene\d+)_'"


def read_groups(rows: list[dict[str, Any]], group_by: str, where: str) -> NDArray[np.int64]:
    """The number of the group of every image record, [I]; ``where`` names the list in errors.

    ``group_by`` is a field of the records, or ``FIELD:REGEX``: then images are together of which the expression finds
    the same text in the field, by its groups in brackets if it has some.

    Raises:
        UnknownNameError: no image has the field. InputError: an image without it, with something else than text or a
            number in it, or with a text in which nothing is found. SettingError: no regular expression.
    """
    field, _, expression = group_by.partition(":")
    pattern = _compiled(expression) if expression else None
    if not any(field in row for row in rows):
        raise UnknownNameError(
            "field of images", field, {key for row in rows for key in row}, hint="" if rows else EXAMPLE
        )
    number: dict[Any, int] = {}
    groups = np.empty(len(rows), np.int64)
    for i, row in enumerate(rows):
        value = row.get(field)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise InputError(
                f"{where}[{i}] has no text or number in '{field}', got {value!r}", hint="each image needs a group"
            )
        groups[i] = number.setdefault(value if pattern is None else _found(pattern, str(value), where, i), len(number))
    return groups


def _compiled(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as e:
        raise SettingError(f"'{expression}' is no regular expression: {e}", hint=EXAMPLE) from None


def _found(pattern: re.Pattern[str], text: str, where: str, i: int) -> tuple[str | None, ...]:
    match = pattern.search(text)
    if match is None:
        raise InputError(
            f"{where}[{i}]: nothing in '{text}' matches {pattern.pattern}", hint="each image needs a group"
        )
    return match.groups() or (match.group(),)
