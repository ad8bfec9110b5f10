"""Taking damaged shards out of a cache, so that whoever wrote it can write exactly those again.

Damaged files are moved into ``damaged/`` and never deleted. They go first, the manifest follows: killed in between,
the cache still lists what is gone, and repairing it again ends the same.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from calib.cache.damage import Report, find_damage
from calib.cache.meta import images_of_meta, placed
from calib.cache.schema import IMAGES_SCHEMA, Manifest
from calib.files import fsync_dir, lock, replacing
from calib.layout import DAMAGED, HIDDEN_LOCK, IMAGES, META, SHARDS
from calib.progress import Progress, silent


@dataclass(frozen=True)
class Repair:
    """What was done: shards and tables that were taken out, the number of images in them, and what is left."""

    report: Report
    shards: tuple[str, ...]
    tables: tuple[str, ...]
    images_lost: int
    rows_left: int
    complete: bool


def repair(path: Path, *, progress: Progress = silent) -> Repair:
    """Take everything damaged out of the cache at ``path``; a sound one is left as it is.

    Raises:
        ExistsError: another process is writing it. MissingFileError, FormatError: its manifest cannot be read.
    """
    Manifest.read(path)
    with lock(path / HIDDEN_LOCK, f"writing the cache {path}"):
        report = find_damage(path, progress=progress)
        manifest = Manifest.read(path)
        if not report.damages:
            return Repair(report, (), (), 0, manifest.rows, manifest.complete)
        lost = set(report.shards)
        if IMAGES in report.tables:
            lost |= _restore_images(path, [s.name for s in manifest.shards if s.name not in lost])
        for name in sorted(lost):
            _put_aside(path / SHARDS / name, path / DAMAGED)
        for name in report.tables:
            if name != IMAGES:
                _put_aside(path / name, path / DAMAGED)
        images = sum(s.images for s in manifest.shards if s.name in lost)
        kept = tuple(s for s in manifest.shards if s.name not in lost)
        manifest = replace(manifest, shards=kept, tables={}, complete=False)
        manifest.write(path)
    return Repair(report, tuple(sorted(lost)), tuple(report.tables), images, manifest.rows, manifest.complete)


def _restore_images(path: Path, sound: list[str]) -> set[str]:
    """Make images.parquet again from what the shards say; returns those that do not say it (of an older calib)."""
    found = {name: images_of_meta(path / SHARDS / name / META) for name in sound}
    parts = [placed(images, name) for name, images in found.items() if images is not None]
    if (path / IMAGES).exists():
        _put_aside(path / IMAGES, path / DAMAGED)
    with replacing(path / IMAGES) as target:
        table = pa.concat_tables([IMAGES_SCHEMA.empty_table(), *parts]).combine_chunks()
        pq.write_table(table, target, compression="zstd", write_page_checksum=True)
    return {name for name, images in found.items() if images is None}


def _put_aside(path: Path, folder: Path) -> None:
    if not path.exists():
        return
    folder.mkdir(exist_ok=True)
    target, number = folder / path.name, 1
    while target.exists():
        target, number = folder / f"{path.name}.{number}", number + 1
    path.rename(target)
    fsync_dir(path.parent)
    fsync_dir(folder)
