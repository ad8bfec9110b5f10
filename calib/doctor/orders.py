"""In which order the classes of a detector may stand to the categories of a json, and which order it is.

A mapping gives every category, in ascending id, the class that should be it. The plain one is what ``calib extract``
takes. The others: other orders of the categories (by id, of the file, by name, by the detector's own names), all of
them one place further or back (background counted in, or last where it should be first), one class more or less
somewhere in the middle, class k for category id k, and any permutation. ``agreement`` says when one of them holds.

Letters: C categories, K foreground classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from calib.annotations import CategoryRows
from calib.doctor.agreement import (
    HALF,
    MOSTLY,
    NONE,
    Comparison,
    Integers,
    Seen,
    assigned,
    compare,
    expected,
    fitted,
)

NEARLY = 0.97  # of the best kappa: so near, the simpler mapping is it
BITS = 30  # of evidence that classes were exchanged: the chance of 2^-30 in each of a million pairs
_BACKGROUND = ("background", "__background__", "bg", "no object", "no-object", "none")
_UNUSED = ("", "n/a")


@dataclass(frozen=True)
class Mapping:
    """``class_of`` [C]: the class of every category, ``NONE`` where it has none. ``code``: of the finding that it
    holds; ``meaning``: what it is; ``part``: of ``Comparison.is_better``."""

    code: str
    meaning: str
    class_of: Integers
    part: float = HALF
    at: int | None = None  # the first class that moved


def mappings(rows: CategoryRows, plain: Integers, classes: int, names: Sequence[str]) -> list[Mapping]:
    """All but permutations, simple ones first. [C] is the plain one."""
    known = list(_orders(rows, classes, names))
    own = Mapping("classes-shifted", "the order that calib takes", plain)
    found = known + [_moved(m, d, classes) for m in (own, *known) for d in (1, -1)]
    place = np.argsort(np.argsort(np.where(plain < 0, classes, plain)))  # of every category in the plain order
    for at in range(1, len(plain)):
        found += [_inserted(plain, place, at, classes), _left_out(plain, place, at)]
    return [m for m in found if not np.array_equal(m.class_of, plain)]


def _orders(rows: CategoryRows, classes: int, names: Sequence[str]) -> Iterator[Mapping]:
    ids, c = rows.id, len(rows.id)
    orders = [
        ("classes-id-order", "categories in ascending id", ids.tolist()),
        ("classes-json-order", "categories in the order of the json", list(rows.listed)),
        ("classes-name-order", "categories sorted by name", [ids[k] for k in np.argsort(np.asarray(rows.name))]),
        (
            "classes-name-order",
            "categories sorted by name, capital and small letters alike",
            [ids[k] for k in np.argsort(np.asarray([n.casefold() for n in rows.name]), kind="stable")],
        ),
    ]
    for code, meaning, order in orders:
        class_of = np.empty(c, np.int64)
        class_of[np.searchsorted(ids, order)] = np.arange(c)
        yield Mapping(code, meaning, np.where(class_of < classes, class_of, NONE))
    for first in (1, 0):
        class_of = ids - first
        if class_of.min(initial=0) >= 0 and class_of.max(initial=0) < classes:
            meaning = f"category id k at output k, from {first}"
            yield Mapping("classes-by-id", meaning, class_of)
    if (by_name := named(rows, classes, names)) is not None:
        yield Mapping("classes-names-order", "the order of the detector's own names", by_name)


def _moved(mapping: Mapping, by: int, classes: int) -> Mapping:
    class_of = mapping.class_of + by
    inside = (mapping.class_of >= 0) & (class_of >= 0) & (class_of < classes)
    what = "one class further" if by > 0 else "one class before"
    return Mapping(
        "classes-shifted", f"{mapping.meaning}, each {what}", np.where(inside, class_of, NONE), mapping.part, 0
    )


def _inserted(plain: Integers, place: Integers, at: int, classes: int) -> Mapping:
    """A class that is no category stands before the category at ``at``."""
    class_of = np.where(place >= at, plain + 1, plain)
    meaning = f"the order that calib takes, from class {at} on each one class further"
    return Mapping("classes-shifted", meaning, np.where(class_of < classes, class_of, NONE), MOSTLY, at)


def _left_out(plain: Integers, place: Integers, at: int) -> Mapping:
    """The category at ``at`` is no class."""
    class_of = np.where(place > at, plain - 1, np.where(place == at, NONE, plain))
    meaning = f"the order that calib takes without class {at}, all behind it one class before"
    return Mapping("classes-shifted", meaning, class_of, MOSTLY, at)


def plainly(name: str) -> str:
    """A name without what spellings differ in."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def is_background(name: str) -> bool:
    """Whether a class of this name is none of objects."""
    return name.casefold().strip() in _BACKGROUND


def foreground(names: Sequence[str], classes: int) -> tuple[str, ...]:
    """The names of the foreground classes: without one for background, which stands first or last. [K], or none."""
    names = tuple(names)
    if len(names) == classes + 1 and is_background(names[0]):
        return names[1:]
    if len(names) == classes + 1 and is_background(names[-1]):
        return names[:-1]
    return names if len(names) == classes else ()


def named(rows: CategoryRows, classes: int, names: Sequence[str]) -> Integers | None:
    """The class of every category by the detector's own names, if at least half of these are categories. [C]"""
    own = foreground(names, classes)
    place = {plainly(n): k for k, n in enumerate(own) if n.casefold() not in _UNUSED}
    class_of = np.asarray([place.get(plainly(n), NONE) for n in rows.name], np.int64)
    return class_of if place and 2 * (class_of >= 0).sum() >= len(place) else None


@dataclass(frozen=True)
class Explained:
    """A mapping that holds in place of the plain one, and why."""

    mapping: Mapping
    comparison: Comparison


def explain(seen: Seen, plain: Integers, others: Sequence[Mapping]) -> Explained | None:
    """The mapping that explains ``seen`` much better than ``plain`` [C]; None if there is none."""
    own = expected(seen, plain)
    tried = [Explained(m, compare(seen, expected(seen, m.class_of), own)) for m in others]
    held = [e for e in tried if e.comparison.is_better(e.mapping.part)]
    if held:
        most = max(e.comparison.kappa for e in held)
        return next(e for e in held if e.comparison.kappa >= NEARLY * most)
    fit = fitted(seen)
    free = compare(seen, fit.target, own)
    if not (free.is_better() and fit.is_permutation(seen.predicted)):
        return None
    return Explained(
        Mapping("classes-permuted", "a permutation of them", assigned(seen, np.ones(len(own), np.bool_))[0]), free
    )


def exchanged(seen: Seen, plain: Integers) -> list[list[int]]:
    """Groups of categories that stand in each other's place, though the others are in order.

    Of every category of such a ring at least half of the objects are taken for the next one, and fewer than a tenth for
    itself; over the ring the sign tests of "next" against "itself" come to ``BITS``. Objects that a weak detector takes
    for others end in a category that keeps its own, and close no ring.
    """
    table = seen.table()
    at = {int(k): c for c, k in enumerate(plain.tolist()) if k >= 0}
    following: dict[int, int] = {}
    bits: dict[int, float] = {}
    for c in np.flatnonzero(table.sum(axis=1)).tolist():
        n, best = table[c].sum(), int(table[c].argmax())
        own = table[c, plain[c]] if plain[c] >= 0 else 0.0
        if best in at and at[best] != c and table[c, best] >= 0.5 * n and own < 0.1 * n:
            following[c] = at[best]
            bits[c] = -float(binom.logsf(table[c, best] - 1, table[c, best] + own, 0.5)) / np.log(2)
    rings: list[list[int]] = []
    for start in following:
        ring = [start]
        while (step := following.get(ring[-1])) is not None and step not in ring:
            ring.append(step)
        is_new = not any(start in other for other in rings)
        if following.get(ring[-1]) == start and is_new and sum(bits[c] for c in ring) >= BITS:
            rings.append(ring)
    return rings
