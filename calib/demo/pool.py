"""Several heads at once, one single-threaded process each, under one progress bar."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from queue import Empty
from time import monotonic
from typing import Any, TypeVar

from calib.progress import Bar, Progress

Job = TypeVar("Job")
_TELL_EVERY_S = 0.2


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """Raised inside a worker once the parent was interrupted."""


class _Told:
    """A worker's end of the bar."""

    def __init__(self, told: "Queue[int]", stop: Event) -> None:
        self._told, self._stop = told, stop
        self._pending, self._last = 0, monotonic()

    def advance(self, n: int = 1, **figures: float) -> None:
        self._pending += n
        if monotonic() - self._last > _TELL_EVERY_S:
            self.flush()

    def flush(self) -> None:
        self._told.put(self._pending)
        self._pending, self._last = 0, monotonic()
        if self._stop.is_set():
            raise Stopped


_channel: list[Any] = []  # of a worker: the queue and the event it was started with


def _begin(told: "Queue[int]", stop: Event) -> None:
    import torch

    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group; the parent decides, workers stop at their next report.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _channel[:] = [told, stop]


@contextmanager
def told(label: str, *, total: int, unit: str) -> Iterator[Bar]:
    """``calib.progress.Progress`` of a worker: what is counted in training steps reaches the parent's bar."""
    bar = _Told(*_channel)
    try:
        yield bar
    finally:
        if unit == "steps":
            bar.flush()


def run_all(
    work: Callable[[Job], None], jobs: Sequence[Job], *, workers: int, steps: int, label: str, progress: Progress
) -> None:
    """Run ``work`` on every job; the first failure is raised when the jobs under way have stopped.

    Args:
        work: importable function of one job; reports with ``told``.
        steps: the bar's total.
    """
    context = get_context("spawn")
    messages: Queue[int] = context.Queue()
    stop = context.Event()
    with (
        progress(label, total=steps, unit="steps") as bar,
        ProcessPoolExecutor(workers, context, _begin, (messages, stop)) as pool,
    ):
        pending = {pool.submit(work, job) for job in jobs}
        try:
            while pending:
                done, pending = wait(pending, timeout=_TELL_EVERY_S, return_when=FIRST_COMPLETED)
                _drain(messages, bar)
                _raise_first(done)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        _drain(messages, bar)


def _drain(messages: "Queue[int]", bar: Bar) -> None:
    try:
        while True:
            bar.advance(messages.get_nowait())
    except Empty:
        pass


def _raise_first(done: "set[Future[None]]") -> None:
    for future in done:
        future.result()
