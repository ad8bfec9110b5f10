"""What tests run in ranks: a module of its own, so that new processes can import it."""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calib.cache import Cache
from calib.cache.rows import RowMatrix
from calib.heads.fit import Training
from calib.parallel.distributed import World, joined
from calib.progress import silent
from calib.train.head import Order, settings_of
from calib.train.together import Request, train_as_rank

CPU = torch.device("cpu")


def order(method: str, cache: Cache, out: Path, overrides: dict[str, Any]) -> Order:
    return Order(method, settings_of(method, overrides, 0), 0, cache, out)


def train_all(
    wanted: Sequence[tuple[str, Path, dict[str, Any]]], cache: Path, dies: tuple[int, str, int] | None = None
) -> int:
    """All heads, one behind the other, in one group of processes; the rank.

    ``dies``: the rank that is killed, as kill -9 does it, in the training of that name when it comes to that step.
    """
    real = Training.step

    def step(self: Training, portion: Any, bar: Any) -> None:
        if dies == (world.rank, self.label, portion.step):
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, portion, bar)

    Training.step = step  # type: ignore[method-assign]
    with joined(CPU) as world:
        for method, out, overrides in wanted:
            one = order(method, Cache(cache), out, overrides)
            one.train(CPU, silent, world=world) if world.rank == 0 else one.assist(CPU, world)
    return world.rank


def train_spoiled(request: Request) -> None:
    """Rank 1 reads numbers that are not finite."""
    real = RowMatrix.stored

    def spoil(self: RowMatrix, rows: Any, out: Any = None) -> Any:
        found = real(self, rows, out)
        found[:] = np.nan
        return found

    if os.environ["RANK"] == "1":
        RowMatrix.stored = spoil  # type: ignore[method-assign]
    train_as_rank(request)


@dataclass
class _Meeting:
    barrier: Barrier
    brought: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ThreadWorld(World):
    """Ranks that are threads of one process and add in the order of their numbers."""

    meeting: _Meeting = field(default_factory=lambda: _Meeting(Barrier(1)))

    def _reduce(self, row: Tensor) -> None:
        total = torch.stack(self._all(row)).sum(dim=0)
        row.copy_(total)

    def _share(self, tensor: Tensor) -> None:
        tensor.copy_(self._all(tensor)[0])

    def _all(self, tensor: Tensor) -> list[Tensor]:
        self.meeting.brought[self.rank] = tensor.clone()
        self.meeting.barrier.wait()
        found = [self.meeting.brought[k] for k in range(self.size)]
        self.meeting.barrier.wait()
        return found


def train_in_threads(ranks: int, one: Order) -> None:
    """``one`` by ``ranks`` threads; raises what the first of them raised."""
    meeting = _Meeting(Barrier(ranks, timeout=60))
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        world = ThreadWorld(rank, ranks, meeting)
        try:
            one.train(CPU, silent, world=world) if rank == 0 else one.assist(CPU, world)
        except BaseException as e:
            errors.append(e)
            meeting.barrier.abort()

    threads = [Thread(target=work, args=(k,)) for k in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
