"""Methods of the field beside those of test_fit.py: what they are at the limits of their settings, and their pieces."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.affine import AffineHead
from calib.heads.detector import detector_head
from calib.methods.iif import IIF
from calib.settings import with_overrides
from calib.training.context import FitContext
from calib.training.stages import fit_alone

from ..toy import Toy


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Toy().write(tmp_path_factory.mktemp("toy") / "cache")


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(40, Toy().feature_size, generator=torch.Generator().manual_seed(3))


def still(method: object, **more: object) -> object:
    """The method with one step of rate 0."""
    return with_overrides(method, {"loop.steps": 1, "loop.lr": 0.0, "loop.weight_decay": 0.0} | more)


@pytest.mark.parametrize("method", [IIF(strength=0.0), still(IIF(strength=0.0, when="loss"))], ids=["posthoc", "loss"])
def test_iif_without_strength_is_the_detector(method: IIF, cache: Cache, features: Tensor) -> None:
    ours = fit_alone(method, cache, FitContext()).scores(features)
    torch.testing.assert_close(ours, detector_head(cache).scores(features))


def test_iif_multiplies_by_the_logarithm_of_inverse_frequency(tmp_path: Path, features: Tensor) -> None:
    cache = Toy(counts=(7, 3, 1), images=9).write(tmp_path / "cache")
    head = fit_alone(IIF(), cache, FitContext())
    assert isinstance(head, AffineHead)
    # Nine images, of which as many have the class as it has objects.
    expected = torch.tensor([*np.log(9 / np.array([7, 3, 1])), 1.0], dtype=torch.float32)
    torch.testing.assert_close(head.scale, expected)
    z = torch.from_numpy(cache.classifier.logits(features.numpy()))
    torch.testing.assert_close(head.full_scores(features), (expected * z).softmax(dim=1))


@pytest.mark.parametrize("make", [lambda: IIF(form="log"), lambda: IIF(strength=-1.0), lambda: IIF(when="both")])
def test_settings_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(SettingError):
        make()
