"""Several processes, each with a detector of its own, that write the shards of one cache.

A worker writes whole shards under temporary names; this process alone renames them and writes the manifest, so that
the cache is the one of a single process and can be resumed by any number of them.
"""

import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, cast

import torch

from calib.cache.schema import Manifest
from calib.cache.shard import prepare, write_images
from calib.cache.write import CacheWriter
from calib.errors import ProcessError
from calib.extract import pipeline, proof
from calib.extract.adapter import Adapter
from calib.extract.options import Extraction
from calib.extract.plan import Task
from calib.parallel.pool import end_with_parent

Open = Callable[[int], Adapter]  # number of the process -> its detector; must be picklable


@dataclass(frozen=True)
class _Work:
    """What a worker is sent."""

    open_detector: Open
    number: int
    tasks: list[Task]
    folder: Path
    settings: Extraction
    cache: Path
    manifest: Manifest
    threads: int


def run(
    open_detector: Open,
    processes: int,
    tasks: list[Task],
    folder: Path,
    settings: Extraction,
    writer: CacheWriter,
    worker_progress: pipeline.Count,
) -> None:
    """Extract ``tasks`` with ``processes`` workers and commit what they write. Their errors are raised as themselves.

    They share the processor's cores, unless OMP_NUM_THREADS says how many threads each has.

    Raises:
        ProcessError: a worker is gone without a word.
    """
    processes = min(processes, len(tasks))
    share = 1 if "OMP_NUM_THREADS" in os.environ else max(1, processes)
    threads = max(1, torch.get_num_threads() // share)
    works = [
        _Work(open_detector, k, tasks[k::processes], folder, settings, writer.path, writer.manifest, threads)
        for k in range(processes)
    ]
    with _cleaned(writer), _started(works) as (workers, pipes):
        left = dict(pipes)
        while left:
            for pipe in connection.wait(left):
                try:
                    kind, *content = cast(Any, pipe).recv()
                except (EOFError, ConnectionResetError):
                    number = left[pipe]
                    workers[number].join()
                    raise ProcessError(
                        f"process {number} of {len(works)} ended with code {workers[number].exitcode}",
                        hint="out of memory? what was committed is whole: run the same command again with --resume, "
                        "perhaps with fewer --processes",
                    ) from None
                if kind == "written":
                    worker_progress(*content)
                elif kind == "shard":
                    writer.admit(*content)
                elif kind == "error":
                    raise cast(BaseException, content[0])
                else:
                    del left[pipe]


@contextmanager
def _cleaned(writer: CacheWriter) -> Iterator[None]:
    """Shards that nobody will end are removed: where the disk is full, their space is needed."""
    try:
        yield
    finally:
        writer.clean()


@contextmanager
def _started(works: list[_Work]) -> Iterator[tuple[list[Any], dict[Any, int]]]:
    """The workers, and the pipes from them with their numbers; on an error, workers are killed."""
    context = get_context("spawn")  # CUDA does not survive a fork
    workers: list[Any] = []
    pipes: dict[Any, int] = {}
    try:
        for work in works:
            ours, theirs = context.Pipe(duplex=False)
            pipes[ours] = work.number
            workers.append(context.Process(target=_worker, args=(work, theirs), daemon=True))
            workers[-1].start()
            theirs.close()
        yield workers, pipes
    except BaseException:
        for worker in workers:
            worker.kill()
        raise
    finally:
        for worker in workers:
            worker.join()
        for pipe in pipes:
            pipe.close()


def prove(open_detector: Open, candidates: proof.Candidates) -> dict[str, Any]:
    """``proof.prove`` in a process of its own, with the detector of the first worker.

    Raises:
        ProcessError: the process is gone without a word. Others as themselves.
    """
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, get_context("spawn"), _settle, (threads,)) as pool:
        try:
            return pool.submit(_prove, open_detector, candidates).result()
        except BrokenProcessPool as e:
            raise ProcessError("the process that checks the detector is gone", hint="out of memory?") from e


def _prove(open_detector: Open, candidates: proof.Candidates) -> dict[str, Any]:
    try:
        return proof.prove(open_detector(0), candidates)
    except Exception as e:
        raise _sendable(e) from None


def _settle(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _worker(work: _Work, pipe: Any) -> None:
    _settle(work.threads)

    def commit(name: str, rows: Any) -> None:
        pipe.send(("shard", prepare(work.cache, name, lambda f: write_images(f, work.manifest, rows))))

    def worker_progress(images: int, rows: int) -> None:
        pipe.send(("written", images, rows))

    try:
        pipeline.run(work.open_detector(work.number), work.tasks, work.folder, work.settings, commit, worker_progress)
    except BaseException as e:
        pipe.send(("error", _sendable(e)))
    else:
        pipe.send(("done",))


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return ProcessError(f"{type(error).__name__}: {error}")
    return error
