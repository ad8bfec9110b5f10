"""Caches of made-up numbers, in milliseconds: 3 classes, 5 features, a few images per shard."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from calib.cache import Categories, Classifier, Manifest
from calib.cache.image_rows import ImageRows
from calib.cache.schema import META_SCHEMA, Detector
from calib.cache.write import CacheWriter
from calib.layout import MANIFEST

C, D = 3, 5


def categories() -> Categories:
    ids, counts = np.asarray([2, 5, 9]), np.asarray([40, 0, 7])
    return Categories(ids, ("a", "b", "c"), counts, counts // 2, ("c", "r", "r"))


def classifier() -> Classifier:
    rng = np.random.default_rng(1)
    weight, bias = (rng.standard_normal(s).astype(np.float32) for s in ((C + 1, D), C + 1))
    return Classifier(weight, bias, None, np.zeros((4, D), np.float32), np.zeros(4, np.float32))


def manifest(**changes: Any) -> Manifest:
    detector = Detector("made-up", classifier().digest(), num_classes=C, feature_size=D)
    whole = Manifest("test", "float32", "full", detector, {"annotations": "val.json", "seed": 0})
    return replace(whole, **changes)


def image_rows(image_id: int, n: int) -> ImageRows:
    """``n`` proposals whose numbers follow from the image id."""
    rng = np.random.default_rng(image_id)
    features = rng.standard_normal((n, D)).astype(np.float32)
    meta: dict[str, Any] = {f.name: np.zeros(n, f.type.to_pandas_dtype()) for f in META_SCHEMA}
    meta |= {"image_id": np.full(n, image_id), "roi_id": np.arange(n, dtype=np.int32)}
    meta |= {"label": rng.integers(0, C + 1, n).astype(np.int32)}
    image: dict[str, Any] = {"image_id": image_id, "height": 50, "width": 60, "net_height": 100, "net_width": 120}
    image |= {"neg_category_ids": [5], "not_exhaustive_category_ids": []}
    return ImageRows(image, meta, features, classifier().logits(features))


def annotations() -> dict[str, Any]:
    one = {"id": [1], "image_id": [1], "category_id": [2], "x1": [0.0], "y1": [0.0], "x2": [9.0], "y2": [9.0]}
    return {**one, "area": [81.0], "ignore": [False]}


SHARDS = {"00000": [(1, 4), (2, 0), (3, 7)], "00001": [(4, 6)], "00002": [(5, 1), (6, 3)]}


def fill(writer: CacheWriter, shards: dict[str, Any] | None = None) -> None:
    """Write what is not committed yet of ``shards`` (image ids and row numbers, or ready rows) and finish."""
    with writer:
        writer.write_annotations(annotations())
        done = {s.name for s in writer.manifest.shards}
        assert {p.name for p in (writer.path / "shards").iterdir()} == done  # no leftovers
        for name, images in (SHARDS if shards is None else shards).items():
            if name not in done:
                writer.commit(name, [i if isinstance(i, ImageRows) else image_rows(*i) for i in images])
        writer.finish()


@pytest.fixture
def go_on() -> Callable[[CacheWriter], None]:
    """``go_on(writer)``: bring the cache of ``write_cache`` to its end."""
    return fill


@pytest.fixture
def rows_of() -> Callable[[int, int], ImageRows]:
    """``rows_of(image_id, n)``: n made-up proposals."""
    return image_rows


@pytest.fixture
def begin() -> Callable[..., CacheWriter]:
    """``begin(path, **manifest changes)``: a writer on a new cache."""
    return lambda path, **changes: CacheWriter.create(path, manifest(**changes), categories(), classifier())


@pytest.fixture
def resume() -> Callable[..., CacheWriter]:
    """``resume(path, **manifest changes)``: a writer that goes on."""
    return lambda path, **changes: CacheWriter.resume(path, manifest(**changes))


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Caches of the three shards, each written once: a copy is cheaper than making files durable again."""
    written: dict[str, Path] = {}

    def template(**changes: Any) -> Path:
        if (key := str(changes)) not in written:
            written[key] = tmp_path_factory.mktemp("templates") / "cache"
            fill(CacheWriter.create(written[key], manifest(**changes), categories(), classifier()))
        return written[key]

    return template


@pytest.fixture
def write_cache(
    tmp_path: Path, begin: Callable[..., CacheWriter], templates: Callable[..., Path]
) -> Callable[..., Path]:
    """``write_cache(name="cache", shards=..., **manifest changes)``: a complete cache of 21 rows in three shards."""

    def write(name: str = "cache", shards: dict[str, Any] | None = None, **changes: Any) -> Path:
        if shards is None:
            return Path(shutil.copytree(templates(**changes), tmp_path / name))
        fill(begin(tmp_path / name, **changes), shards)
        return tmp_path / name

    return write


@pytest.fixture
def sign() -> Callable[[Path], None]:
    """``sign(cache)``: enter the bytes and hashes of the files as they are now into the manifest, as a tool that
    writes such caches would."""

    def describe(path: Path) -> dict[str, Any]:
        return {"bytes": path.stat().st_size, "xxh3": xxhash.xxh3_64(path.read_bytes()).hexdigest()}

    def rewrite(cache: Path) -> None:
        data = json.loads((cache / MANIFEST).read_text())
        for shard in data["shards"]:
            shard["files"] = {n: describe(cache / "shards" / shard["name"] / n) for n in shard["files"]}
        data["tables"] = {n: describe(cache / n) for n in data["tables"]}
        (cache / MANIFEST).write_text(json.dumps(data))

    return rewrite
