"""Virtual features beside the rows of a training: what is drawn, that it is trained on, and that it can go on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calib.artifact import load
from calib.cache import Cache
from calib.errors import SettingError, UnsupportedError
from calib.heads.detector import detector_head
from calib.losses.softmax import cross_entropy
from calib.methods.natural import Natural
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, with_overrides
from calib.training import train
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.stages import fit_alone
from calib.training.virtual import VirtualFeatures, adapted

from ..toy import Toy

SETTINGS: dict[str, Any] = {"steps": 12, "warmup_steps": 0, "lr": 0.1, "virtual": 0.5, "virtual_every": 3}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Toy(maps=True).write(tmp_path_factory.mktemp("toy") / "cache")


def batches(cache: Cache, n: int) -> Iterator[Batch]:
    sampler = InstanceSampler(cache, ImageBatches(chunks=3), seed=0)
    for i in range(n):
        step = sampler.step(i)
        x, y = (
            torch.from_numpy(cache.features.take(step.rows)),
            torch.from_numpy(cache.labels[step.rows].astype(np.int64)),
        )
        generator = torch.Generator().manual_seed(i)
        yield Batch(i, x, y, torch.from_numpy(step.chunk), step.n_chunks, generator=generator, rows=step.rows)


def virtual_of(cache: Cache, **more: Any) -> VirtualFeatures:
    return VirtualFeatures(cache, Loop(virtual=0.1, **more), detector_head(cache), cache.features)


def test_rare_classes_are_drawn_with_the_probabilities_that_are_said(cache: Cache) -> None:
    virtual = virtual_of(cache, virtual_every=1, virtual_scale=2.0)
    inverse = 1 / np.maximum(cache.categories.instance_count, 1)
    first = np.minimum(2 * inverse / inverse.sum(), 1)
    np.testing.assert_allclose(virtual.probability.numpy(), first, rtol=1e-6)
    (batch,) = batches(cache, 1)
    assert virtual.beside(batch) is None  # before the first look at the losses
    x, y = (torch.from_numpy(a) for a in all_rows(cache))
    virtual.gaussians.update(x, y, y, batch.world)
    drawn = np.zeros(8)
    for i in range(600):
        more = virtual.beside(replace(batch, step=1, generator=torch.Generator().manual_seed(2 * i)))
        if more is not None:
            assert set(more.chunk.tolist()) <= {0, 1, 2} and more.features.shape == (len(more.labels), 8)
            drawn += np.bincount(more.labels.numpy(), minlength=8)
            virtual.probability.copy_(torch.from_numpy(first))  # what is learned from the losses is left out
    seen = virtual.gaussians.seen.numpy()
    expected = np.where(seen, np.minimum(first, 1), 0)
    np.testing.assert_allclose(drawn[:7] / 1800, expected, atol=0.04)
    assert not seen[-1] and drawn[6] == drawn[7] == 0  # the last class has no row; the background is never drawn


def all_rows(cache: Cache) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rows = np.flatnonzero((cache.labels >= 0) & (cache.labels < 7))
    return cache.features.take(rows), cache.labels[rows].astype(np.int64)


def test_probabilities_follow_the_losses() -> None:
    p, before = torch.tensor([0.1, 0.2, 0.95, 0.4]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    now, alone = torch.tensor([0.5, 1.5, 0.9, 1.0]), torch.arange(4)
    torch.testing.assert_close(adapted(p, before, now, alone), torch.tensor([0.11, 0.18, 1.0, 0.4]))
    together = adapted(p, before, now, torch.tensor([0, 0, 1, 1]))  # -0.5 and 0.5 are no change
    torch.testing.assert_close(together, torch.tensor([0.1, 0.2, 1.0, 0.44]))


def test_losses_are_those_of_the_head_on_the_rows_since_the_last_look(cache: Cache) -> None:
    virtual, head = virtual_of(cache, virtual_every=2), detector_head(cache)
    rows = list(batches(cache, 3))
    for batch in rows:
        virtual.beside(batch)
    # Looked at in step 2, behind its own losses: all three batches are in.
    x, y = torch.cat([b.features for b in rows]), torch.cat([b.labels for b in rows])
    loss = cross_entropy(head.full_scores(x).log(), y).detach()
    expected = [float(loss[y == c].mean()) if bool((y == c).any()) else -1.0 for c in range(7)]
    assert virtual.before.tolist() == pytest.approx(expected, rel=1e-4)
    assert float(virtual.rows.sum()) == 0


def test_the_step_is_that_of_both_losses(cache: Cache) -> None:
    """The loss that is reported, and where the weights go: L of the rows + weight L of the virtual ones."""
    settings = with_overrides(Natural(), SETTINGS | {"steps": 4, "virtual_scale": 1000.0, "lr": 0.0})
    run, plain = FitContext(), FitContext()
    fit_alone(settings, cache, run)
    fit_alone(with_overrides(settings, {"virtual": 0.0}), cache, plain)
    assert run.losses[0] == plain.losses[0] and run.losses[-1][1] > plain.losses[-1][1] + 0.1
    half = FitContext()
    fit_alone(with_overrides(settings, {"virtual": 0.25}), cache, half)
    (_, a), (_, b), (_, c) = plain.losses[-1], half.losses[-1], run.losses[-1]
    assert c - a == pytest.approx(2 * (b - a), rel=1e-4)


@pytest.mark.parametrize("method", ["natural", "bags", "seesaw", "loce", "residual", "eql-v2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_goes_with_any_head_and_goes_on_after_an_interruption(
    method: str, precision: str, cache: Cache, tmp_path: Path
) -> None:
    settings = SETTINGS | {"precision": precision, "virtual_scale": 3.0, "checkpoint_every": 1}
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    head = train(method, cache, tmp_path / "1", settings).head
    without = train(method, cache, tmp_path / "2", settings | {"virtual": 0.0}).head
    assert not torch.equal(head.scores(x), without.scores(x))
    assert load(tmp_path / "1").head.state_dict().keys() == without.state_dict().keys()
    with pytest.raises(KeyboardInterrupt):
        train(method, cache, tmp_path / "3", settings, progress=_Stops(7).progress)
    again = train(method, cache, tmp_path / "3", settings).head
    assert torch.equal(again.scores(x), head.scores(x))


class _Stops:
    def __init__(self, n: int) -> None:
        self._left = n

    @contextmanager
    def progress(self, label: str, *, total: int, unit: str) -> Iterator["_Stops"]:
        yield self

    def advance(self, n: int = 1, **metrics: float) -> None:
        self._left -= n
        if self._left <= 0:
            raise KeyboardInterrupt


def test_what_it_cannot_do_it_says(cache: Cache, tmp_path: Path) -> None:
    for method, more in (("pcb", {"form": "map"}), ("simcal", {"form": "3fc_rand"}), ("lws", {})):
        with pytest.raises(UnsupportedError, match="virtual features"):
            train(method, cache, tmp_path / "1", SETTINGS | more)
    for wrong in ({"virtual": -1.0}, {"virtual_every": 0}, {"virtual_scale": -1.0}):
        with pytest.raises(SettingError):
            Loop(**wrong)


def test_virtual_rows_look_like_their_class(cache: Cache) -> None:
    virtual = virtual_of(cache, virtual_every=1, virtual_scale=1e9)
    found: list[Tensor] = []
    for batch in batches(cache, 200):
        more = virtual.beside(batch)
        found += [] if more is None else [more.features[more.labels == 0]]
    x, y = all_rows(cache)
    torch.testing.assert_close(torch.cat(found).mean(dim=0), torch.from_numpy(x[y == 0].mean(axis=0)), atol=0.2, rtol=0)
