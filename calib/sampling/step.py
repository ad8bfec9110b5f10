"""The rows of one step, and the protocol of all samplers."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """Rows [n] of one step and the chunk [n] (0..n_chunks-1, ascending) each belongs to."""

    rows: Rows
    chunk: Rows
    n_chunks: int


class Sampler(Protocol):
    """A sequence of steps without an end."""

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two samplers of one cache that draw the same steps."""
        ...

    def step(self, i: int) -> Step:
        """The i-th step; the same for every call."""
        ...


class Cycle:
    """The endless concatenation of reshuffled passes over ``items``; any position can be read without those before.

    Pass p is shuffled by (seed, p). The order of the latest pass is kept, since reads are mostly consecutive.
    """

    def __init__(self, items: Rows, *seed: int) -> None:
        self.items = items
        self._seed = seed
        self._turn = -1
        self._order = items

    def take(self, start: int, count: int) -> Rows:
        """``count`` items from position ``start``."""
        picked = np.empty(count, np.int64)
        done = 0
        while done < count:
            turn, offset = divmod(start + done, len(self.items))
            part = self._pass(turn)[offset : offset + count - done]
            picked[done : done + len(part)] = part
            done += len(part)
        return picked

    def _pass(self, turn: int) -> Rows:
        if turn != self._turn:
            self._order = self.items[np.random.default_rng([*self._seed, turn]).permutation(len(self.items))]
            self._turn = turn
        return self._order
