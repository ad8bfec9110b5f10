"""Reading a cache: tables as NumPy columns, features and logits by row ranges without loading the rest.

Letters: N rows (proposals) of the whole cache, D feature size, C foreground classes.
"""

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from calib.cache.categories import Categories
from calib.cache.check import check_files
from calib.cache.classifier import Classifier
from calib.cache.damage import find_damage
from calib.cache.disk import allow_open
from calib.cache.matrix import MatrixFile
from calib.cache.mirrored import MirroredMatrix, metas
from calib.cache.rows import RowMatrix, Rows
from calib.cache.schema import IMAGES_SCHEMA, META_SCHEMA, Manifest, of_stage
from calib.cache.tables import read_annotations, read_table
from calib.errors import FormatError, InputError, MissingFileError, ShapeError, UnsupportedError
from calib.layout import ANNOTATIONS, CATEGORIES, CLASSIFIER, FEATURES, IMAGES, LOGITS, MAPS, META, SHARDS
from calib.storage.mirror import origin
from calib.tables import Tables


class Cache(Tables):
    """An opened feature cache.

    Rows are numbered 0..N-1 over all shards; ``image_start[i]:image_start[i + 1]`` are the rows of the i-th image. Rows
    of a cascade are those of one of its ``stages``: the whole has none of its own.
    """

    _stage = 0

    def __init__(self, path: Path) -> None:
        """Open and verify ``path`` (every file's hash is checked once, see ``check.py``).

        Raises:
            MissingFileError, FormatError, VersionError, ShapeError: see the messages.
        """
        manifest = Manifest.read(path)
        if manifest.layout == "archive":
            raise InputError(
                f"cache {path} is an archive: compressed matrices cannot be mapped",
                hint=f"calib cache unpack {path} --out FOLDER, and use that folder",
            )
        if not manifest.complete:
            raise InputError(
                f"cache {path} is not complete: writing stopped after {len(manifest.shards)} shards",
                hint="run the command that began it again (calib extract: with --resume)",
            )
        # Of a cache in the mirror only small files are here by now; others are checked when they are fetched.
        check_files(path, manifest, only=None if origin(path) is None else frozenset(metas(manifest)))
        self._open(path, manifest)

    def tables(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """One row."""
        row = {"mode": self.manifest.mode, "images": len(self.images), "rows": self.n_rows}
        row |= {"classes": len(self.categories), "features": self.manifest.detector.feature_size}
        if self.manifest.detector.stages > 1:
            row["stages"] = self.manifest.detector.stages
        return [(f"cache {self.path}", [row])]

    @classmethod
    def sound_part(cls, path: Path) -> "Cache":
        """What can still be read of a cache with damaged or missing shards: the others, in their order.

        Raises:
            FormatError: one of its tables is damaged too. Others as for a whole cache.
        """
        report = find_damage(path)
        if report.tables:
            raise FormatError(
                f"cache {path}: {', '.join(report.tables)} cannot be read", hint="run calib cache repair on it first"
            )
        whole = Manifest.read(path)
        manifest = replace(whole, shards=tuple(s for s in whole.shards if s.name not in report.shards))
        images = read_table(path / IMAGES, IMAGES_SCHEMA)
        kept = pa.array([s.name for s in manifest.shards], pa.string())
        cache = cls.__new__(cls)
        cache.images = images.filter(pc.is_in(images["shard"], kept))
        cache._open(path, manifest)
        return cache

    def _open(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
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
        if len(self.classifier.stages) != detector.stages:
            raise ShapeError(
                f"cache {self.path}: the manifest says {detector.stages} stages, the classifier has "
                f"{len(self.classifier.stages)}",
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
        return self.manifest.digest

    @cached_property
    def stages(self) -> "tuple[Cache, ...]":
        """The cache of every stage of a cascade, first to last, each like that of a detector with this stage alone;
        itself where there is one."""
        detector = self.manifest.detector
        if detector.stages == 1:
            return (self,)
        return tuple(self._of_stage(k, classifier) for k, classifier in enumerate(self.classifier.stages))

    def _of_stage(self, number: int, classifier: Classifier) -> "Cache":
        one = Cache.__new__(Cache)
        detector = replace(self.manifest.detector, stages=1, digest=classifier.digest())
        one.path, one.manifest = self.path, replace(self.manifest, detector=detector)
        one.categories, one.classifier, one.images, one._stage = self.categories, classifier, self.images, number
        return one

    def _shard_files(self, name: str) -> list[Path]:
        if self.manifest.detector.stages > 1:
            raise UnsupportedError(
                f"cache {self.path} is of a cascade of {self.manifest.detector.stages} stages: rows are of one of them",
                hint="Cache.stages gives one cache per stage",
            )
        return [self.path / SHARDS / s.name / of_stage(name, self._stage) for s in self.manifest.shards]

    @cached_property
    def features(self) -> RowMatrix:
        """[N, D] input of the classifier."""
        return self._matrix(FEATURES, self.manifest.detector.feature_size)

    @cached_property
    def logits(self) -> RowMatrix | None:
        """[N, C+1] logits as computed, background last ([N, C] of a sigmoid detector, [N, C+2] of a seesaw one); None
        unless stored in full."""
        if self.manifest.logits != "full":
            return None
        return self._matrix(LOGITS, self.manifest.detector.outputs)

    @cached_property
    def maps(self) -> RowMatrix | None:
        """[N, channels * height * width] RoI maps; None unless they were asked for."""
        shape = self.manifest.roi_maps
        return self._matrix(MAPS, math.prod(shape)) if shape else None

    def _matrix(self, name: str, width: int) -> RowMatrix:
        files = self._mirrored(name, width) or self._mapped(name)
        for file, shard in zip(files, self.manifest.shards, strict=True):
            if file.shape != (shard.rows, width):
                raise ShapeError(
                    f"{file.path} has shape {list(file.shape)}: the manifest says {[shard.rows, width]}",
                    hint="extract the cache again",
                )
        return RowMatrix(files, width)

    def _mapped(self, name: str) -> list[MatrixFile | MirroredMatrix]:
        paths = self._shard_files(name)
        allow_open(len(paths))
        return [MatrixFile(p) for p in paths]

    def _mirrored(self, name: str, width: int) -> list[MatrixFile | MirroredMatrix]:
        if origin(self.path) is None:
            return []
        dtype, file = self.manifest.dtype, of_stage(name, self._stage)
        return [
            MirroredMatrix(self.path, f"{SHARDS}/{s.name}/{file}", s.files[file], dtype, (s.rows, width))
            for s in self.manifest.shards
        ]

    def meta(self, *columns: str) -> list[NDArray[Any]]:
        """Columns of META_SCHEMA over all rows, each [N]."""
        schema = pa.schema([META_SCHEMA.field(c) for c in columns])
        tables = [read_table(p, schema) for p in self._shard_files(META)] or [schema.empty_table()]
        whole = pa.concat_tables(tables)
        if len(whole) != self.n_rows:
            raise ShapeError(
                f"{META} of cache {self.path} has {len(whole)} rows in all; the manifest lists {self.n_rows}",
                hint="extract the cache again",
            )
        return [whole[c].to_numpy() for c in columns]

    def meta_of(self, rows: Rows) -> pa.Table:
        """All columns of META_SCHEMA of the given ascending rows; only the shards they lie in are read."""
        starts = np.cumsum([0, *(s.rows for s in self.manifest.shards)])
        shard = np.searchsorted(starts, rows, side="right") - 1
        parts = [META_SCHEMA.empty_table()]
        for k in np.unique(shard):
            table = read_table(self._shard_files(META)[k], META_SCHEMA)
            parts.append(table.take(rows[shard == k] - starts[k]))
        return pa.concat_tables(parts)

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """[N] class index, C for background, -1 for rows to ignore."""
        return np.asarray(self.meta("label")[0])

    @cached_property
    def images(self) -> pa.Table:
        """One row per image, in row order."""
        return read_table(self.path / IMAGES, IMAGES_SCHEMA)

    @cached_property
    def image_start(self) -> Rows:
        """[n_images + 1] first row of every image."""
        return np.concatenate([[0], np.cumsum(self.images["n_rows"].to_numpy())])

    def annotations(self) -> pa.Table:
        """The split's ground truth.

        Raises:
            MissingFileError: the split has none.
        """
        if self.manifest.style == "none":
            raise MissingFileError(
                f"cache {self.path} has no ground truth: its images are not annotated",
                hint="it was extracted from a list of images (image_info); calib evaluate takes the split's json by "
                "--annotations (--style coco for COCO's); other commands need a cache that is extracted from it",
            )
        return read_annotations(self.path / ANNOTATIONS)
