"""Writing a cache so that a kill at any moment loses no committed image and doubles none.

A shard is written into a temporary folder, fsynced, renamed, and only then listed in the manifest, which is replaced
in one step. Readers believe the manifest alone; what a killed run left behind is removed by the next one.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from calib.cache.categories import Categories
from calib.cache.classifier import Classifier
from calib.cache.image_rows import ImageRows
from calib.cache.meta import placed
from calib.cache.schema import IMAGES_SCHEMA, Manifest, Shard
from calib.cache.shard import Files, Prepared, describe_file, prepare, write_images
from calib.cache.tables import completed
from calib.cache.unfinished import check_free, check_request, committed_images, is_cache
from calib.errors import DiskFullError
from calib.files import fsync_dir, lock, replacing
from calib.layout import ANNOTATIONS, CATEGORIES, CLASSIFIER, HIDDEN_LOCK, IMAGES, SHARDS

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
        self._lock = lock(path / HIDDEN_LOCK, f"writing the cache {path}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object = None, error: BaseException | None = None, trace: object = None) -> None:
        self._lock.close()
        if isinstance(error, OSError) and error.errno in FULL:
            raise DiskFullError(
                f"writing the cache {self.path}: {os.strerror(error.errno or 0)}",
                hint=f"is there space on the disk? the {len(self.manifest.shards)} shards that were committed are "
                "whole: make room and run the same command again (calib extract: with --resume)",
            ) from error

    @classmethod
    def create(cls, path: Path, manifest: Manifest, categories: Categories, classifier: Classifier) -> "CacheWriter":
        """Start an empty cache.

        Raises:
            ExistsError: the folder holds something already, or another process is writing there.
        """
        check_free(path)
        (path / SHARDS).mkdir(parents=True, exist_ok=True)
        writer = cls(path, manifest)
        writer.clean()
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
                writer.manifest = replace(writer.manifest, style=manifest.style)
                writer.clean()
                writer._images = committed_images(path, writer.manifest)
        except BaseException:
            writer.__exit__()
            raise
        return writer

    def clean(self) -> None:
        """Remove what was never committed: by a run that was killed, or by processes that are gone."""
        (self.path / SHARDS).mkdir(exist_ok=True)  # a damaged cache may have lost even that
        committed = {s.name for s in self.manifest.shards}
        for folder in (self.path / SHARDS).iterdir():
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
        """Write the split's ground truth (columns of ANNOTATIONS_SCHEMA); nothing where the style says it has none."""
        if self.manifest.style == "none":
            return
        with replacing(self.path / ANNOTATIONS) as temporary:
            pq.write_table(completed(annotations), temporary, compression="zstd", write_page_checksum=True)

    def commit(self, name: str, rows: Iterable[ImageRows]) -> None:
        """Write one shard, image by image as ``rows`` gives them, and list it in the manifest.

        Raises:
            NonFiniteError: features or logits that are NaN, or infinite after conversion to the cache's dtype.
        """
        self.commit_files(name, lambda folder: write_images(folder, self.manifest, rows))

    def commit_files(
        self,
        name: str,
        fill: Callable[[Path], pa.Table],
        describe: Callable[[Files], Files] = lambda files: files,
    ) -> None:
        """Commit the shard whose files ``fill`` writes (see ``prepare``)."""
        self.admit(prepare(self.path, name, fill, describe))

    def admit(self, shard: Prepared) -> None:
        """Make a shard that lies ready part of the cache."""
        shard.folder.rename(self.path / SHARDS / shard.name)
        fsync_dir(self.path / SHARDS)
        images = shard.images
        entry = Shard(shard.name, pc.sum(images["n_rows"]).as_py() or 0, len(images), shard.files)
        # Shards are kept by number: in whatever order they come, and where a repair left holes.
        shards = tuple(sorted((*self.manifest.shards, entry), key=lambda s: (len(s.name), s.name)))
        whole = pa.concat_tables([self._images, placed(images, shard.name)])
        rank = pc.index_in(whole["shard"], pa.array([s.name for s in shards]))
        self._images = whole.take(pc.sort_indices(rank)).combine_chunks()  # a stable sort
        with replacing(self.path / IMAGES) as target:
            pq.write_table(self._images, target, compression="zstd", write_page_checksum=True)
        self.manifest = replace(self.manifest, shards=shards)
        self.manifest.write(self.path)

    def finish(self) -> None:
        """Mark the cache as complete, with hashes of its tables."""
        tables = {n: describe_file(self.path / n) for n in TABLES if (self.path / n).exists()}
        self.manifest = replace(self.manifest, tables=tables, complete=True)
        self.manifest.write(self.path)
