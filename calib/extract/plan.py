"""Which images make a shard and which share a forward pass; reading them ahead of the detector."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from calib.extract.adapter import Image
from calib.extract.dataset import Dataset
from calib.extract.label import GroundTruth
from calib.extract.pictures import read_image

Records = list[dict[str, Any]]
READERS = 8


@dataclass(frozen=True)
class Task:
    """A shard to be: image records and the objects of each."""

    name: str
    records: Records
    objects: list[GroundTruth]


@dataclass(frozen=True)
class Batch:
    """Images of one shard that share a forward pass; ``is_last``: the shard ends with it."""

    shard: str
    records: Records
    objects: list[GroundTruth]
    is_last: bool


def shards(records: Records, size: int) -> list[tuple[str, Records]]:
    """All shards of a data set, each under its number."""
    return [(f"{k:05d}", records[i : i + size]) for k, i in enumerate(range(0, len(records), size))]


def task(name: str, records: Records, dataset: Dataset) -> Task:
    """The shard ``name`` with what its images show."""
    return Task(name, records, [dataset.objects(int(r["id"])) for r in records])


def batches(tasks: Iterable[Task], size: int) -> Iterator[Batch]:
    """Batches of neighbouring images of one size; none reaches over the end of a shard."""
    for t in tasks:
        start = 0
        for records in plan(t.records, size):
            stop = start + len(records)
            yield Batch(t.name, records, t.objects[start:stop], stop == len(t.records))
            start = stop


def plan(records: Records, size: int) -> Iterator[Records]:
    """Images of unlike sizes never share a batch, so that no padding enters the features; one of a size that the json
    does not tell goes alone."""
    for _, same in groupby(records, key=_size_key):
        alike = list(same)
        yield from (alike[i : i + size] for i in range(0, len(alike), size))


def _size_key(record: dict[str, Any]) -> tuple[Any, ...]:
    height, width = record.get("height"), record.get("width")
    return (height, width) if height and width else (None, record["id"])


def read_ahead(todo: Iterable[Batch], folder: Path) -> Iterator[tuple[Batch, list[Image]]]:
    """Every batch with its pictures, read by threads while the one before it is computed."""
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        waiting: deque[tuple[Batch, Any]] = deque()
        try:
            for batch in todo:
                waiting.append((batch, [pool.submit(read_image, r, folder) for r in batch.records]))
                if len(waiting) > 1:
                    yield _pictures(*waiting.popleft())
            while waiting:
                yield _pictures(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _pictures(batch: Batch, reading: Any) -> tuple[Batch, list[Image]]:
    return batch, [r.result() for r in reading]
