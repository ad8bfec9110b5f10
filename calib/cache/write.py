"""Writing a cache so that a kill at any moment loses no committed image and doubles none.

A shard is written into a temporary folder, fsynced, renamed, and only then listed in the manifest, which is replaced
in one step. Readers believe the manifest alone; what a killed run left behind is removed by the next one.
"""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from calib.cache.begun import check_request, committed_images, is_beginning, is_cache
from calib.cache.categories import Categories
from calib.cache.check import hash_file
from calib.cache.classifier import Classifier
from calib.cache.image_rows import ImageRows, stack
from calib.cache.matrix import write_matrix
from calib.cache.meta import placed, write_meta
from calib.cache.schema import (
    ANNOTATIONS,
    ANNOTATIONS_SCHEMA,
    CATEGORIES,
    CLASSIFIER,
    FEATURES,
    IMAGES,
    IMAGES_SCHEMA,
    LOCK,
    LOGITS,
    MAPS,
    META,
    META_SCHEMA,
    Manifest,
    Shard,
)
from calib.errors import ExistsError
from calib.files import fsync_dir, lock, replacing

PROBE_ROWS = 16
Files = dict[str, dict[str, Any]]
TABLES = (CATEGORIES, IMAGES, ANNOTATIONS, CLASSIFIER)


class CacheWriter:
    """Adds shards to a cache folder; ``Cache`` reads it. A second writer on the same folder is refused.

    Raises:
        ExistsError: another process is writing here.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._images = IMAGES_SCHEMA.empty_table()
        self._lock = lock(path / LOCK, f"writing the cache {path}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.close()

    @classmethod
    def create(cls, path: Path, manifest: Manifest, categories: Categories, classifier: Classifier) -> "CacheWriter":
        """Start an empty cache.

        Raises:
            ExistsError: the folder holds something already, or another process is writing there.
        """
        if is_cache(path):
            raise ExistsError(
                f"{path} holds a cache already", hint="choose another --out, or add --resume to go on with it"
            )
        if not is_beginning(path):
            raise ExistsError(f"{path} exists and is not empty", hint="choose another --out")
        (path / "shards").mkdir(parents=True, exist_ok=True)
        writer = cls(path, manifest)
        writer._clean()
        writer._write_tables(categories, classifier)
        manifest.write(path)
        return writer

    @classmethod
    def open(cls, path: Path, manifest: Manifest, categories: Categories, classifier: Classifier) -> "CacheWriter":
        """Go on with the cache at ``path``, or start it; tables that a repair took out are written again.

        Raises:
            ExistsError, InputError, FormatError: as ``create`` and ``resume``.
        """
        if not is_cache(path):
            return cls.create(path, manifest, categories, classifier)
        writer = cls.resume(path, manifest)
        if not writer.manifest.complete:
            writer._write_tables(categories, classifier)
        return writer

    @classmethod
    def resume(cls, path: Path, manifest: Manifest) -> "CacheWriter":
        """Go on with a cache that was begun with the same request; removes what was not committed.

        Shards may be missing anywhere, as after a repair: ``is_committed`` says which are there.

        Raises:
            InputError: it was begun with other settings. ExistsError: another process is writing it.
            FormatError: what was committed is damaged.
        """
        Manifest.read(path)
        writer = cls(path, manifest)
        try:
            # Read again under the lock: whoever held it may have committed since.
            writer.manifest = Manifest.read(path)
            check_request(path, writer.manifest, manifest)
            if not writer.manifest.complete:
                writer._clean()
                writer._images = committed_images(path, writer.manifest)
        except BaseException:
            writer.__exit__()
            raise
        return writer

    def _clean(self) -> None:
        """Remove what a killed run left and never committed."""
        (self.path / "shards").mkdir(exist_ok=True)  # a damaged cache may have lost even that
        committed = {s.name for s in self.manifest.shards}
        for folder in (self.path / "shards").iterdir():
            if folder.name not in committed:
                shutil.rmtree(folder)
        for file in self.path.glob(".*.tmp"):
            file.unlink()

    def _write_tables(self, categories: Categories, classifier: Classifier) -> None:
        if not (self.path / CATEGORIES).exists():
            categories.write(self.path / CATEGORIES)
        if not (self.path / CLASSIFIER).exists():
            classifier.write(self.path / CLASSIFIER)

    def is_committed(self, name: str) -> bool:
        """Whether the shard ``name`` is there already."""
        return any(s.name == name for s in self.manifest.shards)

    def write_annotations(self, annotations: dict[str, NDArray[Any]] | pa.Table) -> None:
        """Write the split's ground truth (columns of ANNOTATIONS_SCHEMA)."""
        columns = {n: annotations[n] for n in ANNOTATIONS_SCHEMA.names}
        with replacing(self.path / ANNOTATIONS) as temporary:
            pq.write_table(
                pa.table(columns, schema=ANNOTATIONS_SCHEMA), temporary, compression="zstd", write_page_checksum=True
            )

    def commit(self, name: str, rows: list[ImageRows]) -> None:
        """Write one shard and list it in the manifest.

        Raises:
            NonFiniteError: features or logits that are NaN, or infinite after conversion to the cache's dtype.
        """
        images = _image_table(rows)
        self.commit_files(name, images, lambda folder: self._write_shard(folder, rows, images))

    def commit_files(
        self,
        name: str,
        images: pa.Table,
        fill: Callable[[Path], None],
        describe: Callable[[Files], Files] = lambda files: files,
    ) -> None:
        """Commit the shard whose files ``fill`` writes into the folder it is given.

        ``images``: rows of IMAGES_SCHEMA in the order of their proposals; their place is filled in here. ``describe``
        may add to what the manifest says of the files, or refuse them.
        """
        temporary = self.path / "shards" / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            fill(temporary)
            files = describe({p.name: _describe(p) for p in sorted(temporary.iterdir())})
            fsync_dir(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # where the disk is full, its space is needed
            raise
        temporary.rename(self.path / "shards" / name)
        fsync_dir(self.path / "shards")
        shard = Shard(name, pc.sum(images["n_rows"]).as_py() or 0, len(images), files)
        # A repaired cache has holes: shards are kept by number, so that filled ones stand where they stood.
        shards = tuple(sorted((*self.manifest.shards, shard), key=lambda s: (len(s.name), s.name)))
        whole = pa.concat_tables([self._images, placed(images, name)])
        rank = pc.index_in(whole["shard"], pa.array([s.name for s in shards]))
        self._images = whole.take(pc.sort_indices(rank)).combine_chunks()  # a stable sort
        with replacing(self.path / IMAGES) as target:
            pq.write_table(self._images, target, compression="zstd", write_page_checksum=True)
        self.manifest = replace(self.manifest, shards=shards)
        self.manifest.write(self.path)

    def finish(self) -> None:
        """Mark the cache as complete, with hashes of its tables."""
        tables = {n: _describe(self.path / n) for n in TABLES if (self.path / n).exists()}
        self.manifest = replace(self.manifest, tables=tables, complete=True)
        self.manifest.write(self.path)

    def _write_shard(self, folder: Path, rows: list[ImageRows], images: pa.Table) -> None:
        detector = self.manifest.detector
        features = stack([r.features for r in rows], detector.feature_size, self.manifest.dtype, "features", rows)
        write_matrix(folder / FEATURES, "features", features)
        if self.manifest.logits != "none":
            probe = self.manifest.logits == "probe"
            logits = stack(
                [r.logits for r in rows],
                detector.outputs,
                "float32" if probe else self.manifest.dtype,
                "logits",
                rows,
            )
            write_matrix(folder / LOGITS, "logits", logits[:PROBE_ROWS] if probe else logits)
        if self.manifest.roi_maps:
            maps = [r.maps for r in rows if r.maps is not None]
            width = math.prod(self.manifest.roi_maps)
            write_matrix(folder / MAPS, "maps", stack(maps, width, self.manifest.dtype, "RoI maps", rows))
        meta: dict[str, Any] = {n: np.concatenate([r.meta[n] for r in rows]) if rows else [] for n in META_SCHEMA.names}
        write_meta(folder / META, pa.table(meta, schema=META_SCHEMA), images)


def _image_table(rows: list[ImageRows]) -> pa.Table:
    records = [r.image | {"shard": "", "row_start": 0, "n_rows": len(r.features)} for r in rows]
    return pa.Table.from_pylist(records, schema=IMAGES_SCHEMA)


def _describe(path: Path) -> dict[str, Any]:
    """Bytes and hash of a finished file, made durable on the way."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
    return {"bytes": path.stat().st_size, "xxh3": hash_file(path)}
