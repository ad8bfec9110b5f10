"""Generated cases against the lvis package, to the last bit."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.evaluate import Detections, Evaluation, GroundTruth, evaluate


def assert_equal(ours: Evaluation, theirs: Any) -> None:
    np.testing.assert_array_equal(ours.precision, theirs.eval["precision"])
    np.testing.assert_array_equal(ours.recall, theirs.eval["recall"])
    summary = ours.summary()
    for key, value in theirs.results.items():
        assert summary[key.split("@")[0]] == pytest.approx(value, abs=1e-12), key


@settings(max_examples=300, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), max_detections=st.sampled_from([-1, 1, 2, 5, 300]))
def test_generated_cases_equal_the_lvis_package(
    seed: int, max_detections: int, lvis_oracle: Callable[..., Any], random_case: Callable[..., Any]
) -> None:
    gt, results = random_case(seed)
    ours = evaluate(
        GroundTruth.from_document(gt),
        Detections.from_document(results),
        max_detections=max_detections,
        full=True,
    )
    assert_equal(ours, lvis_oracle(gt, results, max_detections))


def test_more_than_300_results_in_an_image_are_capped_like_the_lvis_package(
    lvis_oracle: Callable[..., Any], random_case: Callable[..., Any]
) -> None:
    gt, results = random_case(3)
    image = results[0]["image_id"]
    rng = np.random.default_rng(0)
    crowd = [dict(rng.choice(np.array(results, dtype=object)), image_id=image) for _ in range(700)]
    for i, row in enumerate(crowd):
        row["score"] = round(0.9 - i * 7919 % 700 / 1000, 2)  # ties across the cap
    ours = evaluate(GroundTruth.from_document(gt), Detections.from_document(results + crowd), full=True)
    capped = evaluate(GroundTruth.from_document(gt), Detections.from_document(results + crowd), max_detections=-1)
    assert ours.n_det.sum() < capped.n_det.sum()
    assert_equal(ours, lvis_oracle(gt, results + crowd))


def test_generated_cases_are_awkward(random_case: Callable[..., Any]) -> None:
    """The comparison above is worth something only if matches, misses and ignored objects occur in it."""
    precision, scores, areas, ignored, unknown = [], [], [], 0, 0
    for seed in range(60):
        gt, results = random_case(seed)
        e = evaluate(GroundTruth.from_document(gt), Detections.from_document(results), full=True)
        assert e.precision is not None
        precision.append(e.precision.ravel())
        scores.append(len(results) - len({row["score"] for row in results}))
        areas += [row["area"] for row in gt["annotations"]]
        ignored += sum("ignore" in row for row in gt["annotations"])
        unknown += sum(row["category_id"] == 77 for row in results)
    values = np.concatenate(precision)
    assert (values == -1).any() and (values == 0).any() and ((values > 0) & (values < 0.99)).mean() > 0.05
    assert sum(scores) > 100 and {0.0, 1024.0, 9216.0} <= set(areas) and ignored > 20 and unknown > 20
