"""COCO style and mask AP against pycocotools and the lvis package, to the last bit."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.errors import FormatError
from calib.evaluate import Detections, Evaluation, GroundTruth, evaluate
from calib.evaluate.evaluate_files import Options, evaluate_files
from calib.evaluate.ground_truth import Style

Document = dict[str, Any]
Results = list[dict[str, Any]]
SIDE = 120


def coco_oracle(gt: Document, results: Results, limit: int, iou_type: str) -> Any:
    """pycocotools' COCOeval after ``accumulate``."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(gt))
        truth.createIndex()
        judged = COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))), iou_type)
        judged.params.maxDets = [limit]
        judged.evaluate()
        judged.accumulate()
    return judged


def assert_equal_to_coco(ours: Evaluation, theirs: Any) -> None:
    assert ours.precision is not None and ours.recall is not None
    np.testing.assert_array_equal(ours.precision, theirs.eval["precision"][..., -1])
    np.testing.assert_array_equal(ours.recall, theirs.eval["recall"][..., -1])
    present = theirs.eval["precision"][:, :, :, 0, -1]
    expected = present[present > -1].mean() if (present > -1).any() else -1.0
    assert ours.summary()["AP"] == pytest.approx(expected, abs=1e-12)


def with_crowds(gt: Document, seed: int) -> Document:
    """The same document with some annotations as crowds, and without what COCO files do not have."""
    rng = np.random.default_rng(seed)
    annotations = [
        {k: v for k, v in row.items() if k != "ignore"} | {"iscrowd": int(rng.random() < 0.25)}
        for row in gt["annotations"]
    ]
    return {"images": [{"id": i["id"]} for i in gt["images"]], "categories": gt["categories"]} | {
        "annotations": annotations
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), limit=st.sampled_from([1, 2, 5, 100]))
def test_generated_cases_equal_pycocotools(seed: int, limit: int, random_case: Callable[..., Any]) -> None:
    gt, results = random_case(seed)
    gt = with_crowds(gt, seed)
    ours = evaluate(
        GroundTruth.from_document(gt, style="coco"), Detections.from_document(results), max_detections=limit, full=True
    )
    assert_equal_to_coco(ours, coco_oracle(gt, results, limit, "bbox"))


def test_crowds_occur_and_matter(random_case: Callable[..., Any]) -> None:
    differ = 0
    for seed in range(40):
        gt, results = random_case(seed)
        crowded = with_crowds(gt, seed)
        plain = json.loads(json.dumps(crowded))
        for row in plain["annotations"]:
            row["iscrowd"] = 0
        a, b = (
            evaluate(GroundTruth.from_document(d, style="coco"), Detections.from_document(results)).AP
            for d in (crowded, plain)
        )
        differ += not np.array_equal(a, b)
    assert differ > 10


def test_coco_caps_each_category_of_an_image_on_its_own() -> None:
    gt = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": k, "image_id": 1, "category_id": k, "bbox": [0, 0, 40, 40], "area": 1600} for k in (1, 2)
        ],
    }
    results = [{"image_id": 1, "category_id": k, "bbox": [0, 0, 40, 40], "score": 0.5} for k in (1, 1, 2)]
    found = evaluate(GroundTruth.from_document(gt, style="coco"), Detections.from_document(results), max_detections=1)
    assert found.n_det.tolist() == [1, 1] and found.AP.min() > 0.99
    assert found.summary()["APr"] == -1  # COCO files know no frequency


def masked(gt: Document, results: Results, seed: int) -> tuple[Document, Results]:
    """The same case with masks: polygons and run lengths of the boxes, clipped to the image, some with a corner cut."""
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(seed)

    def polygon(box: list[float]) -> list[float]:
        x, y, w, h = box
        w, h = max(abs(w), 1.0), max(abs(h), 1.0)
        cut = float(rng.choice([0.0, 0.0, 0.5]))
        return [x, y, x + w * (1 - cut), y, x + w, y + h * cut, x + w, y + h, x, y + h]

    def run_lengths(box: list[float]) -> dict[str, Any]:
        code = coco_mask.merge(coco_mask.frPyObjects([polygon(box)], SIDE, SIDE))
        return {"size": code["size"], "counts": code["counts"].decode()}

    images = [image | {"height": SIDE, "width": SIDE} for image in gt["images"]]
    annotations = []
    for row in gt["annotations"]:
        mask: Any = [polygon(row["bbox"])]
        if rng.random() < 0.3:
            mask = run_lengths(row["bbox"])
        annotations.append(row | {"segmentation": mask})
    found = [row | {"segmentation": run_lengths(row["bbox"])} for row in results]
    if rng.random() < 0.5:  # then the area is that of the mask
        found = [{k: v for k, v in row.items() if k != "bbox"} for row in found]
    return gt | {"images": images, "annotations": annotations}, found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), style=st.sampled_from(["lvis", "coco"]))
def test_mask_ap_equals_the_references(
    seed: int, style: Style, random_case: Callable[..., Any], lvis_oracle: Callable[..., Any]
) -> None:
    gt, results = random_case(seed)
    if style == "coco":
        gt = with_crowds(gt, seed)
    gt, results = masked(gt, results, seed)
    truth = GroundTruth.from_document(gt, style=style, masks=True)
    ours = evaluate(truth, Detections.from_document(results, masks=True), full=True)
    if style == "coco":
        assert_equal_to_coco(ours, coco_oracle(gt, results, 100, "segm"))
    else:
        theirs = lvis_oracle(gt, results, iou_type="segm")
        np.testing.assert_array_equal(ours.precision, theirs.eval["precision"])
        np.testing.assert_array_equal(ours.recall, theirs.eval["recall"])


BAD_MASKS = [
    (None, "expected polygons"),
    ([], "no polygon"),
    ([[1, 2, 3]], "at least three x, y pairs"),
    ([[1, 2, 3, 4, "five", 6]], "malformed 'segmentation'"),
    ({"size": [3, 3], "counts": "52"}, "but the image is"),
    ({"size": [SIDE, SIDE], "counts": [7, -1]}, "whole numbers with the sum"),
    ({"size": [SIDE, SIDE], "counts": "\x01\x02"}, "damaged compressed run lengths"),
    ({"size": [SIDE, SIDE], "counts": "é"}, "a character that they do not have"),
    ({"size": [SIDE, SIDE], "counts": 5}, "malformed 'segmentation'"),
    ({"size": 5, "counts": "5"}, "malformed 'segmentation'"),
    ({"size": [SIDE, SIDE], "counts": "0oooooo0"}, "a run of 536870912 pixels or more"),
]


@pytest.mark.parametrize(("mask", "message"), BAD_MASKS, ids=lambda value: str(value)[:30])
def test_malformed_masks_are_named(one_object: Document, mask: Any, message: str) -> None:
    one_object["images"][0] |= {"height": SIDE, "width": SIDE}
    one_object["annotations"][0]["segmentation"] = mask
    with pytest.raises(FormatError, match=rf"annotations\[0\].*{message}"):
        GroundTruth.from_document(one_object, masks=True)
    one_object["annotations"][0]["segmentation"] = [[10, 10, 50, 10, 50, 50, 10, 50]]
    row = {"image_id": 5, "category_id": 3, "score": 0.5, "bbox": [10, 10, 40, 40]}
    results = [row | {"segmentation": one_object["annotations"][0]["segmentation"]}, row | {"segmentation": mask}]
    truth = GroundTruth.from_document(one_object, masks=True)
    with pytest.raises(FormatError, match=rf"results\[1\].*{message}"):
        evaluate(truth, Detections.from_document(results, masks=True))


def test_masks_that_are_missing_are_named(one_object: Document, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="image 5 has no height"):
        GroundTruth.from_document(one_object, masks=True)
    one_object["images"][0] |= {"height": SIDE, "width": SIDE}
    with pytest.raises(FormatError, match=r"annotations\[0\] has no 'segmentation'"):
        GroundTruth.from_document(one_object, masks=True)
    row = {"image_id": 5, "category_id": 3, "score": 0.5, "bbox": [10, 10, 40, 40]}
    with pytest.raises(FormatError, match=r"results\[0\] has no 'segmentation'"):
        Detections.from_document([row], masks=True)


def test_coco_recall_of_the_best_1_and_10(
    random_case: Callable[..., Any], write_json_file: Callable[[str, Any], Path], tmp_path: Path
) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    gt, results = random_case(5)
    gt = with_crowds(gt, 5)
    files = [write_json_file(name, value) for name, value in (("gt.json", gt), ("r.json", results))]
    summary = evaluate_files(files[0], files[1:], [tmp_path / "out"], Options(style="coco"))[0].summary
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(files[0]))
        judged = COCOeval(truth, truth.loadRes(str(files[1])), "bbox")
        for step in (judged.evaluate, judged.accumulate, judged.summarize):
            step()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")
    assert [summary[name] for name in names] == pytest.approx(judged.stats.tolist(), abs=1e-12)
