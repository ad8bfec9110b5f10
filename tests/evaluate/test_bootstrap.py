"""A replicate is an evaluation of the drawn images; intervals hold the difference and are paired."""

from typing import Any

import numpy as np
import pytest

from calib.errors import SettingError
from calib.evaluate import Detections, Evaluator, GroundTruth, evaluate
from calib.evaluate.bootstrap import Resampled, compare
from calib.evaluate.select import Caps

Document = dict[str, Any]


def split(seed: int, n_images: int = 12) -> tuple[Document, Detections]:
    """Three categories, known in every image; no two scores are equal."""
    rng = np.random.default_rng(seed)
    images = [{"id": i + 1, "neg_category_ids": [1, 2, 3], "not_exhaustive_category_ids": []} for i in range(n_images)]
    categories = [
        {"id": c, "name": str(c), "frequency": "rcf"[c - 1], "instance_count": 6 ** (2 * c - 1)} for c in (1, 2, 3)
    ]
    annotations, results = [], []
    for i in range(n_images):
        for k in range(rng.integers(0, 5)):
            box = [100.0 * k, 0.0, 40.0, 40.0]
            row = {"image_id": i + 1, "category_id": int(rng.integers(1, 4)), "bbox": box}
            annotations.append(row | {"id": len(annotations) + 1, "area": 1600.0})
            for _ in range(rng.integers(0, 4)):
                category = row["category_id"] if rng.random() < 0.7 else int(rng.integers(1, 4))
                shifted = [box[0] + float(rng.choice([0, 4, 9, 30])), *box[1:]]
                results.append(row | {"category_id": category, "bbox": shifted, "score": float(rng.random())})
    return {"images": images, "categories": categories, "annotations": annotations}, Detections.from_document(results)


def drawn(gt: Document, found: Detections, times: list[int]) -> tuple[Document, Detections]:
    """The split that holds image i ``times[i]`` times."""
    new: Document = {"images": [], "annotations": [], "categories": gt["categories"]}
    parts = []
    for image, n in zip(gt["images"], times, strict=True):
        rows = np.flatnonzero(found.image_id == image["id"])
        for _ in range(n):
            number = len(new["images"]) + 1
            new["images"].append(image | {"id": number})
            for row in gt["annotations"]:
                if row["image_id"] == image["id"]:
                    new["annotations"].append(row | {"id": len(new["annotations"]) + 1, "image_id": number})
            parts.append((np.full(len(rows), number), rows))
    image_id, rows = (np.concatenate([p[k] for p in parts]) for k in range(2))
    return new, Detections(image_id, found.category_id[rows], found.score[rows], found.box[rows])


def test_a_replicate_is_the_evaluation_of_the_drawn_images() -> None:
    for seed in range(20):
        gt, found = split(seed)
        evaluator = Evaluator(GroundTruth.from_document(gt))
        times = np.bincount(np.random.default_rng(seed).integers(0, 12, 12), minlength=12)
        truth = evaluator.truth
        n = np.bincount(truth.category, times[truth.image], minlength=3)
        ap = Resampled(evaluator, evaluator.match(found, Caps())).average_precision(times.astype(float), n)
        gt_drawn, found_drawn = drawn(gt, found, times.tolist())
        expected = evaluate(GroundTruth.from_document(gt_drawn), found_drawn).AP
        np.testing.assert_allclose(ap, expected, atol=1e-12)


def test_intervals_hold_the_difference_and_are_paired() -> None:
    gt, found = split(3, 60)
    evaluator = Evaluator(GroundTruth.from_document(gt))
    worse = Detections(found.image_id, found.category_id, np.random.default_rng(0).permutation(found.score), found.box)
    intervals = compare(evaluator, worse, found, replicates=200)
    assert set(intervals) == {"AP", "APr", "APc", "APf", "AP1", "AP3", "AP4", "bAP"}
    for key, interval in intervals.items():
        own, other = (evaluator.evaluate(d).summary()[key] for d in (found, worse))
        assert interval.difference == pytest.approx(own - other, abs=1e-12)
        assert interval.low <= interval.difference <= interval.high
    same = compare(evaluator, found, found, replicates=20)["AP"]
    assert (same.difference, same.low, same.high) == (0, 0, 0)
    assert compare(evaluator, worse, found, replicates=50) == compare(evaluator, worse, found, replicates=50)


def test_too_few_replicates_are_refused() -> None:
    gt, found = split(0)
    with pytest.raises(SettingError, match="expected replicates >= 10"):
        compare(Evaluator(GroundTruth.from_document(gt)), found, found, replicates=5)
