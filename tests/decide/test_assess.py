"""Heads judged on a cache: the same metrics as through files, and what proposals allow."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.artifact import Artifact
from calib.cache import Cache
from calib.cache.schema import PROPOSAL_BOX
from calib.decide.assess import Assessment
from calib.errors import UnsupportedError
from calib.evaluate import BoxSet, Detections, Evaluator, GroundTruth, Rescored
from calib.score import detector_nms
from calib.score.detections import Output, write_detections
from calib.training import train


@pytest.fixture(scope="module")
def heads(train_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "softmax": train("softmax", train_cache, folder / "softmax" / "1"),
        "crt": train("crt", train_cache, folder / "crt" / "1", {"steps": 60, "rows_per_step": 256}),
    }


@pytest.fixture(scope="module")
def assessment(val_cache: Cache, shapes_set: Path) -> Assessment:
    return Assessment(val_cache, GroundTruth.read(shapes_set / "val.json"))


@pytest.mark.parametrize("name", ["softmax", "crt"])
def test_a_head_has_the_metrics_of_its_detections(
    name: str, heads: dict[str, Artifact], assessment: Assessment, val_cache: Cache, tmp_path: Path
) -> None:
    nms = detector_nms(val_cache)
    found = assessment.found(heads[name].head, nms)
    assert isinstance(found, Rescored)
    write_detections(val_cache, [Output(heads[name], nms, tmp_path / "d.parquet")])
    for options in ({}, {"max_detections": 45}, {"max_detections": -1, "per_category": 9}):
        evaluator = assessment.evaluator
        of_file = evaluator.evaluate(Detections.read(tmp_path / "d.parquet"), full=True, **options)
        of_head = evaluator.evaluate(found, full=True, **options)
        np.testing.assert_array_equal(of_head.precision, of_file.precision)
        np.testing.assert_array_equal(of_head.n_det, of_file.n_det)
        assert of_file.AP.max() > 0


def test_the_cache_knows_the_ground_truth_itself(heads: dict[str, Artifact], assessment: Assessment) -> None:
    own = Assessment(assessment.cache)
    nms = detector_nms(assessment.cache)
    metrics = [a.evaluator.evaluate(a.found(heads["softmax"].head, nms)).summary() for a in (own, assessment)]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-9)


def test_proposal_metrics(heads: dict[str, Artifact], assessment: Assessment, val_cache: Cache) -> None:
    metrics = assessment.proposal_metrics(heads["softmax"].head, detector_nms(val_cache))
    logits = val_cache.logits
    assert logits is not None
    predicted = logits.read(0, val_cache.n_rows).argmax(axis=1)
    labels = val_cache.labels
    assert metrics["ACC"] == pytest.approx((predicted == labels).mean()) and metrics["nACC"] == len(labels)
    background = labels == val_cache.background
    assert metrics["ACCbg"] == pytest.approx((predicted == labels)[background].mean())
    counts = val_cache.categories.instance_count
    few = ~background & (counts[np.minimum(labels, len(counts) - 1)] < 10)
    assert metrics["ACC1"] == pytest.approx((predicted == labels)[few].mean()) and metrics["nACC1"] == few.sum()
    assert metrics["nACC"] == metrics["nACCbg"] + sum(metrics[f"nACC{b}"] for b in (1, 2, 3, 4))
    assert 0.9 < metrics["recall"] <= 1 and metrics["nrecall"] == metrics["oracle"]["n"]
    nms = detector_nms(val_cache)
    own = assessment.evaluate(assessment.found(heads["softmax"].head, nms), nms).summary()["AP"]
    assert metrics["oracle"]["AP"] > own > 0.1


def test_recall_is_that_of_proposals_one_by_one(assessment: Assessment, val_cache: Cache) -> None:
    truth, corners = assessment.evaluator.truth, np.stack(val_cache.meta(*PROPOSAL_BOX), axis=1).astype(float)
    image_id = val_cache.meta("image_id")[0]
    covered = np.zeros(len(truth.area), bool)
    for g, (x, y, w, h) in enumerate(truth.box):
        for x1, y1, x2, y2 in corners[image_id == truth.image_ids[truth.image[g]]]:
            inter = max(0, min(x2, x + w) - max(x1, x)) * max(0, min(y2, y + h) - max(y1, y))
            covered[g] |= inter >= 0.5 * ((x2 - x1) * (y2 - y1) + w * h - inter)
    per_category = [covered[truth.category == c].mean() for c in np.unique(truth.category)]
    assert assessment._recall((10, 100))["recall"] == pytest.approx(np.mean(per_category))


def test_sampled_proposals_are_refused(train_cache: Cache) -> None:
    with pytest.raises(UnsupportedError, match="extracted with --mode train"):
        Assessment(train_cache)


def test_class_specific_boxes_are_detections(
    heads: dict[str, Artifact], assessment: Assessment, val_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one box per proposal for all classes there is nothing to share, and the metrics are the same."""
    nms = detector_nms(val_cache)
    shared = assessment.evaluator.evaluate(assessment.found(heads["softmax"].head, nms))
    monkeypatch.setattr(Assessment, "boxes", None)
    alone = Assessment(val_cache, assessment.evaluator.truth)
    found = alone.found(heads["softmax"].head, nms)
    assert isinstance(found, Detections)
    np.testing.assert_array_equal(alone.evaluator.evaluate(found).AP, shared.AP)
    metrics = alone.proposal_metrics(heads["softmax"].head, nms)
    assert "oracle" not in metrics and metrics["recall"] > 0.9


def test_overlaps_of_all_categories_are_found_once(assessment: Assessment, monkeypatch: pytest.MonkeyPatch) -> None:
    assert assessment.boxes is assessment.boxes
    monkeypatch.setattr(BoxSet, "_meeting", None)
    assert isinstance(assessment.evaluator, Evaluator) and assessment.boxes is not None


def test_the_command_judges_heads_side_by_side(
    calib: Callable[..., Any], train_cache: Cache, val_cache: Cache, shapes_set: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    for method in ("softmax", "tau-norm"):
        train(method, train_cache, models / method / "1")
    given = ["--cache", val_cache.path, "--head", models / "softmax" / "1", "--head", models / "tau-norm" / "1"]
    out = calib("evaluate", *given, "--out", tmp_path / "r", "--proposals", "--bootstrap", "10", "--json")
    metrics = json.loads(out.stdout)
    assert list(metrics) == ["softmax", "tau-norm"] and metrics["tau-norm"]["difference"]["to"] == "softmax"
    assert metrics["softmax"]["proposals"]["oracle"]["AP"] > 0.5
    one = calib("evaluate", *given[:4], "--annotations", shapes_set / "val.json", "--out", tmp_path / "one", "--json")
    alone = json.loads(one.stdout)
    assert alone["AP"] == pytest.approx(metrics["softmax"]["AP"], abs=1e-9)
    assert json.loads((tmp_path / "one" / "summary.json").read_text()) == alone


def test_caps_that_are_not_per_image_see_all_detections(
    calib: Callable[..., Any], train_cache: Cache, val_cache: Cache, shapes_set: Path, tmp_path: Path
) -> None:
    """AP-fixed, AP-pool, COCO style and no cap at all, as a file with everything has them."""
    train("softmax", train_cache, tmp_path / "softmax" / "1")
    head, everything = tmp_path / "softmax" / "1", tmp_path / "all.parquet"
    given = ["--cache", val_cache.path, "--head", head]
    calib("score", *given, "--max-detections", "100000", "--out", everything)
    truth = ["--annotations", shapes_set / "val.json"]
    judged = [*given, "--style", "coco", "--out", tmp_path / "o", "--json"]
    by_cache, by_file = (json.loads(calib("evaluate", *judged, *more).stdout) for more in ([], truth))
    assert by_cache["AP"] == pytest.approx(by_file["AP"], abs=1e-12) and by_cache["style"] == "coco"
    for options in (
        ["--max-detections", "45", "--fixed-ap", "--pooled-ap"],
        ["--max-detections", "-1"],
        ["--style", "coco"],
    ):
        of_file, of_head = (
            json.loads(calib("evaluate", *source, *truth, *options, "--out", tmp_path / "o", "--json").stdout)
            for source in (["--results", everything], given)
        )
        for key in ("AP", "AR", "fixed", "pooled", "AR10"):
            assert of_file.get(key) == of_head.get(key), (options, key)


def test_the_command_names_what_does_not_fit(
    fails: Callable[..., str], train_cache: Cache, val_cache: Cache, tmp_path: Path
) -> None:
    train("softmax", train_cache, tmp_path / "softmax" / "1")
    given = ["evaluate", "--head", tmp_path / "softmax" / "1", "--out", tmp_path / "out", "--cache"]
    assert "extracted with --mode train" in fails(*given, train_cache.path)
    assert "boxes only" in fails(*given, val_cache.path, "--matches")
    assert "two heads have one name and version" in fails(*given, val_cache.path, "--head", tmp_path / "softmax" / "1")
    given[4] = val_cache.path
    assert "is a head or a cache, expected a folder" in fails(*given, val_cache.path)
    assert not (tmp_path / "out").exists()
