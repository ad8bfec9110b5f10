"""DuckDB views over what calib writes: result folders, feature caches and detections files.

A path is recognised by what it holds. Views: ``results`` and ``summary`` (one row per run and category, one
per run; column ``run`` is the folder's name), ``matches`` (one row per detection and run, see
``calib.evaluate.matches_table``), ``detections`` (``run`` is the file's name without ending),
``categories``, ``meta``, ``images``, ``annotations`` and ``classifier`` (``cache`` is the folder's name). A
view exists if something given holds its data. Files are read when a query needs them, and only the columns it
needs.

No SQL is put together here: paths and names enter through DuckDB's relational interface.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from calib.cache import Classifier, Manifest
from calib.cache.check import check_files
from calib.errors import FormatError, InputError
from calib.files import read_json, require
from calib.layout import (
    ANNOTATIONS,
    CATEGORIES,
    CLASSIFIER,
    IMAGES,
    MANIFEST,
    MATCHES,
    META,
    PER_CATEGORY,
    SHARDS,
    SUMMARY,
)

RESULT_COLUMNS = frozenset({"category_id", "name", "instance_count", "n_gt", "n_det", "AP", "AP50", "AR"})
DETECTION_COLUMNS = frozenset({"image_id", "category_id", "score", "x1", "y1", "x2", "y2"})

SOURCES = {
    "results": "a result folder (calib evaluate --out DIR)",
    "summary": "a result folder (calib evaluate --out DIR)",
    "matches": "a result folder with matches (calib evaluate --matches --out DIR)",
    "detections": "a detections file (calib score --out FILE.parquet)",
    "categories": "a feature cache (calib extract --out CACHE)",
    "classifier": "a feature cache (calib extract --out CACHE)",
    "images": "a feature cache (calib extract --out CACHE)",
    "meta": "a feature cache with at least one shard (calib extract --out CACHE)",
    "annotations": "a feature cache of an annotated split (calib extract --annotations A.json --out CACHE)",
}


@dataclass
class Views:
    """An in-memory DuckDB with the views of ``paths``. Close it, or use it in a ``with`` statement."""

    connection: duckdb.DuckDBPyConnection
    runs: list[str] = field(default_factory=list)  # result folders, as given
    names: set[str] = field(default_factory=set)  # views that exist

    def __enter__(self) -> "Views":
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()


def open_views(paths: Sequence[Path]) -> Views:
    """Create the views over ``paths``.

    Raises:
        MissingFileError: a path, or a file that a manifest lists, does not exist.
        FormatError: a path holds nothing that calib writes, or something damaged.
        VersionError: a cache of another format version.
        InputError: two results, caches or detections files have one name.
    """
    views = Views(duckdb.connect(":memory:"))
    try:
        _Builder(views).build(paths)
    except BaseException:
        views.connection.close()
        raise
    return views


class _Builder:
    """Collects what belongs to each view over all paths, then creates the views."""

    def __init__(self, views: Views) -> None:
        self.views = views
        self.relations: dict[str, list[duckdb.DuckDBPyRelation]] = {}
        self.tables: dict[str, list[pa.Table]] = {}
        self.seen: dict[tuple[str, str], Path] = {}

    def build(self, paths: Sequence[Path]) -> None:
        for path in paths:
            self._add(require(path, "path").resolve())
        for name, relations in self.relations.items():
            _union(relations).create_view(name)
        for name, tables in self.tables.items():
            self.views.connection.register(name, pa.concat_tables(tables, promote_options="default"))
        self.views.names = {*self.relations, *self.tables}

    def _add(self, path: Path) -> None:
        if (path / PER_CATEGORY).is_file():
            self._add_result(path)
        elif (path / MANIFEST).is_file():
            self._add_cache(path)
        elif path.is_file():
            self._add_detections(path)
        else:
            raise FormatError(
                f"{path} is neither a result folder ({PER_CATEGORY}) nor a feature cache ({MANIFEST})",
                hint="give folders of calib evaluate or calib extract, or a detections Parquet file",
            )

    def _add_result(self, path: Path) -> None:
        run = self._name("run", path.name, path)
        self.views.runs.append(run)
        self._add_files("results", [path / PER_CATEGORY], "run", run, RESULT_COLUMNS)
        if (path / MATCHES).is_file():
            self._add_files("matches", [path / MATCHES], "run", run)
        summary = read_json(path / SUMMARY, "summary of results")
        if not isinstance(summary, dict):
            raise FormatError(f"{path / SUMMARY} is not a summary of results", hint="run calib evaluate again")
        metrics = {key: value for key, value in summary.items() if isinstance(value, (int, float, str))}
        self.tables.setdefault("summary", []).append(pa.Table.from_pylist([{"run": run, **metrics}]))

    def _add_cache(self, path: Path) -> None:
        name = self._name("cache", path.name, path)
        manifest = Manifest.read(path)
        if not manifest.complete:
            raise InputError(
                f"cache {path} is not complete: writing stopped after {len(manifest.shards)} shards",
                hint="run the command that began it again (calib extract: with --resume)",
            )
        check_files(path, manifest, only=frozenset({META}))  # the bytes of features are not looked at
        self._add_files("categories", [path / CATEGORIES], "cache", name)
        self._add_files("images", [path / IMAGES], "cache", name)
        if (path / ANNOTATIONS).is_file():
            self._add_files("annotations", [path / ANNOTATIONS], "cache", name)
        # The manifest's list, never a listing of the folder: a killed run leaves files that do not count. Proposals and
        # classifier of a cascade are those of its first stage.
        if manifest.shards:
            shards = [path / SHARDS / shard.name / META for shard in manifest.shards]
            self._add_files("meta", shards, "cache", name)
        self.tables.setdefault("classifier", []).append(_classifier_table(path / CLASSIFIER, name))

    def _add_detections(self, path: Path) -> None:
        run = self._name("detections", path.stem, path)
        self._add_files("detections", [path], "run", run, DETECTION_COLUMNS)

    def _name(self, kind: str, name: str, path: Path) -> str:
        other = self.seen.setdefault((kind, name), path)
        if other != path or (kind == "run" and name in self.views.runs):
            raise InputError(
                f"two inputs of kind {kind} are called '{name}': {other} and {path}",
                hint="their names tell them apart: rename one",
            )
        return name

    def _add_files(
        self, view: str, files: list[Path], key: str, value: str, columns: frozenset[str] = frozenset()
    ) -> None:
        """Add Parquet ``files`` to ``view``, with ``value`` in the column ``key``."""
        for file in files:
            require(file, view)
        try:
            relation = self.views.connection.read_parquet([_literal(file) for file in files])
        except duckdb.Error as e:
            raise FormatError(f"{files[0]} cannot be read as Parquet: {e}", hint="write it again") from e
        missing = sorted(columns - set(relation.columns))
        if missing:
            raise FormatError(f"{files[0]} has no column {', '.join(missing)}, which {view} need")
        named = relation.select(duckdb.ConstantExpression(value).alias(key), duckdb.StarExpression())
        self.relations.setdefault(view, []).append(named)


def _union(relations: list[duckdb.DuckDBPyRelation]) -> duckdb.DuckDBPyRelation:
    """All rows under all columns; a file of an older version has nulls where it has no column."""
    columns = list(dict.fromkeys(name for relation in relations for name in relation.columns))
    union: duckdb.DuckDBPyRelation | None = None
    for relation in relations:
        known = set(relation.columns)
        whole = relation.select(
            *(
                duckdb.ColumnExpression(name) if name in known else duckdb.ConstantExpression(None).alias(name)
                for name in columns
            )
        )
        union = whole if union is None else union.union(whole)
    assert union is not None
    return union


def _literal(path: Path) -> str:
    """The path as DuckDB must read it: characters of its patterns stand for themselves."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in str(path))


def _classifier_table(path: Path, cache: str) -> pa.Table:
    """Columns cache, index (C is the background), weight_norm, bias (null if there is none)."""
    classifier = Classifier.read(path)
    norm: Any = np.linalg.norm(classifier.weight.astype(np.float64), axis=1)
    bias = pa.nulls(len(norm), pa.float64()) if classifier.bias is None else classifier.bias.astype(np.float64)
    return pa.table(
        {
            "cache": pa.array([cache] * len(norm), pa.string()),
            "index": pa.array(np.arange(len(norm), dtype=np.int32)),
            "weight_norm": norm,
            "bias": bias,
        }
    )
