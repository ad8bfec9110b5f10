"""Frozen cases, evaluated by the lvis package: arrays equal to the last bit, figures to 1e-12.

The environment variable CALIB_GOLDEN_EVALUATION names a further folder of such cases.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from calib.evaluate import Detections, GroundTruth, evaluate

FOLDERS = [
    Path(__file__).parent / "golden",
    *map(Path, filter(None, [os.environ.get("CALIB_GOLDEN_EVALUATION")])),
]
CASES = [case.parent for folder in FOLDERS for case in sorted(folder.glob("*/expected.npz"))]


def test_every_folder_has_cases() -> None:
    assert all(any(case.parent == folder for case in CASES) for folder in FOLDERS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_case_is_met(case: Path) -> None:
    truth = GroundTruth.read(case / "gt.json.gz")
    evaluation = evaluate(truth, Detections.read(case / "dt.json.gz"), full=True)
    arrays = np.load(case / "expected.npz")
    expected = json.loads((case / "expected.json").read_text())

    present = arrays["cat_index"]
    absent = np.setdiff1d(np.arange(len(truth.category_ids)), present)
    assert truth.category_ids.tolist() == arrays["cat_ids"].tolist()
    assert evaluation.precision is not None and evaluation.recall is not None
    np.testing.assert_array_equal(evaluation.precision[:, :, present], arrays["precision"], strict=True)
    np.testing.assert_array_equal(evaluation.recall[:, present], arrays["recall"], strict=True)
    assert (evaluation.precision[:, :, absent] == -1).all()
    assert (evaluation.recall[:, absent] == -1).all()

    summary = evaluation.summary()
    figures = {key.split("@")[0]: value for key, value in expected["results"].items()} | expected["bins"]
    assert {key: summary[key] for key in figures} == pytest.approx(figures, abs=1e-12)
    for key, values in expected["per_category"].items():
        np.testing.assert_allclose(getattr(evaluation, key), values, rtol=0, atol=1e-12)
