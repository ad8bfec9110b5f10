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
from calib.parallel.distributed import World, joined
from calib.training import settings_of, train
from calib.training.context import FitContext
from calib.training.loop import Training, run_alone
from calib.training.plan import HeadPlan

CPU = torch.device("cpu")


def plan(method: str, cache: Cache, out: Path, overrides: dict[str, Any]) -> HeadPlan:
    return HeadPlan(method, settings_of(method, overrides, 0), 0, cache, out)


def train_all(
    wanted: Sequence[tuple[str, Path, dict[str, Any]]], cache: Path, dies: tuple[int, str, int] | None = None
) -> int:
    """All heads, one behind the other, in one group of processes; the rank.

    ``dies``: the rank that is killed, as kill -9 does it, in the training of that name when it comes to that step.
    """
    real = Training.step

    def step(self: Training, batch: Any, bar: Any) -> None:
        if dies == (world.rank, self.label, batch.step):
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, batch, bar)

    Training.step = step  # type: ignore[method-assign]
    with joined(CPU) as world:
        for method, out, overrides in wanted:
            run_alone(plan(method, Cache(cache), out, overrides).trainings(FitContext(world=world)))
    return world.rank


def train_spoiled(method: str, cache: Path, out: Path, overrides: dict[str, Any]) -> None:
    """Rank 1 reads numbers that are not finite."""
    real = RowMatrix.stored

    def spoil(self: RowMatrix, rows: Any, out: Any = None) -> Any:
        found = real(self, rows, out)
        found[:] = np.nan
        return found

    if os.environ["RANK"] == "1":
        RowMatrix.stored = spoil  # type: ignore[method-assign]
    train(method, cache, out, overrides)


@dataclass
class _Meeting:
    barrier: Barrier
    brought: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ThreadWorld(World):
    """Ranks that are threads of one process and add in the order of their numbers."""

    meeting: _Meeting = field(default_factory=lambda: _Meeting(Barrier(1)))

    def _all_reduce(self, row: Tensor) -> None:
        total = torch.stack(self._all(row)).sum(dim=0)
        row.copy_(total)

    def _broadcast(self, tensor: Tensor) -> None:
        tensor.copy_(self._all(tensor)[0])

    def _all(self, tensor: Tensor) -> list[Tensor]:
        self.meeting.brought[self.rank] = tensor.clone()
        self.meeting.barrier.wait()
        found = [self.meeting.brought[k] for k in range(self.size)]
        self.meeting.barrier.wait()
        return found


def train_in_threads(ranks: int, one: HeadPlan) -> None:
    """``one`` by ``ranks`` threads; raises what the first of them raised."""
    meeting = _Meeting(Barrier(ranks, timeout=60))
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        world = ThreadWorld(rank, ranks, meeting)
        try:
            run_alone(one.trainings(FitContext(world=world)))
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
