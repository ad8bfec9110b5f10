"""The proof of extraction, by the functions of benchmarks/extraction.py on a small set."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from calib.cache import Cache
from calib.score.detect import Detections

from ..scripts import load_script

pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load_script("benchmarks/extraction.py")


@pytest.fixture(scope="module")
def proof(bench: ModuleType, shapes_set: Path, detector_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return bench.Proof(shapes_set / "val.json", shapes_set / "images", detector_file, tmp_path_factory.mktemp("proof"))


@pytest.fixture(scope="module")
def bare(bench: ModuleType, proof: Any) -> list[Detections]:
    """What the unmodified model gives."""
    found: list[Detections] = bench.bare_detections(proof.adapter.model, proof.pixels)
    return found


def test_features_times_classifier_are_the_logits_in_float32(bench: ModuleType, exact_val_cache: Cache) -> None:
    metrics = bench.reproduction(exact_val_cache)
    assert metrics["rows"] == exact_val_cache.n_rows > 3000
    assert metrics["max_abs_difference"] < 1e-6 * metrics["max_abs_logit"]


def test_features_times_classifier_are_the_logits_in_float16(bench: ModuleType, val_cache: Cache) -> None:
    """Features and logits carry a relative rounding of 2^-11 each."""
    metrics = bench.reproduction(val_cache)
    assert 0 < metrics["max_abs_difference"] < 1e-3 * metrics["max_abs_logit"]


def test_a_float32_cache_gives_the_detectors_own_detections(
    bench: ModuleType, exact_val_cache: Cache, bare: list[Detections]
) -> None:
    metrics = bench.differences(bench.cached_detections(exact_val_cache), bare)
    assert metrics["identical_images"] == metrics["images"] == 24
    assert metrics["detections"] > 24 * 100


def test_the_comparison_sees_a_single_other_bit(bench: ModuleType, bare: list[Detections]) -> None:
    d = bare[3]
    box = d.box.copy()
    box[-1, 2] = np.nextafter(box[-1, 2], np.float32(0))
    swapped = Detections(d.row, d.category[::-1], d.score[::-1], d.box[::-1])
    for other, alike in ((Detections(d.row, d.category, d.score, box), 23), (swapped, 24)):
        metrics = bench.differences([*bare[:3], other, *bare[4:]], bare)
        assert metrics["identical_images"] == 23
        assert metrics["identical_but_for_order_of_equal_scores"] == alike


def test_a_float16_cache_gives_the_detectors_own_ap(
    bench: ModuleType, proof: Any, val_cache: Cache, bare: list[Detections]
) -> None:
    own = bench.average_precision(proof.truth, proof.dataset, bare)
    cached = bench.average_precision(proof.truth, proof.dataset, bench.cached_detections(val_cache))
    assert 20 < own["AP"] < 60  # it detects
    assert cached["AP"] == pytest.approx(own["AP"], abs=0.05)


def test_a_row_of_float16_takes_its_numbers_and_little_more(bench: ModuleType, val_cache: Cache) -> None:
    """2 bytes for each of 256 features and 193 logits; the rest is what is known of the proposal."""
    extra = bench._bytes(val_cache) / val_cache.n_rows - 2 * (256 + 193)
    assert 20 < extra < 80


def test_speeds_are_taken_in_turn_after_one_round_untimed(bench: ModuleType) -> None:
    order: list[str] = []
    runs: dict[str, Callable[[], None]] = {n: lambda n=n: order.append(n) for n in ("bare", "extract")}  # type: ignore[misc]
    metrics = bench.speeds(runs, images=10, repeats=2)
    assert order == ["bare", "extract"] * 3
    assert list(metrics["overhead_percent"]) == ["extract, wall", "extract, CPU"]
    assert all(f["least"] <= f["median"] <= f["most"] for kind in metrics.values() for f in kind.values())
