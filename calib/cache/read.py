"""Reading a cache: tables as NumPy columns, features and logits by row ranges without loading the rest.

Letters: N rows (proposals) of the whole cache, D feature size, C foreground classes.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from calib.cache.categories import Categories
from calib.cache.check import check_files
from calib.cache.classifier import Classifier
from calib.cache.matrix import MatrixFile
from calib.cache.schema import (
    ANNOTATIONS,
    ANNOTATIONS_SCHEMA,
    CATEGORIES,
    CLASSIFIER,
    FEATURES,
    IMAGES,
    IMAGES_SCHEMA,
    LOGITS,
    MAPS,
    META,
    META_SCHEMA,
    Manifest,
)
from calib.errors import FormatError, InputError, NonFiniteError, ShapeError
from calib.files import require

Rows = NDArray[np.int64]

_INFINITE_FLOAT16 = 0x7C00  # its bits


class Cache:
    """An opened feature cache.

    Rows are numbered 0..N-1 over all shards; ``image_start[i]:image_start[i + 1]`` are the rows of the i-th image.
    """

    def __init__(self, path: Path) -> None:
        """Open and verify ``path`` (every file's hash is checked once, see ``check.py``).

        Raises:
            MissingFileError, FormatError, VersionError, ShapeError: see the messages.
        """
        self.path = path
        self.manifest = Manifest.read(path)
        if not self.manifest.complete:
            raise InputError(
                f"cache {path} is not complete: extraction stopped after {len(self.manifest.shards)} shards",
                hint="run the same calib extract command with --resume",
            )
        check_files(path, self.manifest)
        self.categories = Categories.read(path / CATEGORIES)
        self.classifier = Classifier.read(path / CLASSIFIER)
        self._check_shapes()

    def _check_shapes(self) -> None:
        detector = self.manifest.detector
        expected = (detector.outputs, detector.feature_size)
        if self.classifier.weight.shape != expected or len(self.categories) != detector.num_classes:
            raise ShapeError(
                f"cache {self.path}: the manifest says classifier {list(expected)}, the files hold "
                f"{list(self.classifier.weight.shape)} with {len(self.categories)} categories",
                hint="extract it again",
            )
        if self.image_start[-1] != self.manifest.rows:
            raise ShapeError(
                f"{self.path / IMAGES} places {self.image_start[-1]} rows; the manifest lists {self.manifest.rows}",
                hint="extract it again",
            )
        if self.classifier.digest() != detector.digest:
            raise FormatError(
                f"{self.path / CLASSIFIER} is not the one the cache was written with",
                hint="extract it again",
            )

    @property
    def n_rows(self) -> int:
        """N."""
        return self.manifest.rows

    @property
    def background(self) -> int:
        """The label of background rows: C."""
        return len(self.categories)

    @property
    def digest(self) -> str:
        """Identifies the content: two caches with equal digests hold equal rows."""
        import xxhash

        parts = [f"{s.name}{f}{d['xxh3']}" for s in self.manifest.shards for f, d in sorted(s.files.items())]
        return xxhash.xxh3_64("".join([self.manifest.detector.digest, *parts]).encode()).hexdigest()

    def _shard_files(self, name: str) -> list[Path]:
        return [self.path / "shards" / s.name / name for s in self.manifest.shards]

    @cached_property
    def features(self) -> "RowMatrix":
        """[N, D] input of the classifier."""
        return self._matrix(FEATURES, self.manifest.detector.feature_size)

    @cached_property
    def logits(self) -> "RowMatrix | None":
        """[N, C+1] ([N, C] of a sigmoid detector) logits as computed, background last; None unless stored in full."""
        if self.manifest.logits != "full":
            return None
        return self._matrix(LOGITS, self.manifest.detector.outputs)

    @cached_property
    def maps(self) -> "RowMatrix | None":
        """[N, channels * height * width] RoI maps; None unless they were asked for."""
        shape = self.manifest.roi_maps
        return self._matrix(MAPS, math.prod(shape)) if shape else None

    def _matrix(self, name: str, width: int) -> "RowMatrix":
        files = [MatrixFile(p) for p in self._shard_files(name)]
        for file, shard in zip(files, self.manifest.shards, strict=True):
            if file.shape != (shard.rows, width):
                raise ShapeError(
                    f"{file.path} has shape {list(file.shape)}: the manifest says {[shard.rows, width]}",
                    hint="extract the cache again",
                )
        return RowMatrix(files, width)

    def meta(self, *columns: str) -> list[NDArray[Any]]:
        """Columns of META_SCHEMA over all rows, each [N]."""
        schema = pa.schema([META_SCHEMA.field(c) for c in columns])
        tables = [_read_table(p, schema) for p in self._shard_files(META)] or [schema.empty_table()]
        whole = pa.concat_tables(tables)
        if len(whole) != self.n_rows:
            raise ShapeError(
                f"{META} of cache {self.path} has {len(whole)} rows in all; the manifest lists {self.n_rows}",
                hint="extract the cache again",
            )
        return [whole[c].to_numpy() for c in columns]

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """[N] class index, C for background, -1 for rows to ignore."""
        return np.asarray(self.meta("label")[0])

    @cached_property
    def images(self) -> pa.Table:
        """One row per image, in row order."""
        return _read_table(self.path / IMAGES, IMAGES_SCHEMA)

    @cached_property
    def image_start(self) -> Rows:
        """[n_images + 1] first row of every image."""
        return np.concatenate([[0], np.cumsum(self.images["n_rows"].to_numpy())])

    def annotations(self) -> pa.Table:
        """The split's ground truth.

        Raises:
            MissingFileError: the split has none.
        """
        return _read_table(require(self.path / ANNOTATIONS, "ground truth of the cache"), ANNOTATIONS_SCHEMA)


class RowMatrix:
    """A [N, D] matrix over the shards of a cache, read by ranges or by row numbers."""

    def __init__(self, files: Sequence[MatrixFile], width: int) -> None:
        self._files = files
        self._starts = [0, *accumulate(f.shape[0] for f in files)]
        self.shape = (self._starts[-1], width)

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""
        return self._files[0].dtype if self._files else np.dtype(np.float32)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start:stop`` as float32 [stop - start, D].

        Raises:
            NonFiniteError: NaN or infinity in the file.
        """
        out = np.empty((stop - start, self.shape[1]), np.float32)
        self._fill(start, stop, out)
        self._check_finite(out)
        return out

    def take(self, rows: Rows, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """The given rows [len(rows), D], float32 or in ``out`` as its dtype has it; a run of rows costs one copy.

        Raises:
            NonFiniteError: NaN or infinity in the file.
        """
        out = np.empty((len(rows), self.shape[1]), np.float32) if out is None else out
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        edges = [0, *breaks.tolist(), len(rows)] if len(rows) else [0]
        for (low, high), first in zip(pairwise(edges), rows[edges[:-1]].tolist(), strict=True):
            self._fill(first, first + high - low, out[low:high])
        self._check_finite(out)
        return out

    def _fill(self, start: int, stop: int, out: NDArray[Any]) -> None:
        shard = bisect_right(self._starts, start) - 1
        done = 0
        while done < stop - start:
            first = start + done - self._starts[shard]
            count = min(stop - start - done, self._files[shard].shape[0] - first)
            self._files[shard].read(first, first + count, out[done : done + count])
            done += count
            shard += 1

    def _check_finite(self, out: NDArray[Any]) -> None:
        # Cheaper than a test of every element, and never wrong about finite numbers alone: a sum is finite only if its
        # terms are, and the bits of a float16 without its sign rise with its value, infinity above all numbers.
        if out.dtype == np.float16:
            bits = out.view(np.uint16) & np.uint16(0x7FFF)
            suspicious = bool(bits.max(initial=0) >= _INFINITE_FLOAT16)
        else:
            with np.errstate(invalid="ignore", over="ignore"):
                suspicious = not np.isfinite(out.sum())
        if suspicious and not np.isfinite(out).all():
            folder = self._files[0].path.parents[2]
            raise NonFiniteError(
                f"cache {folder} holds NaN or infinite numbers in {self._files[0].path.name}",
                hint="extract it again",
            )


def _read_table(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        table = pq.read_table(require(path, "cache file"), columns=schema.names, page_checksum_verification=True)
    except (pa.ArrowException, OSError, KeyError) as e:
        raise FormatError(f"cache file {path} cannot be read: {e}", hint="extract the cache again") from e
    if table.schema.types != schema.types:
        raise FormatError(
            f"cache file {path} has columns {table.schema.to_string(show_schema_metadata=False)!r}: expected "
            f"{schema.to_string()!r}",
            hint="extract the cache again",
        )
    return table
