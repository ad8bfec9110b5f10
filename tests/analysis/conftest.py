"""Result folders, a cache and a detections file, small enough to work out every answer by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calib.cache import Classifier, Manifest
from calib.cache.schema import Detector, Shard
from calib.evaluate import Detections, GroundTruth, evaluate, write_evaluation

COUNTS = {1: 5, 2: 50, 3: 500, 4: 5000, 7: 8}  # category id -> TRAIN instances; 7 has no object in the split
NAMES = {1: "newt", 2: "owl", 3: "pig", 4: "rat", 7: "yak"}
BOX = [10.0, 10.0, 40.0, 40.0]


@pytest.fixture
def make_result(tmp_path: Path) -> Callable[[str, dict[int, float]], Path]:
    """``make_result(name, {category id: AP})``: a result folder with exactly those APs (0, 0.5 or 1)."""

    def make(name: str, ap: dict[int, float]) -> Path:
        truth = GroundTruth.from_document(
            {
                "images": [{"id": 1, "neg_category_ids": [], "not_exhaustive_category_ids": []}],
                "categories": [
                    {"id": c, "name": NAMES[c], "frequency": "c", "instance_count": n, "image_count": n}
                    for c, n in COUNTS.items()
                ],
                "annotations": [
                    {"id": c, "image_id": 1, "category_id": c, "bbox": BOX, "area": 1600.0} for c in COUNTS if c != 7
                ],
            }
        )
        row = {"image_id": 1, "bbox": BOX}
        hits = [row | {"category_id": c, "score": 0.5} for c, value in ap.items() if value > 0]
        misses = [
            row | {"category_id": c, "score": 0.9, "bbox": [90.0, 90.0, 9.0, 9.0]}
            for c, value in ap.items()
            if value == 0.5
        ]
        write_evaluation(tmp_path / name, evaluate(truth, Detections.from_document(hits + misses)))
        return tmp_path / name

    return make


@pytest.fixture
def runs(make_result: Callable[[str, dict[int, float]], Path]) -> list[Path]:
    """``old``: AP 0, 0.5, 1, 1 and ``new``: AP 1, 0.5, 0.5, 1 for categories 1, 2, 3, 4."""
    return [make_result("old", {2: 0.5, 3: 1, 4: 1}), make_result("new", {1: 1, 2: 0.5, 3: 0.5, 4: 1})]


@pytest.fixture
def make_cache(tmp_path: Path) -> Callable[[str], Path]:
    """``make_cache(name)``: 5 categories, D = 2, two committed shards of 3 rows, one left by a killed run."""
    return lambda name: _write_cache(tmp_path / name)


def _write_cache(cache: Path) -> Path:
    cache.mkdir()
    ids, counts = list(COUNTS), list(COUNTS.values())
    categories = {
        "index": pa.array(range(5), pa.int32()),
        "category_id": ids,
        "name": list(NAMES.values()),
        "instance_count": counts,
        "image_count": counts,
        "frequency": ["c"] * 5,
    }
    pq.write_table(pa.table(categories), cache / "categories.parquet")
    pq.write_table(pa.table({"image_id": [1, 2], "n_rows": [3, 3]}), cache / "images.parquet")
    # Norms 5, 10, 15, 20, 5 for the classes and 1 for the background.
    weight = np.array([[3, 4], [6, 8], [9, 12], [12, 16], [3, 4], [1, 0]], np.float32)
    Classifier(weight=weight, bias=np.arange(6, dtype=np.float32)).write(cache / "classifier.safetensors")
    shards = []
    for i, name in enumerate(("00000", "00001", "00002")):
        (cache / "shards" / name).mkdir(parents=True)
        rows = {"image_id": [i + 1] * 3, "roi_id": [0, 1, 2], "label": [0, 1, 5]}
        pq.write_table(pa.table(rows), cache / "shards" / name / "meta.parquet")
        shards.append(Shard(name=name, rows=3, images=1, files={"meta.parquet": {}}))
    detector = Detector(source="test", digest="0", num_classes=5, feature_size=2)
    manifest = Manifest(
        mode="test", dtype="float32", logits="none", detector=detector, source={}, shards=tuple(shards[:2])
    )
    manifest.write(cache)
    return cache


@pytest.fixture
def detections_file(tmp_path: Path) -> Path:
    """``dets.parquet``: four detections of image 1."""
    columns = {
        "image_id": np.ones(4, np.int64),
        "category_id": np.array([1, 1, 2, 3]),
        "score": np.array([0.9, 0.8, 0.7, 0.6], np.float32),
        **{name: np.zeros(4, np.float32) for name in ("x1", "y1", "x2", "y2")},
        "roi_id": np.arange(4, dtype=np.int32),
    }
    pq.write_table(pa.table(columns), tmp_path / "dets.parquet")
    return tmp_path / "dets.parquet"
