"""Result folders, a cache and a detections file, small enough to work out every answer by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from calib.cache import Classifier, Manifest
from calib.cache.schema import Detector, Shard
from calib.evaluate import Detections, Evaluator, GroundTruth, evaluate, write_evaluation
from calib.evaluate.matches_table import write_matches

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
        files = {"meta.parquet": _told(cache / "shards" / name / "meta.parquet")}
        shards.append(Shard(name=name, rows=3, images=1, files=files))
    detector = Detector(source="test", digest="0", num_classes=5, feature_size=2)
    tables = {name: _told(cache / name) for name in ("categories.parquet", "images.parquet", "classifier.safetensors")}
    manifest = Manifest("test", "float32", "none", detector, {}, shards=tuple(shards[:2]), complete=True, tables=tables)
    manifest.write(cache)
    return cache


def _told(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    content = path.read_bytes()
    return {"bytes": len(content), "xxh3": xxhash.xxh3_64(content).hexdigest()}


@pytest.fixture
def judged_run(tmp_path: Path) -> Path:
    """``seen``: a result folder with matches. Two images, objects of newt (5 instances, image 1) and rat (5000, 2).

    Image 1: a rat box on the newt (0.9), the newt found (0.8), found again (0.7), a poor newt box (0.6); rat is not
    labelled there. Image 2: the rat found (0.9), an owl on it (0.8, known to be absent), an owl elsewhere (0.7).
    """
    document = {
        "images": [
            {"id": 1, "neg_category_ids": [], "not_exhaustive_category_ids": []},
            {"id": 2, "neg_category_ids": [2], "not_exhaustive_category_ids": []},
        ],
        "categories": [
            {"id": c, "name": NAMES[c], "frequency": "c", "instance_count": n, "image_count": n}
            for c, n in COUNTS.items()
        ],
        "annotations": [
            {"id": 11, "image_id": 1, "category_id": 1, "bbox": BOX, "area": 1600.0},
            {"id": 12, "image_id": 2, "category_id": 4, "bbox": BOX, "area": 1600.0},
        ],
    }
    poor = [10.0, 10.0, 40.0, 10.0]
    rows = [(1, 4, BOX, 0.9), (1, 1, BOX, 0.8), (1, 1, BOX, 0.7), (1, 1, poor, 0.6)]
    rows += [(2, 4, BOX, 0.9), (2, 2, BOX, 0.8), (2, 2, [90.0, 90.0, 9.0, 9.0], 0.7)]
    results = [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in rows]
    evaluator, found = Evaluator(GroundTruth.from_document(document)), Detections.from_document(results)
    write_evaluation(tmp_path / "seen", evaluator.evaluate(found))
    write_matches(tmp_path / "seen" / "matches.parquet", evaluator, found)
    return tmp_path / "seen"


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
