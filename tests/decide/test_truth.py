"""Heads judged by a cache: in the style of its annotation file, and to the bit as by that file."""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from calib.artifact import load
from calib.cache import Cache
from calib.cache.archive import archive, unpack
from calib.cache.merge import merge
from calib.cache.rewrite import compact, sample
from calib.cache.schema import LATER_ANNOTATION_COLUMNS, Manifest
from calib.decide.assess import Assessment
from calib.decide.truth import ground_truth
from calib.errors import InputError, MissingFileError, UnsupportedError
from calib.evaluate import GroundTruth
from calib.extract.dataset import Dataset
from calib.extract.raw import RawSettings, write_cache
from calib.extract.raw_files import read_classifier, read_rows
from calib.layout import ANNOTATIONS
from calib.notebook import judge_head
from calib.score import detector_nms
from calib.score.detections import Output, write_detections
from calib.settings import Nms
from calib.training import train

Write = Callable[..., Cache]
CLASSES, IMAGES, ROWS = 3, 6, 150


def document(seed: int = 0) -> dict[str, Any]:
    """A COCO json whose boxes have long fractions, with crowds, an object without area and one of another size."""
    rng = np.random.default_rng(seed)
    annotations = []
    for k in range(40):
        x, y, width, height = (*rng.uniform(0, 60, 2), *rng.uniform(5, 140, 2))
        row = {"id": k, "image_id": int(rng.integers(IMAGES)) + 1, "category_id": 7 - 2 * int(rng.integers(CLASSES))}
        row |= {
            "bbox": [x, y, width, height],
            "area": 0 if k == 3 else 0.7 * width * height,
            "iscrowd": int(k % 5 == 0),
        }
        annotations.append(row | ({"ignore": 1} if k % 7 == 0 else {}))
    images = [{"id": i + 1, "height": 200, "width": 200} for i in range(IMAGES)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 7 - 2 * c} for c in range(CLASSES)]}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(document, name)``: a cache of random rows near the objects."""

    def cache(given: dict[str, Any], name: str = "cache", mode: str = "test") -> Cache:
        rng = np.random.default_rng(1)
        (tmp_path / "gt.json").write_text(json.dumps(given))
        image_id = np.repeat(np.arange(IMAGES) + 1, ROWS)
        boxes = np.array([a["bbox"] for a in document()["annotations"]])[rng.integers(0, 40, len(image_id))]
        boxes[:, 2:] += boxes[:, :2]
        boxes = np.sort((boxes + rng.normal(0, 2, boxes.shape)).clip(0, 200).reshape(-1, 2, 2), axis=1).reshape(-1, 4)
        features = rng.normal(0, 2, (len(image_id), CLASSES + 1)).astype(np.float32)
        np.savez(tmp_path / "rows.npz", image_id=image_id, boxes=boxes.astype(np.float32), features=features)
        np.savez(
            tmp_path / "head.npz", weight=np.eye(CLASSES + 1, dtype=np.float32), bias=np.zeros(CLASSES + 1, np.float32)
        )
        settings = RawSettings(mode, dtype="float32", nms_iou=1.0, score_threshold=0.0, max_detections=100_000)
        classifier = read_classifier(tmp_path / "head.npz")
        rows = read_rows([tmp_path / "rows.npz"])
        write_cache(rows, classifier, Dataset.read(tmp_path / "gt.json"), tmp_path / name, settings)
        return Cache(tmp_path / name)

    return cache


def older(cache: Cache) -> Cache:
    """``cache`` as a calib wrote it that knew no style."""
    whole = cache.manifest.document()
    del whole["style"]
    table = pq.read_table(cache.path / ANNOTATIONS)
    corners = {n: table[n].to_numpy() for n in ("ignore", "crowd")}
    table = table.set_column(table.column_names.index("ignore"), "ignore", [corners["ignore"] | corners["crowd"]])
    pq.write_table(table.drop(list(LATER_ANNOTATION_COLUMNS)), cache.path / ANNOTATIONS, write_page_checksum=True)
    whole["tables"].pop(ANNOTATIONS)
    (cache.path / "manifest.json").write_text(json.dumps(whole))
    return Cache(cache.path)


def test_coco_by_a_cache_is_pycocotools_on_its_json(write: Write, tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    given = document()
    for row in given["annotations"]:
        row["id"] += 1  # pycocotools takes a match with id 0 for none
    cache = write(given)
    assert cache.manifest.style == "coco"
    head, nms = train("softmax", write(given, "train", "train"), tmp_path / "softmax" / "1"), detector_nms(cache)
    write_detections(cache, [Output(head, nms, tmp_path / "d.parquet", tmp_path / "d.json")])
    assessment = Assessment(cache)
    found = assessment.found(head.head, nms)
    assert assessment.limit(nms) == 100 < ROWS * CLASSES
    ours = assessment.evaluator.evaluate(found, max_detections=assessment.limit(nms), full=True)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "gt.json"))
        judged = COCOeval(truth, truth.loadRes(str(tmp_path / "d.json")), "bbox")
        judged.evaluate()
        judged.accumulate()
    np.testing.assert_array_equal(ours.precision, judged.eval["precision"][..., -1])
    np.testing.assert_array_equal(ours.recall, judged.eval["recall"][..., -1])
    assert 0 < ours.summary()["AP"] == assessment.evaluate(found, nms).summary()["AP"]


@pytest.mark.parametrize("style", ["lvis", "coco"])
@pytest.mark.parametrize("is_federated", [True, False])
def test_a_cache_holds_the_labels_of_its_file(write: Write, tmp_path: Path, style: Any, is_federated: bool) -> None:
    given = document()
    for row in given["images"] if is_federated else []:
        row |= {"neg_category_ids": [3, 99], "not_exhaustive_category_ids": [5.0]}
    cache = write(given)
    if style == "lvis" and not is_federated:
        with pytest.raises(UnsupportedError):
            ground_truth(cache, style)
        return
    own, file = ground_truth(cache, style), GroundTruth.read(tmp_path / "gt.json", style=style)
    for key in ("image_ids", "category_ids", "labels", "annotation_id", "image", "category", "box", "area"):
        np.testing.assert_array_equal(getattr(own, key), getattr(file, key), key)
    for key in ("is_ignored", "is_crowd", "image_size"):
        np.testing.assert_array_equal(getattr(own, key), getattr(file, key), key)
    assert own.style == file.style == style and own.names == file.names
    assert ground_truth(cache).style == ("lvis" if is_federated else "coco")


def test_older_caches_are_lvis_where_they_can_be(write: Write) -> None:
    given = document()
    with pytest.raises(UnsupportedError, match="does not say how"):
        ground_truth(older(write(given)))
    for row in given["images"]:
        row |= {"neg_category_ids": [3], "not_exhaustive_category_ids": []}
    cache = write(given, "federated")
    before = ground_truth(cache, "lvis")
    cache = older(cache)
    assert cache.manifest.style == "" and Manifest.read(cache.path).style == ""
    after = ground_truth(cache)
    np.testing.assert_allclose(after.box, before.box, rtol=1e-12)
    assert not after.is_crowd.any() and after.style == "lvis"
    with pytest.raises(UnsupportedError, match="crowds"):
        ground_truth(cache, "coco")


def test_a_list_of_images_is_no_empty_ground_truth(write: Write, tmp_path: Path) -> None:
    given = document()
    empty = write(given | {"annotations": []}, "empty")
    assert empty.manifest.style == "coco" and len(ground_truth(empty).area) == 0
    del given["annotations"]
    cache = write(given, "info")
    assert cache.manifest.style == "none" and not (cache.path / ANNOTATIONS).exists()
    archive(cache.path, tmp_path / "archive")
    unpack(tmp_path / "archive", tmp_path / "again")
    compact(cache.path, tmp_path / "compact")
    sample(cache.path, tmp_path / "sample", images=2)
    for path in (cache.path, *(tmp_path / name for name in ("again", "compact", "sample"))):
        assert Cache(path).manifest.style == "none"
        for judge in (lambda c: c.annotations(), ground_truth, Assessment):
            with pytest.raises(MissingFileError, match="not annotated"):
                judge(Cache(path))
    with pytest.raises(InputError, match="style 'none' and 'coco'"):
        merge([cache.path, empty.path], tmp_path / "merged")
    with pytest.raises(InputError, match="no annotations to label"):
        write(given, "train", "train")
    head = train("softmax", write(document(), "train", "train"), tmp_path / "softmax" / "1")
    nms = Nms(0.0, 0.5, 10)
    assert write_detections(cache, [Output(head, nms, tmp_path / "d.parquet")])[0] > 0
    truth = GroundTruth.from_document(document(), style="coco")
    found = Assessment(cache, truth)
    assert found.evaluate(found.found(head.head, nms), nms).summary()["n"] == CLASSES


def test_every_command_judges_in_the_style_of_the_cache(
    write: Write, calib: Callable[..., Any], fails: Callable[..., str], tmp_path: Path
) -> None:
    """Or refuses, if it has none."""
    cache, train_cache = write(document()), write(document(), "train", "train")
    heads = [tmp_path / "models" / name / "1" for name in ("softmax", "tau-norm")]
    for head in heads:
        train(head.parent.name, train_cache, head)
    assessment, nms = Assessment(cache), replace(detector_nms(cache), max_detections=60)
    expected = assessment.evaluate(assessment.found(load(heads[0]).head, nms), nms).summary()["AP"]
    given = document()
    del given["annotations"]
    info = write(given, "info")
    cap, of = ["--max-detections", "60"], ["--head", heads[0], "--cache"]
    commands: dict[str, tuple[list[Any], Callable[[Any], float] | None]] = {
        "compare": (["compare", *heads, *cap, "--bootstrap", "10", "--cache"], lambda r: r["softmax"]["AP"]["value"]),
        "calibrate": (
            ["calibrate", *cap, "--out", tmp_path / "c" / "1", *of],
            lambda r: r["caches"][0]["before"]["AP"],
        ),
        "select": (["select", *heads, *cap, "--out", tmp_path / "s" / "1", "--cache"], lambda r: r["AP"][0]),
        "threshold": (["threshold", "--precision", "0.1", *cap, "--out", tmp_path / "t" / "1", *of], None),
        "evaluate": (["evaluate", "--out", tmp_path / "r", *of], None),
    }
    assert judge_head(heads[0], cache, max_detections=60).metrics["AP"] == expected
    for name, (command, metric) in commands.items():
        assert "not annotated" in fails(*command, info.path), name
        found = json.loads(calib(*command, cache.path, "--json").stdout)
        if metric is not None:
            assert metric(found) == pytest.approx(expected, abs=1e-12), name
    own = json.loads(calib("evaluate", *of, cache.path, "--out", tmp_path / "r", "--json").stdout)
    file = ["--annotations", tmp_path / "gt.json", "--style", "coco"]
    (tmp_path / "gt.json").write_text(json.dumps(document()))
    other = json.loads(calib("evaluate", *of, cache.path, *file, "--out", tmp_path / "r", "--json").stdout)
    assert own["style"] == "coco"
    for key in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR", "AR1", "AR10"):
        assert own[key] == other[key], key
    assert "COCO json" in fails("evaluate", *of, cache.path, "--style", "lvis", "--out", tmp_path / "r")
