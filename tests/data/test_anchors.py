"""Anchors that are fitted to boxes: clusters are found, rare categories count, bad input is refused."""

import numpy as np
import pytest

from calib.data.anchors import fit_anchors
from calib.errors import InputError, SettingError


def test_clusters_of_sizes_and_ratios_are_found() -> None:
    rng = np.random.default_rng(0)
    size = rng.choice([8.0, 30.0, 90.0], 3000) * np.exp(rng.normal(0, 0.03, 3000))
    ratio = rng.choice([0.25, 1.0, 3.0], 3000) * np.exp(rng.normal(0, 0.03, 3000))
    sides = np.stack([size / np.sqrt(ratio), size * np.sqrt(ratio)], axis=1)
    found = fit_anchors(sides, np.ones(3000, np.int64))
    np.testing.assert_allclose(np.concatenate(found.sizes), [8, 30, 90], rtol=0.02)
    np.testing.assert_allclose(found.ratios, [0.25, 1, 3], rtol=0.02)
    assert found.covered == found.covered_per_category == 1.0
    more = fit_anchors(sides, np.ones(3000, np.int64), per_level=2, ratios=1)
    assert [len(level) for level in more.sizes] == [2, 2, 2] and len(more.ratios) == 1
    assert list(np.concatenate(more.sizes)) == sorted(np.concatenate(more.sizes)) and more.covered < 1


def test_a_rare_category_of_another_size_gets_an_anchor() -> None:
    """1 in 400 boxes is ten times as large: without weights all three sizes would be those of the others."""
    rng = np.random.default_rng(1)
    sides = np.exp(rng.normal(np.log(10), 0.3, (2000, 2)))
    sides[:5] *= 10
    label = np.r_[np.full(5, 2), np.ones(1995, np.int64)].astype(np.int64)
    found = fit_anchors(sides, label)
    assert found.sizes[2][0] > 60
    assert found.covered_per_category > 0.75
    assert fit_anchors(sides, np.ones(2000, np.int64)).sizes[2][0] < 60


def test_boxes_that_are_all_alike_are_fitted_too() -> None:
    found = fit_anchors(np.full((4, 2), 12.0), np.ones(4, np.int64))
    assert found.sizes == ((12.0,),) * 3 and found.ratios == (1.0,) * 3 and found.covered == 1.0
    sides = np.array([[5.0, 0.0], [7.0, 7.0]])  # one of them has no area
    assert fit_anchors(sides, np.ones(2, np.int64)).sizes == ((7.0,),) * 3


def test_nothing_to_fit_to_is_an_error() -> None:
    with pytest.raises(InputError, match="area"):
        fit_anchors(np.zeros((3, 2)), np.ones(3, np.int64))
    for wrong in ({"per_level": 0}, {"ratios": 0}):
        with pytest.raises(SettingError):
            fit_anchors(np.ones((3, 2)), np.ones(3, np.int64), **wrong)
