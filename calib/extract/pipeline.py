"""Pictures in, shards out: threads read ahead, the caller's thread runs the detector, one thread labels and writes.

The detector's thread neither reads nor converts nor waits for a disk that keeps up. Memory does not depend on the size
of a shard: one batch is read ahead, two wait for the writer, and a shard goes to disk row group by row group.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from calib.cache.image_rows import ImageRows
from calib.errors import InputError
from calib.extract.adapter import Adapter, Image
from calib.extract.consumer_thread import ConsumerThread
from calib.extract.options import Extraction
from calib.extract.plan import Batch, Records, Task, batches, read_ahead
from calib.extract.rows import launch

Commit = Callable[[str, Iterator[ImageRows]], None]  # writes a shard as its images come
Count = Callable[[int, int], None]  # so many images and rows more were written
_Launched = tuple[Batch, Callable[[], list[ImageRows]]]


class _Stopped(Exception):  # noqa: N818 - the other thread has the error
    """The detector's thread failed in the midst of a shard: it must not be committed."""


def run(
    adapter: Adapter, tasks: Iterable[Task], folder: Path, settings: Extraction, commit: Commit, count: Count
) -> None:
    """Extract ``tasks`` one after the other. Errors of any thread are raised here as themselves."""

    def write(items: Iterator[_Launched]) -> None:
        for item in items:
            commit(item[0].shard, _shard_rows(item, items, count))

    with ConsumerThread(write) as writing:
        for batch, pixels in read_ahead(batches(tasks, settings.batch_size), folder):
            _check_sizes(adapter, batch.records, pixels)
            writing.put((batch, launch(adapter, batch, pixels, settings)))


def _shard_rows(first: _Launched, following: Iterator[_Launched], count: Count) -> Iterator[ImageRows]:
    batch, rows = first
    while True:
        for one in rows():
            yield one
            count(1, len(one.features))
        if batch.is_last:
            return
        try:
            batch, rows = next(following)
        except StopIteration:
            raise _Stopped from None


def _check_sizes(adapter: Adapter, records: Records, pixels: list[Image]) -> None:
    for record, p in zip(records, pixels, strict=True):
        height, width = p.shape[:2]
        if not adapter.accepts(height, width):
            raise InputError(
                f"image {record['id']} is {height} x {width}: one side vanishes when the detector resizes it",
                hint="leave it out of the annotation file",
            )
