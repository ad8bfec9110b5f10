"""Single-threaded worker processes that share one progress bar."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from queue import Empty
from threading import Thread
from time import monotonic
from types import TracebackType
from typing import Any, Self, TypeVar

from calib.errors import ProcessError
from calib.progress import Bar, Progress, silent

Job = TypeVar("Job")
Result = TypeVar("Result")
_REPORT_EVERY_S = 0.2


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """Raised inside a worker once the parent was interrupted."""


class _WorkerBar:
    """A worker's end of the bar; without ``counts`` it only looks whether the parent was interrupted."""

    def __init__(self, worker_progress: "Queue[int]", stop: Event, *, counts: bool) -> None:
        self._progress, self._stop, self._counts = worker_progress, stop, counts
        self._pending, self._last = 0, monotonic()

    def advance(self, n: int = 1, **metrics: float) -> None:
        self._pending += n * self._counts
        if monotonic() - self._last > _REPORT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        self._progress.put(self._pending)
        self._pending, self._last = 0, monotonic()
        if self._stop.is_set():
            raise Stopped


_channel: list[Any] = []  # of a worker: the queue and the event it was started with
_here: list[Bar] = []  # of a pool without processes: the bar itself


def end_with_parent() -> None:
    """Wait until the process that started this one has ended, however it ended, and end this one."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _begin(worker_progress: "Queue[int]", stop: Event) -> None:
    Thread(target=end_with_parent, daemon=True).start()
    # Ctrl-C reaches the whole process group; the parent decides, workers stop at their next report.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _channel[:] = [worker_progress, stop]


def _called(work: Callable[[Job], Result], job: Job) -> Result:
    if torch := sys.modules.get("torch"):  # it takes seconds to import; what needs it came with ``work``
        torch.set_num_threads(1)
    return work(job)


@contextmanager
def worker_progress(label: str, *, total: int, unit: str) -> Iterator[Bar]:
    """``calib.progress.Progress`` of a worker: what is counted in training steps reaches the parent's bar."""
    if not _channel:
        with silent(label, total=total, unit=unit) as nothing:
            yield _here[-1] if _here and unit == "steps" else nothing
        return
    bar = _WorkerBar(*_channel, counts=unit == "steps")
    try:
        yield bar
    finally:
        bar.flush()


class Pool:
    """A context of ``processes`` that take jobs; with one, the jobs run in this process."""

    def __init__(self, processes: int) -> None:
        context = get_context("spawn")
        self._messages: Queue[int] = context.Queue()
        self._stop = context.Event()
        begin = (self._messages, self._stop)
        self._pool = ProcessPoolExecutor(processes, context, _begin, begin) if processes > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is None:
            return
        if error is not None:
            self._stop.set()
        try:
            self._pool.shutdown(cancel_futures=error is not None)
        except BaseException:  # a second Ctrl-C: whoever is left would be waited for at the end of the process
            for process in active_children():
                process.kill()
            raise

    def run(
        self,
        work: Callable[[Job], Result],
        jobs: Sequence[Job],
        *,
        steps: int,
        label: str,
        progress: Progress,
        unit: str = "steps",
        ended: Callable[[Job, Result], None] = lambda job, result: None,
    ) -> list[Result]:
        """``work`` of every job, in the order of ``jobs``; the first failure is raised.

        Args:
            work: importable function of one job; reports with ``worker_progress``.
            steps: the bar's total, of which ``unit`` says what is counted.
            ended: called with every job and its result, as it ends.

        Raises:
            ProcessError: a process was killed, or could not start. Others as ``work``.
        """
        with progress(label, total=steps, unit=unit) as bar:
            if self._pool is None:
                return [_local(work, job, bar, ended) for job in jobs]
            futures = [self._pool.submit(_called, work, job) for job in jobs]
            job_of = dict(zip(futures, jobs, strict=True))
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=_REPORT_EVERY_S, return_when=FIRST_COMPLETED)
                _drain(self._messages, bar)
                for future in done:
                    if future.exception() is None:
                        ended(job_of[future], future.result())
                _raise_first(done)
            _drain(self._messages, bar)
            return [future.result() for future in futures]


def _local(work: Callable[[Job], Result], job: Job, bar: Bar, ended: Callable[[Job, Result], None]) -> Result:
    _here.append(bar)
    try:
        result = work(job)
    finally:
        _here.pop()
    ended(job, result)
    return result


def run_all(
    work: Callable[[Job], None], jobs: Sequence[Job], *, processes: int, steps: int, label: str, progress: Progress
) -> None:
    """Run ``work`` on every job with a pool of its own; the first failure is raised when the jobs under way stopped."""
    with Pool(processes) as pool:
        pool.run(work, jobs, steps=steps, label=label, progress=progress)


def _drain(messages: "Queue[int]", bar: Bar) -> None:
    try:
        while True:
            bar.advance(messages.get_nowait())
    except Empty:
        pass


def _raise_first(done: "set[Future[Any]]") -> None:
    try:
        for future in done:
            future.result()
    except BrokenProcessPool as e:
        raise ProcessError(
            "a process that did a part of the work was killed, or could not start",
            hint="was memory short? run it again, with fewer processes (--processes 1); what is done is kept",
        ) from e
