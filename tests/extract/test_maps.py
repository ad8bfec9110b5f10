"""RoI maps: what the detector's two layers make of them is its feature, and heads on maps train and score."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.cache import Cache
from calib.errors import UnsupportedError
from calib.heads.box_head import BoxHead
from calib.heads.detector import detector_head
from calib.score import detector_nms, score
from calib.training import train


@pytest.fixture(scope="module")
def caches(make_cache: Callable[..., Cache]) -> dict[str, Cache]:
    """The val split in float32, and as training proposals in float16, both with maps."""
    return {
        "test": make_cache("val", mode="test", dtype="float32", roi_maps=True),
        "train": make_cache("val", mode="train", roi_maps=True),
    }


def test_the_box_head_on_maps_gives_the_features(caches: dict[str, Cache]) -> None:
    cache = caches["test"]
    assert cache.maps is not None and cache.manifest.roi_maps == (64, 6, 6)
    c, maps = cache.classifier, torch.from_numpy(cache.maps.read(0, 300))
    assert c.fc1_weight is not None and c.fc2_weight is not None
    hidden = torch.relu(maps @ torch.from_numpy(c.fc1_weight).T + torch.from_numpy(c.fc1_bias))
    features = torch.relu(hidden @ torch.from_numpy(c.fc2_weight).T + torch.from_numpy(c.fc2_bias))
    np.testing.assert_allclose(features.numpy(), cache.features.read(0, 300), rtol=1e-4, atol=1e-4)


def test_the_detectors_head_on_maps_finds_what_it_finds_on_features(caches: dict[str, Cache]) -> None:
    cache = caches["test"]
    inner = detector_head(cache)
    on_maps, on_features = (
        list(score(cache, head.eval().requires_grad_(False), detector_nms(cache)))
        for head in (BoxHead.of(cache, inner), inner)
    )
    for a, b in zip(on_maps, on_features, strict=True):
        assert np.array_equal(a.detections.category, b.detections.category)
        np.testing.assert_array_equal(a.detections.score, b.detections.score)  # both take the stored logits


def test_maps_do_not_change_the_detector(caches: dict[str, Cache], exact_val_cache: Cache) -> None:
    plain, mapped = exact_val_cache, caches["test"]
    assert plain.manifest.detector == mapped.manifest.detector
    assert np.array_equal(plain.features.read(0, plain.n_rows), mapped.features.read(0, mapped.n_rows))


@pytest.mark.parametrize(
    ("method", "settings"),
    [("simcal", {"form": "3fc_ft"}), ("simcal", {"form": "2fc_rand", "hidden": 16}), ("pcb", {"form": "map"})],
)
def test_heads_on_maps_train_and_score(
    method: str, settings: dict[str, Any], caches: dict[str, Cache], exact_val_cache: Cache, tmp_path: Path
) -> None:
    quick = {"loop.steps": 3, "loop.warmup_steps": 0, "loop.lr": 0.01}
    artifact = train(method, caches["train"], tmp_path / "1", settings | quick)
    assert artifact.head.inputs == "maps" and artifact.head.feature_size == 64 * 6 * 6
    found = list(score(caches["test"], artifact.head, detector_nms(caches["test"])))
    assert sum(len(f.detections.score) for f in found) > 0
    with pytest.raises(UnsupportedError, match="no RoI maps"):
        next(score(exact_val_cache, artifact.head, detector_nms(exact_val_cache)))


def test_the_first_step_of_3fc_ft_starts_at_the_detector(caches: dict[str, Cache], tmp_path: Path) -> None:
    still = {"form": "3fc_ft", "threshold": 10**9, "loop.steps": 1, "loop.lr": 0.0}
    head = train("simcal", caches["train"], tmp_path / "1", still).head
    cache = caches["test"]
    assert cache.maps is not None
    ours = head.scores(torch.from_numpy(cache.maps.read(0, 100)))
    theirs = detector_head(cache).scores(torch.from_numpy(cache.features.read(0, 100)))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
