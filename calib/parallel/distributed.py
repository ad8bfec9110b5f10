"""Processes that train one head together: what they exchange, and how they are started.

A ``World`` of one process exchanges nothing. More come from ``torchrun``, or from ``launch``, which runs torchrun's own
agent in this process.

Gradients are summed by one all-reduce of all of them in a row, not by ``DistributedDataParallel``: a head is one or two
matrices, so that there is nothing to overlap; losses are closures over heads and their state rather than one module's
forward; and the hand-shaped bfloat16 step has no autograd to hook into.
"""

import logging
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from calib.errors import CalibError, ProcessError

Rows = TypeVar("Rows", Tensor, NDArray[Any])
Result = TypeVar("Result")

AGAIN = "run the same command again: it goes on from the last checkpoint"
# Rank 0 dies of a lost connection as soon as rank 1 is killed; so that the killed one is found first, it waits.
GRACE_S = 3.0
# They tell of every process that they end.
TALKATIVE = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
    "torch.multiprocessing.spawn",
)


@dataclass(frozen=True)
class World:
    """The processes of a training, of which this is number ``rank``."""

    rank: int = 0
    size: int = 1

    def shard(self, rows: Rows) -> Rows:
        """The share of this process in what all know: every ``size``-th row."""
        if self.size == 1:
            return rows
        share = rows[self.rank :: self.size]
        return share.contiguous() if isinstance(share, Tensor) else np.ascontiguousarray(share)

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """Replace float32 tensors by their sums over all processes: the same bits everywhere.

        Raises:
            ProcessError: another process is gone.
        """
        if self.size > 1:
            row = torch.cat([t.reshape(-1) for t in tensors])
            with _contact():
                self._all_reduce(row)
            _put(row, tensors)

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Replace tensors by those of rank 0.

        Raises:
            ProcessError: another process is gone.
        """
        if self.size > 1:
            with _contact():
                for tensor in tensors:
                    self._broadcast(tensor)

    def _all_reduce(self, row: Tensor) -> None:
        dist.all_reduce(row)

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, 0)


ALONE = World()


def _put(row: Tensor, tensors: list[Tensor]) -> None:
    for tensor, part in zip(tensors, torch.split(row, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@contextmanager
def _contact() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:
        raise ProcessError(f"another process of the training is gone: {str(e).splitlines()[0]}", hint=AGAIN) from e


def ranks() -> int:
    """Processes of the torchrun that started this one; 1 without one."""
    needed = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}
    return int(os.environ["WORLD_SIZE"]) if needed <= set(os.environ) else 1


def rank() -> int:
    """The number of this process among those of torchrun; 0 without one."""
    return int(os.environ["RANK"]) if ranks() > 1 else 0


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The world of this process, as torchrun's variables have it: over NCCL on a GPU, over gloo else.

    Raises:
        ProcessError: the others cannot be reached, or are gone before the end.
    """
    on_gpu = device.type == "cuda"
    with _contact():
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    yield World(dist.get_rank(), dist.get_world_size())
    with _contact():
        dist.barrier()
    dist.destroy_process_group()


def launch(processes: int, work: Callable[..., Result], *arguments: Any) -> list[Result]:
    """``work(*arguments)`` in new processes with torchrun's variables; what each returns, by rank.

    They share the processor's cores, unless OMP_NUM_THREADS says how many threads each has. ``work`` and what it is
    given must be picklable; a script that calls this needs ``if __name__ == "__main__"``.

    Raises:
        CalibError, OSError: what ended the first of them. ProcessError: one is gone without a word.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    threads = max(1, torch.get_num_threads() // (1 if "OMP_NUM_THREADS" in os.environ else processes))
    errors = get_context("spawn").SimpleQueue()
    with _as_before(), tempfile.TemporaryDirectory(prefix="calib-ranks-") as logs:
        # With torch's shared store the ranks of a restarted group dial the one that died.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            run_id=uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
        )
        try:
            found = elastic_launch(config, _work)(errors, threads, work, arguments)
        except ChildFailedError as e:
            raise _ended(e, errors) from None
        except SignalException as e:
            if e.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + e.sigval) from None
    return [found[rank] for rank in range(processes)]


def _work(errors: Any, threads: int, work: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
    """In a rank: exits as ``launch`` expects."""
    # Ctrl-C and the end of the first process end a rank at once; files are whole at any moment.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)
    try:
        return work(*arguments)
    except ProcessError:
        time.sleep(GRACE_S)
        raise SystemExit(1) from None
    except (CalibError, OSError) as e:
        errors.put(e)
        raise SystemExit(2) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def _ended(error: Any, errors: Any) -> BaseException:
    if not errors.empty():
        found: CalibError | OSError = errors.get()
        return found
    rank, failure = error.get_first_failure()
    if failure.exitcode == -signal.SIGINT:
        return KeyboardInterrupt()
    how = f"by {failure.signal_name()}" if failure.exitcode < 0 else f"with code {failure.exitcode}"
    return ProcessError(f"rank {rank} (process {failure.pid}) ended {how}", hint=f"out of memory? {AGAIN}")


@contextmanager
def _as_before() -> Iterator[None]:
    """Put back what torch's agent changes in its process: variables, handlers of signals; it logs nothing meanwhile."""
    is_main = threading.current_thread() is threading.main_thread()  # in others torch leaves the handlers alone
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT) if is_main else ()
    handled = {s: signal.getsignal(s) for s in signals}
    variables = set(os.environ)
    levels = {logger: logger.level for logger in map(logging.getLogger, TALKATIVE)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        for name in set(os.environ) - variables:
            del os.environ[name]
        for number, handler in handled.items():
            signal.signal(number, handler)
