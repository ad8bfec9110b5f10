"""The lvis package as oracle, and small random cases full of what is awkward."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Document = dict[str, Any]
Results = list[dict[str, Any]]


@contextmanager
def _bridged_numpy() -> Iterator[None]:
    # The lvis package uses np.float, which numpy 2 removed; it also logs and warns about what is meant here.
    np.float = float  # type: ignore[attr-defined]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        del np.float  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def lvis_oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``oracle(gt, results, max_detections, iou_type)``: the lvis package's LVISEval after ``run``."""
    path = tmp_path_factory.mktemp("oracle") / "gt.json"

    def run(gt: Document, results: Results, max_detections: int = 300, iou_type: str = "bbox") -> Any:
        path.write_text(json.dumps(gt))
        with _bridged_numpy():
            from lvis import LVIS, LVISEval, LVISResults

            truth = LVIS(str(path))
            copied = json.loads(json.dumps(results))  # the package writes into what it is given
            judged = LVISEval(truth, LVISResults(truth, copied, max_dets=max_detections), iou_type)
            judged.run()
        return judged

    return run


@pytest.fixture(scope="session")
def random_case() -> Callable[[int], tuple[Document, Results]]:
    """Small splits and results with ties, overlaps at thresholds, zero areas, unknown categories ..."""
    return _random_case


def _random_case(seed: int) -> tuple[Document, Results]:
    rng = np.random.default_rng(seed)
    image_ids = rng.permutation(40)[: rng.integers(1, 7)].tolist()
    category_ids = (rng.permutation(30)[: rng.integers(1, 5)] + 1).tolist()
    annotations = [_annotation(rng, i, image_ids, category_ids) for i in rng.permutation(rng.integers(0, 25)).tolist()]
    images = [
        {
            "id": image,
            "neg_category_ids": _some(rng, [*category_ids, 77], 0.4),
            "not_exhaustive_category_ids": _some(rng, category_ids, 0.2),
        }
        for image in image_ids
    ]
    categories = [
        {"id": c, "name": f"category {c}", "frequency": str(rng.choice(["r", "c", "f"])), "instance_count": 5}
        for c in category_ids
    ]
    results = [_result(rng, image_ids, [*category_ids, 77], annotations) for _ in range(rng.integers(1, 60))]
    return {"images": images, "categories": categories, "annotations": annotations}, results


def _some(rng: np.random.Generator, items: list[int], share: float) -> list[int]:
    return [item for item in items if rng.random() < share]


def _annotation(rng: np.random.Generator, i: int, images: list[int], categories: list[int]) -> Document:
    width, height = (float(rng.choice([20, 32, 40, 96, 100])) for _ in range(2))
    area = float(rng.choice([width * height, 0.6 * width * height, 1024, 9216, 0], p=[0.5, 0.2, 0.1, 0.1, 0.1]))
    x, y = (float(rng.choice([0, 0, 10, 50])) for _ in range(2))
    row: Document = {
        "id": i + 1,
        "image_id": int(rng.choice(images)),
        "category_id": int(rng.choice(categories)),
        "bbox": [x, y, width, height],
        "area": area,
    }
    return row | ({"ignore": 1} if rng.random() < 0.1 else {})


def _result(
    rng: np.random.Generator, images: list[int], categories: list[int], annotations: list[Document]
) -> Document:
    near = rng.choice(np.array(annotations, dtype=object)) if annotations and rng.random() < 0.8 else None
    image = near["image_id"] if near and rng.random() < 0.95 else int(rng.choice(images))
    category = near["category_id"] if near and rng.random() < 0.8 else int(rng.choice(categories))
    x, y, width, height = near["bbox"] if near else [5.0, 5.0, 32.0, 32.0]
    # Side shares k / 20 give overlaps that are 0.5, 0.55, ... 0.95 up to the last bit, on either side of it.
    width *= float(rng.choice([1.0, rng.integers(9, 21) / 20]))
    y += float(rng.choice([0.0, 0.0, 1.0]))
    kind = rng.random()
    if kind < 0.03:
        width = 0.0
    elif kind < 0.06:
        width = -width
    elif kind < 0.09:
        width, height = -width, -height
    score = float(rng.choice([-0.0, 0.0, 0.1, 0.5, 0.5, 0.7, 1.0, rng.random(), -0.25]))
    return {"image_id": image, "category_id": category, "bbox": [x, y, width, height], "score": score}


@pytest.fixture
def write_json_file(tmp_path: Path) -> Callable[[str, Any], Path]:
    """``write(name, value)``: a JSON file in the test's folder."""

    def write(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(value))
        return path

    return write


@pytest.fixture
def one_object() -> Document:
    """One image with one object (category 3, 40 x 40 pixels); category 8 is known to be absent, 9 unknown."""
    return {
        "images": [
            {"id": 5, "neg_category_ids": [8], "not_exhaustive_category_ids": []},
        ],
        "categories": [
            {"id": 8, "name": "b", "frequency": "c", "instance_count": 50, "image_count": 20},
            {"id": 3, "name": "a", "frequency": "r", "instance_count": 5, "image_count": 4},
            {"id": 9, "name": "c", "frequency": "f", "instance_count": 5000, "image_count": 900},
        ],
        "annotations": [{"id": 1, "image_id": 5, "category_id": 3, "bbox": [10.0, 10.0, 40.0, 40.0], "area": 1600.0}],
    }
