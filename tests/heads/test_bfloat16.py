"""Heads in bfloat16 score as in float32, nearly."""

from pathlib import Path

import pytest
import torch
from torch import nn

from calib.cache import Cache
from calib.heads.bfloat16 import BFloat16Linear, in_bfloat16
from calib.heads.linear import FORMS, LinearClassifier
from calib.registry import METHODS
from calib.training import train

from ..score.test_score import KINDS
from ..toy import Toy


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Toy(feature_size=64).write(tmp_path_factory.mktemp("toy") / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_nearly_those_of_float32(kind: str, cache: Cache, tmp_path: Path) -> None:
    method, settings = KINDS[kind]
    steps = {} if not METHODS[method].trains else {"steps": 3}
    head = train(method, cache, tmp_path / "head", settings | steps).head
    x = torch.from_numpy(cache.features.read(0, 40))
    exact = head.scores(x).clone()
    with torch.inference_mode():
        rounded = in_bfloat16(head).scores(x)
    layers = [m for m in head.modules() if isinstance(m, LinearClassifier | nn.Linear) and len(m.weight) > 1]
    replaced = any(isinstance(m, BFloat16Linear) for m in head.modules())
    assert not layers and replaced == (kind != "tde")
    assert rounded.dtype == torch.float32 and torch.equal(rounded, exact) != replaced
    torch.testing.assert_close(rounded, exact, atol=0.02, rtol=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_off_by_the_rounding_of_bfloat16_only(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = LinearClassifier.fresh(50, 200, form, generator)
    layer.weight.data *= 10
    if layer.bias is not None:
        layer.bias.data = torch.randn(50, generator=generator)
    x = torch.randn(30, 200, generator=generator)
    with torch.inference_mode():
        exact, rounded = layer(x), BFloat16Linear(layer)(x)
    # Two operands and the result are each off by at most 2^-9 of their size; the errors of 200 products average out.
    assert (rounded - exact).abs().max() < 2**-7 * exact.abs().max()
