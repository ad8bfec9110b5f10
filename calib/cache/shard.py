"""One shard, written image by image into a folder that becomes part of the cache only when it is committed."""

import math
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa

from calib.cache.image_rows import ImageRows, stored
from calib.cache.matrix import MatrixWriter
from calib.cache.meta import write_meta
from calib.cache.schema import IMAGES_SCHEMA, META_SCHEMA, Manifest, of_stage
from calib.errors import ShapeError
from calib.files import fsync_dir, hash_file
from calib.layout import FEATURES, LOGITS, MAPS, META, SHARDS

PROBE_ROWS = 16
Files = dict[str, dict[str, Any]]  # per file name: bytes and hash


@dataclass(frozen=True)
class Prepared:
    """A shard that is whole and durable under a temporary name; any process may have written it."""

    name: str
    folder: Path
    images: pa.Table  # rows of IMAGES_SCHEMA in the order of their proposals; their place is not filled in
    files: Files


def prepare(
    cache: Path,
    name: str,
    fill: Callable[[Path], pa.Table],
    describe: Callable[[Files], Files] = lambda files: files,
) -> Prepared:
    """Let ``fill`` write the files of shard ``name`` into a temporary folder of ``cache``; it returns the images.

    ``describe`` may add to what the manifest will say of the files, or refuse them. On any error the folder goes: where
    the disk is full, its space is needed.
    """
    # A name of its own: after the loss of a machine, two may write the same shard for a moment.
    folder = cache / SHARDS / f".{name}.{uuid4().hex}.tmp"
    folder.mkdir()
    try:
        images = fill(folder)
        files = describe({p.name: describe_file(p) for p in sorted(folder.iterdir())})
        fsync_dir(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Prepared(name, folder, images, files)


def describe_file(path: Path) -> dict[str, Any]:
    """Bytes and hash of a finished file, made durable on the way."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
    return {"bytes": path.stat().st_size, "xxh3": hash_file(path)}


def row_bytes(manifest: Manifest) -> int:
    """What a row takes on disk, at most, in all stages: matrices as they are stored, meta data uncompressed."""
    detector, size = manifest.detector, np.dtype(manifest.dtype).itemsize
    outputs = detector.outputs if manifest.logits == "full" else 0
    maps = math.prod(manifest.roi_maps) if manifest.roi_maps else 0
    meta: int = sum(f.type.bit_width for f in META_SCHEMA) // 8
    return detector.stages * (size * (detector.feature_size + outputs + maps) + meta)


def write_images(folder: Path, manifest: Manifest, rows: Iterable[ImageRows]) -> pa.Table:
    """Write the files of a shard as its images come; returns the images as ``prepare`` wants them.

    Raises:
        NonFiniteError: features, logits or maps that are NaN, or infinite after conversion to the cache's dtype.
    """
    records: list[dict[str, Any]] = []
    stages = manifest.detector.stages
    metas: list[list[dict[str, Any]]] = [[] for _ in range(stages)]
    with ExitStack() as stack:
        sinks = [[stack.enter_context(s) for s in _sinks(folder, manifest, k)] for k in range(stages)]
        for one in rows:
            for k, part in enumerate(_stages(one, stages)):
                for sink in sinks[k]:
                    sink.add(part)
                metas[k].append(part.meta)
            records.append(one.image | {"shard": "", "row_start": 0, "n_rows": len(one.features)})
    images = pa.Table.from_pylist(records, schema=IMAGES_SCHEMA)
    for k, meta in enumerate(metas):
        columns: dict[str, Any] = {n: np.concatenate([m[n] for m in meta]) if meta else [] for n in META_SCHEMA.names}
        write_meta(folder / of_stage(META, k), pa.table(columns, schema=META_SCHEMA), images)
    return images


def _stages(one: ImageRows, count: int) -> tuple[ImageRows, ...]:
    if len(one.stages) != count:
        raise ShapeError(f"image {one.image['image_id']} has rows of {len(one.stages)} stages: expected {count}")
    return one.stages


class _Sink:
    """One matrix of a shard: the attribute ``what`` of every image, its first ``most`` rows where that is set."""

    def __init__(self, path: Path, what: str, dtype: str, width: int, most: int | None = None) -> None:
        self._file = MatrixWriter(path, what, np.dtype(dtype), width)
        self._what, self._dtype, self._left = what, dtype, most

    def __enter__(self) -> "_Sink":
        return self

    def __exit__(self, *exc: Any) -> None:
        self._file.__exit__(*exc)

    def add(self, one: ImageRows) -> None:
        name = "RoI maps" if self._what == "maps" else self._what
        part = stored(getattr(one, self._what), self._dtype, name, one.image["image_id"])
        if self._left is not None:
            part = part[: self._left]
            self._left -= len(part)
        self._file.add(part)


def _sinks(folder: Path, manifest: Manifest, stage: int) -> Iterable[_Sink]:
    detector, dtype = manifest.detector, manifest.dtype
    features, logits, maps = (folder / of_stage(name, stage) for name in (FEATURES, LOGITS, MAPS))
    yield _Sink(features, "features", dtype, detector.feature_size)
    if manifest.logits == "full":
        yield _Sink(logits, "logits", dtype, detector.outputs)
    elif manifest.logits == "probe":
        yield _Sink(logits, "logits", "float32", detector.outputs, PROBE_ROWS)
    if manifest.roi_maps:
        yield _Sink(maps, "maps", dtype, math.prod(manifest.roi_maps))
