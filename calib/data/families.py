"""The categories of the procedural set: families of look-alikes.

A family is one shape with one pattern around one base hue. Its members differ by steps of hue and aspect
ratio that are smaller than two spreads of a single member, so siblings overlap: a classifier must weigh them
against each other, and how it does that depends on how often it saw each. Member 0 is the family's frequent
one, members 1 and 2 are equally bright and teach the hue and the aspect step, all others are darker and take
the nine combinations of the two steps. Members are dealt to ranks of frequency round robin over the families,
so that every family runs from frequent to rare.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

from calib.errors import SettingError

SHAPES = (
    "disc",
    "square",
    "triangle",
    "pentagon",
    "star",
    "cross",
    "ring",
    "crescent",
    "dome",
    "arrow",
    "corner",
    "hourglass",
)
PATTERNS = ("plain", "striped", "dotted", "chequered", "rimmed")
MAX_FAMILIES = len(SHAPES) * len(PATTERNS)
MAX_MEMBERS = 21  # 3 bright and 2 x 9 dark ones; a third darkness would be black

_LIGHT_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
_DARK_STEPS = ((-1, -1), (1, 1), (-1, 1), (1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))


@dataclass(frozen=True)
class Look:
    """How the instances of a category look, before each one's own variation.

    ``hue`` is the family's base in turns; ``hue_step``, ``aspect_step`` (-1, 0, 1) and ``dark`` (0, 1, 2)
    count the steps that the settings give a size.
    """

    shape: str
    pattern: str
    hue: float
    dark: int = 0
    hue_step: int = 0
    aspect_step: int = 0


@dataclass(frozen=True)
class Category:
    """``rank`` 0 is the most frequent category; ``category_id`` (1..C) says nothing about frequency."""

    rank: int
    category_id: int
    name: str
    family: int
    look: Look


def _member(k: int, family: int, shape: str, pattern: str, hue: float) -> Look:
    """Look of member ``k``. Families start at different steps, so that no step is always the rarest."""
    if k == 0:
        return Look(shape, pattern, hue)
    if k <= 2:
        hue_step, aspect_step = _LIGHT_STEPS[(family + k - 1) % 4]
        return Look(shape, pattern, hue, 0, hue_step, aspect_step)
    level, place = divmod(k - 3, 9)
    hue_step, aspect_step = (0, 0) if place == 0 else _DARK_STEPS[(family + place - 1) % 8]
    return Look(shape, pattern, hue, 1 + level, hue_step, aspect_step)


def default_families(categories: int) -> int:
    """Families of about twelve members, the size that the demo set has."""
    return min(MAX_FAMILIES, max(1, -(-categories // 12)))


def make_categories(categories: int, families: int, rng: np.random.Generator) -> list[Category]:
    """The categories in order of frequency.

    Raises:
        SettingError: no families, more than ``MAX_FAMILIES``, or more than ``MAX_MEMBERS`` per family.
    """
    if not 1 <= families <= min(MAX_FAMILIES, categories):
        limit = min(MAX_FAMILIES, categories)
        raise SettingError(f"families must lie between 1 and {limit} for {categories} categories, got {families}")
    if -(-categories // families) > MAX_MEMBERS:
        raise SettingError(
            f"{categories} categories in {families} families is more than {MAX_MEMBERS} per family",
            hint=f"give at least {-(-categories // MAX_MEMBERS)} families; no more than "
            f"{MAX_FAMILIES * MAX_MEMBERS} categories can be told apart",
        )
    kinds = list(product(SHAPES, PATTERNS))
    chosen = [kinds[i] for i in rng.permutation(len(kinds))[:families]]
    hues = rng.permutation(families) / families
    ids = rng.permutation(categories) + 1
    numbers = [rng.permutation(-(-categories // families)) + 1 for _ in range(families)]
    out = []
    for rank in range(categories):
        k, family = divmod(rank, families)
        shape, pattern = chosen[family]
        out.append(
            Category(
                rank=rank,
                category_id=int(ids[rank]),
                name=f"{pattern} {shape} {numbers[family][k]:02d}",
                family=family,
                look=_member(k, family, shape, pattern, float(hues[family])),
            )
        )
    return out
