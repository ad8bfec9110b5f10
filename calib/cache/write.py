"""Writing a cache so that a kill at any moment loses no committed image and doubles none.

A shard is written into a temporary folder, fsynced, renamed, and only then listed in the manifest, which is replaced
in one step. Readers believe the manifest alone; what a killed run left behind is removed by the next one.
"""

import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from calib.cache.categories import Categories
from calib.cache.classifier import Classifier
from calib.cache.matrix import write_matrix
from calib.cache.schema import (
    ANNOTATIONS,
    ANNOTATIONS_SCHEMA,
    CATEGORIES,
    CLASSIFIER,
    FEATURES,
    IMAGES,
    IMAGES_SCHEMA,
    LOGITS,
    MANIFEST,
    MAPS,
    META,
    META_SCHEMA,
    Manifest,
    Shard,
)
from calib.errors import ExistsError, FormatError, InputError, NonFiniteError, ShapeError
from calib.files import fsync_dir, lock, replacing, require

PROBE_ROWS = 16
LOCK = ".lock"
TABLES = (CATEGORIES, IMAGES, ANNOTATIONS, CLASSIFIER)


@dataclass(frozen=True)
class ImageRows:
    """All proposals of one image, in the order they are stored. ``meta`` holds the columns of META_SCHEMA."""

    image: dict[str, Any]
    meta: dict[str, NDArray[Any]]
    features: NDArray[np.float32]  # [n, D]
    logits: NDArray[np.float32]  # [n, C+1], background last
    maps: NDArray[np.float32] | None = None  # [n, channels * height * width]

    def __post_init__(self) -> None:
        n = len(self.features)
        parts = {**self.meta, "logits": self.logits} | ({} if self.maps is None else {"maps": self.maps})
        uneven = {k: len(v) for k, v in parts.items() if len(v) != n}
        if uneven:
            raise ShapeError(
                f"image {self.image['image_id']} has {n} feature rows but {uneven}: rows must be the same RoIs"
            )


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
        if not _is_beginning(path):
            raise ExistsError(f"{path} exists and is not empty", hint="choose another --out")
        (path / "shards").mkdir(parents=True, exist_ok=True)
        writer = cls(path, manifest)
        writer._clean()
        categories.write(path / CATEGORIES)
        classifier.write(path / CLASSIFIER)
        manifest.write(path)
        return writer

    @classmethod
    def resume(cls, path: Path, manifest: Manifest) -> "CacheWriter":
        """Go on with a cache that was begun with the same request; removes what was not committed.

        Raises:
            InputError: it was begun with other settings. ExistsError: another process is writing it.
            FormatError: what was committed is damaged.
        """
        Manifest.read(path)
        writer = cls(path, manifest)
        try:
            # Read again under the lock: whoever held it may have committed since.
            writer.manifest = Manifest.read(path)
            _check_request(path, writer.manifest, manifest)
            if not writer.manifest.complete:
                writer._clean()
                writer._images = _committed_images(path, writer.manifest)
        except BaseException:
            writer.__exit__()
            raise
        return writer

    def _clean(self) -> None:
        """Remove what a killed run left and never committed."""
        committed = {s.name for s in self.manifest.shards}
        for folder in (self.path / "shards").iterdir():
            if folder.name not in committed:
                shutil.rmtree(folder)
        for file in self.path.glob(".*.tmp"):
            file.unlink()

    def write_annotations(self, annotations: dict[str, NDArray[Any]]) -> None:
        """Write the split's ground truth (columns of ANNOTATIONS_SCHEMA)."""
        with replacing(self.path / ANNOTATIONS) as temporary:
            pq.write_table(
                pa.table(annotations, schema=ANNOTATIONS_SCHEMA),
                temporary,
                compression="zstd",
                write_page_checksum=True,
            )

    def commit(self, name: str, rows: list[ImageRows]) -> None:
        """Write one shard and list it in the manifest.

        Raises:
            NonFiniteError: features or logits that are NaN, or infinite after conversion to the cache's dtype.
        """
        temporary = self.path / "shards" / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        self._write_shard(temporary, rows)
        files = {p.name: _describe(p) for p in sorted(temporary.iterdir())}
        fsync_dir(temporary)
        temporary.rename(self.path / "shards" / name)
        fsync_dir(self.path / "shards")
        self._images = pa.concat_tables([self._images, _image_table(name, rows)])
        with replacing(self.path / IMAGES) as target:
            pq.write_table(self._images, target, compression="zstd", write_page_checksum=True)
        shard = Shard(name, sum(len(r.features) for r in rows), len(rows), files)
        self.manifest = replace(self.manifest, shards=(*self.manifest.shards, shard))
        self.manifest.write(self.path)

    def finish(self) -> None:
        """Mark the cache as complete, with hashes of its tables."""
        tables = {n: _describe(self.path / n) for n in TABLES if (self.path / n).exists()}
        self.manifest = replace(self.manifest, tables=tables, complete=True)
        self.manifest.write(self.path)

    def _write_shard(self, folder: Path, rows: list[ImageRows]) -> None:
        detector = self.manifest.detector
        features = _stack([r.features for r in rows], detector.feature_size, self.manifest.dtype, "features", rows)
        write_matrix(folder / FEATURES, "features", features)
        if self.manifest.logits != "none":
            probe = self.manifest.logits == "probe"
            logits = _stack(
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
            write_matrix(folder / MAPS, "maps", _stack(maps, width, self.manifest.dtype, "RoI maps", rows))
        meta: dict[str, Any] = {n: np.concatenate([r.meta[n] for r in rows]) if rows else [] for n in META_SCHEMA.names}
        pq.write_table(pa.table(meta, schema=META_SCHEMA), folder / META, compression="zstd", write_page_checksum=True)


def _is_beginning(path: Path) -> bool:
    """Whether ``path`` is absent, empty, or left by a run that was killed before its first manifest."""
    if not path.exists():
        return True
    if not path.is_dir():
        return False
    own = {"shards", LOCK, CATEGORIES, CLASSIFIER}
    strange = [p for p in path.iterdir() if p.name not in own and not _is_temporary(p.name)]
    return not strange and not ((path / "shards").is_dir() and any((path / "shards").iterdir()))


def _is_temporary(name: str) -> bool:
    return name.endswith(".tmp") and any(name.startswith(f".{n}.") for n in (CATEGORIES, CLASSIFIER, MANIFEST))


def _check_request(path: Path, found: Manifest, asked: Manifest) -> None:
    ours, theirs = asked.request(), found.request()
    changed = [k for k in ours if k != "source" and theirs.get(k) != ours[k]]
    changed += [k for k, v in asked.source.items() if found.source.get(k) != v]
    if changed:
        raise InputError(
            f"cache {path} was begun with other settings ({', '.join(changed)})",
            hint="use the settings it was begun with, or another --out",
        )


def _committed_images(path: Path, manifest: Manifest) -> pa.Table:
    if not manifest.shards:
        return IMAGES_SCHEMA.empty_table()
    try:
        table = pq.read_table(require(path / IMAGES, "cache file"), schema=IMAGES_SCHEMA)
    except (pa.ArrowException, OSError) as e:
        raise FormatError(f"cache file {path / IMAGES} cannot be read: {e}", hint="extract into another --out") from e
    return table.filter(pc.is_in(table["shard"], pa.array(sorted(s.name for s in manifest.shards))))


def _stack(parts: list[NDArray[np.float32]], width: int, dtype: str, what: str, rows: list[ImageRows]) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # an overflow to infinity is reported below, with the image's name
        converted = [p.astype(dtype) for p in parts]
    whole = np.concatenate([np.empty((0, width), dtype), *converted])
    if not np.isfinite(whole).all():
        bad = next(r for r, p in zip(rows, converted, strict=True) if not np.isfinite(p).all())
        image_id = bad.image["image_id"]
        if all(np.isfinite(p).all() for p in parts):
            raise NonFiniteError(
                f"{what} of image {image_id} exceed the range of {dtype}", hint="extract with --dtype float32"
            )
        raise NonFiniteError(f"the detector gave NaN or infinite {what} for image {image_id}", hint="check its weights")
    return whole


def _image_table(shard: str, rows: list[ImageRows]) -> pa.Table:
    counts = np.asarray([len(r.features) for r in rows], np.int64)
    starts = np.cumsum(counts) - counts
    records = [
        r.image | {"shard": shard, "row_start": int(s), "n_rows": int(n)}
        for r, s, n in zip(rows, starts, counts, strict=True)
    ]
    return pa.Table.from_pylist(records, schema=IMAGES_SCHEMA)


def _describe(path: Path) -> dict[str, Any]:
    """Bytes and hash of a finished file, made durable on the way."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        digest = xxhash.xxh3_64()
        while block := f.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh3": digest.hexdigest()}


def is_cache(path: Path) -> bool:
    """Whether ``path`` holds a cache, complete or begun."""
    return (path / MANIFEST).is_file()
