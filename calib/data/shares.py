"""Parts of a data set: their names, and the share of the images that each is to have."""

import re
from collections.abc import Mapping
from fractions import Fraction
from math import isfinite

from calib.errors import SettingError

Share = float | Fraction
Shares = Mapping[str, Share]

EXAMPLE = "for example tune=0.4,test=0.6 or a=1/3,b=1/3,c=1/3"
_NUMBER = re.compile(r"\d{0,9}\.?\d{1,17}|\d{1,9}/\d{1,9}")
_NAME = re.compile(r"\w[\w.-]{0,99}")
_SCALE = 10**6  # shares are counted in millionths: sums are exact, equal shares stay equal
_ROUNDING = Fraction(1, 1000)  # of one share: 0.333 is a third


def parse_shares(text: str) -> dict[str, Fraction]:
    """``tune=0.4,test=0.6``, or with fractions such as ``1/3``.

    Raises:
        SettingError: not of this form, a name that stands twice, or as ``check_shares``.
    """
    shares: dict[str, Fraction] = {}
    for entry in text.split(","):
        name, equals, number = (piece.strip() for piece in entry.partition("="))
        if not equals:
            raise SettingError(f"'{entry.strip()}' is no NAME=SHARE", hint=EXAMPLE)
        if name in shares:
            raise SettingError(f"part '{name}' is named twice", hint=EXAMPLE)
        shares[name] = _parse_share(name, number)
    check_shares(shares)
    return shares


def _parse_share(name: str, number: str) -> Fraction:
    try:
        if _NUMBER.fullmatch(number):
            return Fraction(number)
    except ZeroDivisionError:
        pass
    raise SettingError(f"the share of '{name}' is '{number}', expected a number between 0 and 1", hint=EXAMPLE)


def fold_shares(folds: int) -> dict[str, Fraction]:
    """``fold0``, ``fold1``, ... of equal size.

    Raises:
        SettingError: fewer than two folds.
    """
    if folds < 2:
        raise SettingError(f"{folds} folds: expected at least 2")
    return {f"fold{k}": Fraction(1, folds) for k in range(folds)}


def check_shares(shares: Shares) -> None:
    """
    Raises:
        SettingError: fewer than two parts, names that make no file names or differ in case only, shares of which one is
            not above 0, or that do not sum to 1 (thousandths of each are taken for rounding).
    """
    if len(shares) < 2:
        raise SettingError(f"{len(shares)} parts: expected at least 2", hint=EXAMPLE)
    for name, share in shares.items():
        if not _NAME.fullmatch(name):
            raise SettingError(
                f"'{name}' is no name of a part: it becomes the name of a file", hint="letters, digits, _, . and -"
            )
        if not isfinite(share) or share * _SCALE < 1:
            raise SettingError(f"the share of '{name}' is {float(share)}, expected a number above 0", hint=EXAMPLE)
    # File systems that know no case would write both to one file.
    if len({name.casefold() for name in shares}) < len(shares):
        raise SettingError(f"names of parts differ in case only: {', '.join(shares)}")
    total = sum((Fraction(share) for share in shares.values()), Fraction())
    if abs(total - 1) > _ROUNDING * len(shares):
        raise SettingError(f"shares sum to {float(total):g}, expected 1", hint=EXAMPLE)


def weights(shares: Shares) -> list[int]:
    """Whole numbers that are to each other as the shares."""
    return [round(share * _SCALE) for share in shares.values()]


def sizes(weight: list[int], images: int) -> list[int]:
    """How many of ``images`` each part is to have, by largest remainders, at least one. [P] -> [P]

    ``images`` must be no fewer than the parts.
    """
    total = sum(weight)
    size = [images * w // total for w in weight]
    by_remainder = sorted(range(len(weight)), key=lambda j: -(images * weight[j] % total))
    for j in by_remainder[: images - sum(size)]:
        size[j] += 1
    while 0 in size:
        size[size.index(max(size))] -= 1
        size[size.index(0)] += 1
    return size
