"""Categories in the order of a detector's classes, from extraction to metrics."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.cache import Cache
from calib.decide.assess import Assessment
from calib.errors import InputError, ShapeError
from calib.extract.adapter import ClassRule
from calib.extract.classes import in_class_order
from calib.extract.dataset import Dataset
from calib.extract.extraction import extract
from calib.extract.options import Extraction
from calib.extract.torchvision import TorchvisionAdapter
from calib.heads.detector import detector_head
from calib.score import detector_nms

Document = Callable[..., dict[str, Any]]
SIZES = [(60, 90), (41, 57)]
PLACES = [2, 0, 3, 1]  # the json lists categories 30, 10, 40, 20


def objects(ids: list[int]) -> list[tuple[float, ...]]:
    """Of classes 0 to 3 in both images."""
    return [(i, ids[c], 4 + 9 * c, 5 + 5 * c, 20 + 5 * c, 15) for i in (1, 2) for c in range(4)]


def metrics(document: dict[str, Any], rule: ClassRule, adapter: TorchvisionAdapter, folder: Path, name: str) -> Any:
    adapter.classes = rule  # type: ignore[misc]
    (folder / f"{name}.json").write_text(json.dumps(document))
    dataset = Dataset.read(folder / f"{name}.json")
    extract(adapter, dataset, folder / "images", folder / name, Extraction(dtype="float32"))
    cache = Cache(folder / name)
    assessment = Assessment(cache)
    evaluation = assessment.evaluator.evaluate(assessment.found(detector_head(cache), detector_nms(cache)))
    labels = cache.meta("label")[0]
    named = dict(zip(evaluation.names, evaluation.n_det.tolist(), strict=True))
    return cache, assessment, labels, named


def test_a_json_in_its_own_order_gives_what_one_in_ascending_order_does(
    adapter: TorchvisionAdapter, document: Document, tmp_path: Path
) -> None:
    ascending = document(SIZES, objects([10, 20, 30, 40]))
    given = document(SIZES, objects([30, 10, 40, 20]))
    given["categories"] = [given["categories"][k] for k in PLACES]
    for c, record in enumerate(given["categories"]):
        record["name"] = f"kind {c}"
    _, _, labels, named = metrics(ascending, ClassRule(), adapter, tmp_path, "ascending")
    cache, assessment, own_labels, own_named = metrics(given, ClassRule("json"), adapter, tmp_path, "own")
    assert cache.categories.category_id.tolist() == [30, 10, 40, 20]
    assert cache.categories.name == tuple(f"kind {c}" for c in range(4))
    assert np.array_equal(labels, own_labels) and (labels >= 0).any() and set(labels) > {4}
    assert named == own_named and len(set(named.values())) > 1
    assert assessment.evaluator.truth.category_ids.tolist() == [10, 20, 30, 40]
    assert assessment.class_of.tolist() == [1, 3, 0, 2]
    assert cache.categories.index_of(np.asarray([20, 30, 30])).tolist() == [3, 0, 0]
    with pytest.raises(InputError):
        cache.categories.index_of(np.asarray([31]))


def test_the_order_is_that_of_the_train_json(adapter: TorchvisionAdapter, document: Document, tmp_path: Path) -> None:
    given = document(SIZES)
    (tmp_path / "val.json").write_text(json.dumps(given))
    given["categories"] = [given["categories"][k] for k in PLACES]
    (tmp_path / "train.json").write_text(json.dumps(given))
    dataset = Dataset.read(tmp_path / "val.json", counts_from=tmp_path / "train.json")
    adapter.classes = ClassRule("json")  # type: ignore[misc]
    ordered = in_class_order(adapter, dataset)
    assert ordered.categories.category_id.tolist() == [30, 10, 40, 20]
    assert in_class_order(adapter, ordered).categories.category_id.tolist() == [30, 10, 40, 20]
    assert ordered.digest() != dataset.digest()
    given["categories"].append({"id": 50, "name": "kind 4"})
    (tmp_path / "more.json").write_text(json.dumps(given))
    with pytest.raises(ShapeError):
        in_class_order(adapter, Dataset.read(tmp_path / "more.json"))
