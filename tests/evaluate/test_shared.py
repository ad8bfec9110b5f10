"""Many heads on one set of boxes: the same metrics as each on its own, to the last bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.errors import InputError, SettingError, ShapeError
from calib.evaluate import BoxSet, Detections, Evaluation, Evaluator, GroundTruth, Rescored, evaluate
from calib.evaluate.calibration import calibration
from calib.evaluate.evaluate_files import Options, _Sharing, evaluate_files
from calib.evaluate.ground_truth import Style
from calib.evaluate.pooled import pooled_ap

Document = dict[str, Any]


def assert_same(a: Evaluation, b: Evaluation) -> None:
    np.testing.assert_array_equal(a.precision, b.precision)
    np.testing.assert_array_equal(a.recall, b.recall)
    np.testing.assert_array_equal(a.AP, b.AP)
    np.testing.assert_array_equal(a.n_det, b.n_det)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), style=st.sampled_from(["lvis", "coco"]), own=st.booleans())
def test_scores_of_a_box_set_equal_detections(
    seed: int, style: Style, own: bool, random_case: Callable[..., Any]
) -> None:
    gt, results = random_case(seed)
    for row in gt["annotations"]:
        row["iscrowd"] = int(row.pop("ignore", 0))
    evaluator = Evaluator(GroundTruth.from_document(gt, style=style))
    truth, rng = evaluator.truth, np.random.default_rng(seed)
    detections = Detections.from_document(results)
    rows = detections.rows(truth)
    boxes = BoxSet(truth, rows.image, detections.box, category=rows.category if own else None)
    for _ in range(2):  # two heads
        score = rng.permutation(detections.score)
        alone = evaluator.evaluate(
            Detections(detections.image_id, detections.category_id, score, detections.box), full=True
        )
        rescored = Rescored(boxes, np.arange(len(score)), rows.category, score)
        assert_same(evaluator.evaluate(rescored, full=True), alone)


def test_a_proposal_may_be_several_detections(one_object: Document) -> None:
    """One box, scored for two categories, as class-agnostic detectors have it."""
    evaluator = Evaluator(GroundTruth.from_document(one_object))
    boxes = evaluator.boxes(np.array([5, 5]), np.array([[10, 10, 50, 50], [90, 90, 99, 99]], np.float32))
    found = Rescored(boxes, np.array([0, 0, 1]), np.array([0, 1, 0]), np.array([0.9, 0.8, 0.95]))
    evaluation = evaluator.evaluate(found)
    assert evaluation.AP[0] == pytest.approx(0.5) and evaluation.n_det.tolist() == [2, 1, 0]
    assert pooled_ap(evaluator, found)["all"] == pytest.approx(0.5)
    assert calibration(evaluator, found)["LRP_fp"] == pytest.approx(0.5)


def test_boxes_of_another_ground_truth_are_refused(one_object: Document) -> None:
    one, other = (Evaluator(GroundTruth.from_document(one_object)) for _ in range(2))
    boxes = one.boxes(np.array([5]), np.array([[10, 10, 50, 50]], np.float32))
    found = Rescored(boxes, np.array([0]), np.array([0]), np.array([0.5]))
    with pytest.raises(SettingError, match="another ground truth"):
        other.evaluate(found)
    with pytest.raises(ShapeError, match=r"expected box \[N\]"):
        Rescored(boxes, np.array([0, 0]), np.array([0]), np.array([0.5]))
    with pytest.raises(InputError, match="image id 6 is not in the ground truth"):
        one.boxes(np.array([6]), np.array([[10, 10, 50, 50]], np.float32))
    with pytest.raises(ShapeError, match=r"expected image \[B\]"):
        BoxSet(one.truth, np.array([0]), np.zeros((2, 4)))


def test_results_files_of_the_same_boxes_share_them(
    random_case: Callable[..., Any], write_json_file: Callable[[str, Any], Path], tmp_path: Path
) -> None:
    gt, results = random_case(11)
    truth = GroundTruth.from_document(gt)
    several = {
        "a": results,
        "b": [row | {"score": 1 - abs(row["score"])} for row in results],
        "c": [row | {"category_id": gt["categories"][0]["id"]} for row in results],
        "d": [row | {"bbox": [1.0, 1.0, 9.0, 9.0]} for row in results],
    }
    sharing = _Sharing(Evaluator(truth))
    kinds = [type(sharing.of(Detections.from_document(rows))) for rows in several.values()]
    assert kinds == [Detections, Rescored, Rescored, Detections]
    files = [write_json_file(f"{name}.json", rows) for name, rows in several.items()]
    for options in (Options(), Options(matches=True)):
        outs = [tmp_path / "out" / name for name in several]
        together = evaluate_files(write_json_file("gt.json", gt), files, outs, options)
        for outcome, rows in zip(together, several.values(), strict=True):
            np.testing.assert_array_equal(outcome.evaluation.AP, evaluate(truth, Detections.from_document(rows)).AP)
    assert all((out / "matches.parquet").is_file() for out in outs)
