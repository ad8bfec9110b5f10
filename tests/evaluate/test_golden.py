"""Frozen cases, evaluated by reference implementations: arrays equal to the last bit, metrics to 1e-12.

AP-fixed and AP-pool as in the scripts of Dave et al.; calibration metrics, to 1e-9, as in Kuzucu et al.'s code. The
environment variable CALIB_GOLDEN_EVALUATION names a further folder of such cases.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.evaluate import Detections, Evaluator, GroundTruth
from calib.evaluate.calibration import calibration
from calib.evaluate.pooled import pooled_ap

FOLDERS = [
    Path(__file__).parent / "golden",
    *map(Path, filter(None, [os.environ.get("CALIB_GOLDEN_EVALUATION")])),
]
CASES = [case.parent for folder in FOLDERS for case in sorted(folder.glob("*/expected.npz"))]
CALIBRATION = {
    "D-ECE": "D-ECE (10 bins, tau .5)",
    "LaECE": "LaECE (25 bins, tau .5)",
    "LaECE_0": "LaECE_0 (25 bins, tau 0)",
    "LaACE_0": "LaACE_0 as coded (tau 0)",
    **{f"LRP{part}": f"lrp{part} tau .5, present cats" for part in ("", "_loc", "_fp", "_fn")},
}
OPTIMAL_LRP = {"oLRP_loc": "oLRP LOC", "oLRP_fp": "oLRP FP", "oLRP_fn": "oLRP FN"}

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def read(case: Path) -> tuple[Evaluator, Detections, dict[str, Any]]:
    evaluator = Evaluator(GroundTruth.read(case / "gt.json.gz"))
    return evaluator, Detections.read(case / "dt.json.gz"), json.loads((case / "expected.json").read_text())


def test_every_folder_has_cases() -> None:
    assert all(any(case.parent == folder for case in CASES) for folder in FOLDERS)


@every_case
def test_ap(case: Path) -> None:
    evaluator, detections, expected = read(case)
    evaluation = evaluator.evaluate(detections, full=True)
    arrays = np.load(case / "expected.npz")

    present = arrays["cat_index"]
    absent = np.setdiff1d(np.arange(len(evaluator.truth.category_ids)), present)
    assert evaluator.truth.category_ids.tolist() == arrays["cat_ids"].tolist()
    assert evaluation.precision is not None and evaluation.recall is not None
    np.testing.assert_array_equal(evaluation.precision[:, :, present], arrays["precision"], strict=True)
    np.testing.assert_array_equal(evaluation.recall[:, present], arrays["recall"], strict=True)
    assert (evaluation.precision[:, :, absent] == -1).all()
    assert (evaluation.recall[:, absent] == -1).all()

    summary = evaluation.summary()
    metrics = {key.split("@")[0]: value for key, value in expected["results"].items()} | expected["bins"]
    assert {key: summary[key] for key in metrics} == pytest.approx(metrics, abs=1e-12)
    for key, values in expected["per_category"].items():
        np.testing.assert_allclose(getattr(evaluation, key), values, rtol=0, atol=1e-12)


@every_case
def test_ap_fixed_and_ap_pool(case: Path) -> None:
    evaluator, detections, expected = read(case)
    limits = [int(key.rpartition("_")[2]) for key in expected if key.startswith("ap_fixed_")]
    assert min(limits) < 100 < max(limits)  # one that cuts, one that does not
    for k in limits:
        summary = evaluator.evaluate(detections, max_detections=-1, per_category=k).summary()
        metrics = {key.split("@")[0]: value for key, value in expected[f"ap_fixed_{k}"].items()}
        assert {key: summary[key] for key in metrics} == pytest.approx(metrics, abs=1e-12)
        pooled = {
            f"AP-pooled-{pool}": value for pool, value in pooled_ap(evaluator, detections, per_category=k).items()
        }
        assert pooled == pytest.approx(expected[f"ap_pool_{k}"], abs=1e-12)


@every_case
def test_calibration(case: Path) -> None:
    evaluator, detections, _ = read(case)
    expected = json.loads((case / "expected_calibration.json").read_text())
    metrics = calibration(evaluator, detections)
    wanted = {name: expected[key] for name, key in CALIBRATION.items()}
    wanted |= {name: expected["oLRP"][OPTIMAL_LRP.get(name, name)] for name in metrics if name.startswith("oLRP")}
    assert metrics == pytest.approx(wanted, abs=1e-9)
    assert set(OPTIMAL_LRP) < set(metrics)
