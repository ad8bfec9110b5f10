"""Iterative stratification: units that carry many labels are dealt to parts, each with its share of every label.

Paper: Sechidis, Tsoumakas, Vlahavas, "On the Stratification of Multi-Label Data", ECML PKDD 2011, Algorithm 1. The
label that fewest of the units left carry is dealt first, as frequent ones can be evened out later: each of its units
goes to the part that still wants most of this label, among equals to the part that wants most units, else to any.

Differs:
- Units are single images or groups of them. A part's wants are counted in images; units with more of the label go
  first, and before all others those that are larger than a part, to where there is most room.
- After each unit, not after all units of a label, the scarcest label is determined anew.
- A part that has its images gets no more. Sizes are exact for single images, else off by less than a group per part.
- Every label is to be in every part. Where no more units of a label are left than parts lack it, such labels come
  first, those with the fewest units before others, and go to where they lack. So a label of two units is in both of
  two parts: once the first unit is placed, the other is next, and then those of other such labels on either. What
  prevents it are full parts, and rings of an odd number of such labels, which no division satisfies. (The paper gives
  both units to a part of 0.8.)
- Labels whose units carry no other label, such as having no object at all, come before those that share units. (Else
  they would come last, as they alone lose no units to others, and take what is left of the sizes.)
- Labels of a single unit are one label together. (The paper gives all of them to the largest part.)
- Ties fall by numbers drawn from the seed, in a way that no release of numpy changes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.data.shares import sizes
from calib.progress import Progress, silent

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Labelled:
    """U units and which of L labels they carry: E pairs, each at most once."""

    size: Integers  # [U], images of the unit
    unit: Integers  # [E]
    label: Integers  # [E]
    images: Integers  # [E], images of the unit with the label


def stratify(units: Labelled, weight: list[int], seed: int, *, progress: Progress = silent) -> Integers:
    """The part of every unit, [U], of parts whose shares are as ``weight`` [P].

    There must be at least as many units as parts; then no part is empty.
    """
    order = drawn_order(len(units.size), seed)
    dealing = _Dealing(_in_order(_without_single(units), order), weight)
    with progress("dividing", total=len(order), unit="images" if (units.size == 1).all() else "groups") as bar:
        for _ in dealing.run():
            bar.advance()
    part = np.empty(len(order), np.int64)
    part[order] = dealing.part
    return part


def drawn_order(n: int, seed: int) -> Integers:
    """A random order of 0 to n - 1, by the raw numbers of the generator: numpy promises these alone to stay."""
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")


def _in_order(units: Labelled, order: Integers) -> Labelled:
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return Labelled(units.size[order], rank[units.unit], units.label, units.images)


def _without_single(units: Labelled) -> Labelled:
    """Labels are numbered from 1. Those that one unit alone carries are label 0, as many times as there are of them."""
    _, label, carriers = np.unique(units.label, return_inverse=True, return_counts=True)
    is_single = carriers[label] == 1
    unit, count = np.unique(units.unit[is_single], return_counts=True)
    rest = ~is_single
    return Labelled(
        units.size,
        np.concatenate([unit, units.unit[rest]]),
        np.concatenate([np.zeros(len(unit), np.int64), label[rest] + 1]),
        np.concatenate([count, units.images[rest]]),
    )


class _Dealing:
    """The state of the algorithm: plain numbers, as it looks at one unit after the other.

    Of P parts: ``room``. Of labels: ``want`` [L][P], in units of 1 / sum(weight) image; ``left``, units to deal;
    ``lacking``, a bit for every part that has none.
    """

    def __init__(self, units: Labelled, weight: list[int]) -> None:
        n_labels, total = int(units.label.max(initial=0)) + 1, sum(weight)
        images = np.bincount(units.label, units.images, n_labels).astype(np.int64)
        carriers = np.bincount(units.label, minlength=n_labels)
        self.total = total
        self.size = units.size.tolist()
        self.room = sizes(weight, sum(self.size))
        self.want = [[n * w for w in weight] for n in images.tolist()]
        self.left: list[int] = carriers.tolist()
        self.carriers: list[int] = carriers.tolist()
        self.lacking = [(1 << len(weight)) - 1] * n_labels
        self.lacking[0] = 0  # of many labels, none of which can be in two parts
        shares_unit = np.bincount(units.unit)[units.unit] > 1
        self.is_shared: list[int] = np.bincount(units.label, shares_unit, n_labels).astype(bool).tolist()
        self.empty = (1 << len(weight)) - 1
        self.part = [-1] * len(self.size)
        self.undealt = len(self.size)
        self.labels = _lists(units.unit, np.stack([units.label, units.images], axis=1), len(self.size))
        # To be taken from the end: units with most images of the label, then in drawn order.
        order = np.lexsort((-units.unit, units.images, units.label))
        self.queue: list[list[int]] = _lists(units.label[order], units.unit[order], n_labels)
        self.heap = [self._key(label) for label in range(n_labels)]
        heapify(self.heap)

    def run(self) -> Iterator[int]:
        """Deal all units; yields each."""
        smallest = min(self.room)
        larger = [unit for unit, size in enumerate(self.size) if size > smallest]
        yield from self._by_room(sorted(larger, key=lambda unit: -self.size[unit]))
        while self.heap:
            key = heappop(self.heap)
            label = key[-1]
            if self.left[label] and key == self._key(label):  # else outdated
                unit = self._next(label)
                self._place(unit, self._choose(unit, label))
                yield unit
        yield from self._by_room([unit for unit, part in enumerate(self.part) if part < 0])  # without labels

    def _by_room(self, units: list[int]) -> Iterator[int]:
        for unit in units:
            self._place(unit, max(self._open(unit), key=self.room.__getitem__))
            yield unit

    def _is_urgent(self, label: int) -> bool:
        """Whether each unit left of ``label`` is needed in a part that has none."""
        return self.left[label] <= self.lacking[label].bit_count()

    def _key(self, label: int) -> tuple[int, int, int, int]:
        rank = 0 if self._is_urgent(label) else 1 + self.is_shared[label]
        return rank, self.left[label], self.carriers[label], label

    def _next(self, label: int) -> int:
        queue = self.queue[label]
        while self.part[queue[-1]] >= 0:
            queue.pop()
        return queue.pop()

    def _choose(self, unit: int, label: int) -> int:
        parts, want, room = self._open(unit), self.want[label], self.room
        if len(parts) > 1 and self._is_urgent(label):
            parts = self._lacking_most(parts, unit, label)
        # The order of units is drawn: with it, the part that comes first among equals.
        return max(parts, key=lambda j: (want[j], room[j], (j + unit) % len(room)))

    def _open(self, unit: int) -> list[int]:
        """Parts that may get ``unit``."""
        parts = range(len(self.room))
        if self.undealt <= self.empty.bit_count():
            return [j for j in parts if self.empty >> j & 1]
        size = self.size[unit]
        return [j for j in parts if self.room[j] >= size] or [max(parts, key=self.room.__getitem__)]

    def _lacking_most(self, parts: list[int], unit: int, label: int) -> list[int]:
        """Of ``parts`` those that lack ``label``, if any; of these, those that lack most of its urgent labels."""
        lacking = [j for j in parts if self.lacking[label] >> j & 1] or parts
        urgent = [self.lacking[other] for other, _ in self.labels[unit] if self._is_urgent(other)]
        lacks = [sum(mask >> j & 1 for mask in urgent) for j in lacking]
        return [j for j, n in zip(lacking, lacks, strict=True) if n == max(lacks)]

    def _place(self, unit: int, part: int) -> None:
        self.part[unit] = part
        self.undealt -= 1
        self.room[part] -= self.size[unit]
        self.empty &= ~(1 << part)
        for label, images in self.labels[unit]:
            self.want[label][part] -= images * self.total
            self.left[label] -= 1
            self.lacking[label] &= ~(1 << part)
            if self.left[label]:
                heappush(self.heap, self._key(label))


def _lists(key: Integers, value: Integers, n: int) -> list[list[Any]]:
    """The rows of ``value`` under each key below ``n``, in their order."""
    order = np.argsort(key, kind="stable")
    ends = np.cumsum(np.bincount(key, minlength=n)).tolist()
    rows = value[order].tolist()
    return [rows[a:b] for a, b in zip([0, *ends], ends, strict=False)]
