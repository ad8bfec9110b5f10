"""A toy cache, features of its size, and a method that takes one step of rate 0."""

import pytest
import torch
from torch import Tensor

from calib.cache import Cache
from calib.settings import with_overrides

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
