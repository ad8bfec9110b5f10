"""Shards of one cache written by the workers of a Ray cluster, which share its folder with this process.

As in ``workers``, a worker writes whole shards under temporary names, and this process alone renames them and writes
the manifest. A shard that was written twice, because the news of the first was lost with a node, is admitted once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calib.cache.image_rows import ImageRows
from calib.cache.schema import Manifest
from calib.cache.shard import Prepared, prepare, write_images
from calib.cache.write import CacheWriter
from calib.extract import pipeline, proof
from calib.extract.options import Extraction
from calib.extract.plan import Task
from calib.extract.workers import Open
from calib.files import require
from calib.layout import SHARDS
from calib.parallel.ray_engine import RayEngine


@dataclass(frozen=True)
class _Work:
    """What a worker is sent."""

    open_detector: Open
    folder: Path
    settings: Extraction
    cache: Path
    manifest: Manifest

    def __call__(self) -> Callable[[Task], tuple[Prepared, int]]:
        """Opens the detector once: a shard to be -> the shard, and its rows."""
        require(self.cache / SHARDS, "cache", "all machines must see the same folders under the same names")
        adapter = self.open_detector(0)  # Ray shows every worker its own GPU only

        def extract(task: Task) -> tuple[Prepared, int]:
            done: list[Prepared] = []
            rows = 0

            def commit(name: str, images: Iterator[ImageRows]) -> None:
                done.append(prepare(self.cache, name, lambda f: write_images(f, self.manifest, images)))

            def count(_: int, more: int) -> None:
                nonlocal rows
                rows += more

            pipeline.run(adapter, [task], self.folder, self.settings, commit, count)
            return done[0], rows

        return extract


@dataclass(frozen=True)
class _Proving:
    """What the worker is sent that proves the detector."""

    open_detector: Open

    def __call__(self) -> Callable[[proof.Candidates], dict[str, Any]]:
        """Opens the detector."""
        adapter = self.open_detector(0)
        return lambda candidates: proof.prove(adapter, candidates)


def prove(open_detector: Open, engine: RayEngine, candidates: proof.Candidates) -> dict[str, Any]:
    """``proof.prove`` on a worker of the cluster.

    Raises:
        CalibError: as ``RayEngine.run`` and ``proof.prove``.
    """
    found: list[dict[str, Any]] = []
    engine.run(_Proving(open_detector), [replace(candidates, folder=candidates.folder.resolve())], found.append)
    return found[0]


def run(
    open_detector: Open,
    engine: RayEngine,
    tasks: list[Task],
    folder: Path,
    settings: Extraction,
    writer: CacheWriter,
    count: pipeline.Count,
) -> None:
    """Extract ``tasks`` on the cluster and commit what its workers write.

    Raises:
        CalibError: as ``RayEngine.run``, and errors of workers as themselves.
    """
    work = _Work(open_detector, folder.resolve(), settings, writer.path.resolve(), writer.manifest)

    def admit(done: tuple[Prepared, int]) -> None:
        shard, rows = done
        if not writer.is_committed(shard.name):
            writer.admit(shard)
            count(len(shard.images), rows)

    engine.run(work, tasks, admit)
    writer.clean()  # what killed workers left
