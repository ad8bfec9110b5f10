"""The residual head: where it starts, what it learns, and that its draws are those of any number of processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calib.artifact import load
from calib.cache import Cache
from calib.errors import InputError, SettingError
from calib.heads.residual import ResidualHead
from calib.methods.residual import Residual
from calib.sampling.uniform import UniformSampler
from calib.settings import AdamLoop, Loop, with_overrides
from calib.training import train
from calib.training.context import FitContext
from calib.training.optimizer import Updater
from calib.training.stages import fit_alone

from ..toy import Toy

SHORT: dict[str, Any] = {"hidden": 16, "steps": 40, "warmup_steps": 0, "lr": 0.01, "rows_per_step": 30}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Toy().write(tmp_path_factory.mktemp("toy") / "cache")


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(23, Toy().feature_size, generator=torch.Generator().manual_seed(3))


def test_step_0_is_the_base(cache: Cache, features: Tensor, tmp_path: Path) -> None:
    base = train("natural", cache, tmp_path / "base", {"steps": 9, "warmup_steps": 0, "lr": 0.1})
    still = train("residual", cache, tmp_path / "1", SHORT | {"lr": 0.0}, base=base)
    torch.testing.assert_close(still.head.scores(features), base.head.scores(features))
    moved = train("residual", cache, tmp_path / "2", SHORT, base=base)
    assert not torch.allclose(moved.head.scores(features), base.head.scores(features), atol=1e-3)
    assert moved.info.losses[-1][1] < moved.info.losses[0][1]
    assert moved.info.base == base.chain() and isinstance(load(tmp_path / "2").head, ResidualHead)


def test_its_logits_by_hand(cache: Cache, features: Tensor) -> None:
    head = fit_alone(with_overrides(Residual(), SHORT), cache, FitContext())
    assert isinstance(head, ResidualHead)
    t = {k: v.detach() for k, v in head.state_dict().items()}
    hidden = (features @ t["fc1.weight"].T + t["fc1.bias"]).clamp_min(0)
    z = features @ t["classifier.weight"].T + t["classifier.bias"] + hidden @ t["fc2.weight"].T + t["fc2.bias"]
    torch.testing.assert_close(head.eval().full_scores(features), z.softmax(dim=1))
    kept = torch.rand(23, 16)
    z = z - (hidden * (1 - kept)) @ t["fc2.weight"].T
    torch.testing.assert_close(head.logits(features, kept), z, atol=1e-5, rtol=1e-5)


def test_dropout_tau_and_seed_change_what_is_learned(cache: Cache, features: Tensor) -> None:
    def scores(seed: int = 0, **more: Any) -> Tensor:
        return fit_alone(with_overrides(Residual(), SHORT | more), cache, FitContext(seed)).scores(features)

    assert torch.equal(scores(), scores())
    for other in (scores(1), scores(dropout=0.0), scores(tau=1.0), scores(precision="bf16"), scores(weight_decay=0.0)):
        assert not torch.equal(other, scores())
    # The prior in the loss lifts rare classes against frequent ones.
    rare, frequent = slice(3, 6), slice(0, 2)
    shares = [s[:, rare].mean() / s[:, frequent].mean() for s in (scores(tau=1.0), scores())]
    assert shares[0] > 1.1 * shares[1]
    torch.testing.assert_close(scores(precision="bf16"), scores(), atol=0.1, rtol=0.2)


@pytest.mark.parametrize("settings", [{"dropout": 1.0}, {"dropout": -0.1}, {"hidden": 0}, {"rows_per_step": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        Residual(**settings)


def test_rows_are_drawn_uniformly_among_those_with_a_label(cache: Cache) -> None:
    sampler = UniformSampler(cache, rows_per_step=500, seed=3)
    drawn = np.concatenate([sampler.step(i).rows for i in range(100)])
    usable = np.flatnonzero(cache.labels >= 0)
    count = np.bincount(drawn, minlength=cache.n_rows)
    assert count[cache.labels < 0].sum() == 0 and len(np.unique(drawn)) == len(usable)
    mean = len(drawn) / len(usable)
    assert abs(count[usable] - mean).max() < 5 * mean**0.5
    assert np.array_equal(sampler.step(7).rows, sampler.step(7).rows) and sampler.step(7).n_chunks == 1
    assert not np.array_equal(sampler.step(7).rows, UniformSampler(cache, rows_per_step=500, seed=4).step(7).rows)


def test_without_a_foreground_row_there_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none has a class"):
        train("residual", Toy(counts=(0, 0)).write(tmp_path / "cache"), tmp_path / "1", SHORT)


@pytest.mark.parametrize("loop", [Loop(lr=0.1, weight_decay=0.1), AdamLoop(lr=0.1, weight_decay=0.1, momentum=0.8)])
def test_an_optimiser_goes_on_from_what_was_kept_of_it(loop: Loop) -> None:
    def layer() -> nn.Linear:
        torch.manual_seed(1)
        return nn.Linear(3, 2)

    def steps(module: nn.Module, updater: Updater, n: range) -> None:
        for i in n:
            updater.update(module(torch.full((1, 3), float(i + 1))).square().sum(), 0.1)

    whole, first, second = layer(), layer(), layer()
    steps(whole, Updater(whole, loop), range(6))
    begun = Updater(first, loop)
    steps(first, begun, range(3))
    second.load_state_dict(first.state_dict())
    again = Updater(second, loop)
    again.restore([t.clone() for t in begun.momentum()])
    steps(second, again, range(3, 6))
    assert torch.equal(second.weight, whole.weight)


def test_one_step_of_adamw_by_hand() -> None:
    layer = nn.Linear(2, 1, bias=False)
    before, x = layer.weight.detach().clone(), torch.tensor([[1.0, -2.0]])
    Updater(layer, AdamLoop(weight_decay=0.5)).update(layer(x).sum(), 0.01)
    expected = before * (1 - 0.01 * 0.5) - 0.01 * x.sign()  # the first step is the sign of the gradient
    torch.testing.assert_close(layer.weight.detach(), expected, atol=1e-6, rtol=1e-6)
