"""The control on detectors of other activations: what it minimises, and that it is trained and exported as any head."""

from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from calib.artifact import load
from calib.cache import Cache
from calib.export.export import Export, export
from calib.heads.detector import detector_head
from calib.methods.natural import Natural
from calib.sampling.instance import InstanceSampler
from calib.training import train
from calib.tune.search import Plan, tune

from ..ranks import plan, train_in_threads
from ..reference import plain
from ..test_methods import STEPS, _Bar, quick
from ..toy import Toy
from .test_first_step import BATCHES, SEED, compare, moves, rows_of, stepped

KINDS = ("sigmoid", "seesaw")
of_each = pytest.mark.parametrize("cache", KINDS, indirect=True)


@pytest.fixture
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    return Toy(activation=request.param).write(tmp_path / "cache")


def plain_loss(activation: str, z: Tensor, y: int) -> Tensor:
    """Of one row, a class at a time."""
    if activation == "sigmoid":
        parts = [-functional.logsigmoid(v if c == y else -v) for c, v in enumerate(z)]
        return torch.stack(parts).sum()
    classes, pair = list(z[:-2]), list(z[-2:])
    if y == len(classes):
        return -plain.log_softmax(pair, 1)
    return -plain.log_softmax(classes, y) - plain.log_softmax(pair, 0)


@of_each
def test_a_step_follows_the_plain_loss_of_the_detector(cache: Cache) -> None:
    step, x, y = rows_of(cache, InstanceSampler(cache, BATCHES, seed=SEED))
    activation = cache.manifest.detector.activation
    assert cache.background in y.tolist() and min(y) < cache.background

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        rows = plain.linear(x, weight, bias)
        values = [plain_loss(activation, z, k) for z, k in zip(rows, y.tolist(), strict=True)]
        return plain.chunk_mean(values, torch.from_numpy(step.chunk), 3, [1.0] * len(y))

    compare(moves(Natural(images=BATCHES), cache), loss)


@of_each
def test_it_begins_as_the_detector(cache: Cache) -> None:
    x = torch.from_numpy(cache.features.read(0, 30))
    start = stepped(Natural(images=BATCHES), cache, lr=0.0)
    assert torch.equal(start.full_scores(x), detector_head(cache).full_scores(x))


@of_each
def test_cut_short_in_one_pass_and_divided_it_is_the_same_head(
    cache: Cache, tmp_path: Path, content: Callable[[Path], dict[str, bytes]]
) -> None:
    settings = quick("natural", checkpoint_every=1)
    train("natural", cache, tmp_path / "alone" / "natural" / "1", settings)
    whole = content(tmp_path / "alone" / "natural")
    cut = tmp_path / "cut" / "1"
    with pytest.raises(KeyboardInterrupt):
        train("natural", cache, cut, settings, progress=_Bar(3).progress)
    later = _Bar(10**6)
    train("natural", cache, cut, settings, progress=later.progress)
    assert sum(later.advances) == STEPS and later.advances[0] == 2
    assert content(cut.parent) == whole
    train(("natural", "bags"), cache, tmp_path / "one", settings)
    assert content(tmp_path / "one" / "natural") == whole
    train_in_threads(3, plan("natural", cache, tmp_path / "ranks", settings))
    ours, theirs = (load(p).head.state_dict() for p in (tmp_path / "alone" / "natural" / "1", tmp_path / "ranks"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("cache", ["sigmoid"], indirect=True)
def test_of_a_sigmoid_detector_it_goes_back_into_the_checkpoint(cache: Cache, tmp_path: Path) -> None:
    head = train("natural", cache, tmp_path / "m" / "1", quick("natural")).head
    name = "roi_heads.box_predictor.cls_score"
    own = {"weight": cache.classifier.weight, "bias": cache.classifier.bias}
    state = {f"{name}.{k}": torch.cat([torch.from_numpy(v), torch.ones_like(torch.from_numpy(v[:1]))])
             for k, v in own.items() if v is not None}  # fmt: skip
    torch.save({"model": state}, tmp_path / "d.pth")
    export(tmp_path / "m" / "1", cache.path, tmp_path / "a.pth", Export("detectron2", tmp_path / "d.pth"))
    new, x = torch.load(tmp_path / "a.pth", weights_only=True)["model"], torch.randn(40, Toy().feature_size)
    z = functional.linear(x, new[f"{name}.weight"], new[f"{name}.bias"])
    torch.testing.assert_close(z[:, :-1].sigmoid(), head.scores(x), atol=1e-6, rtol=1e-4)


def test_a_search_on_a_sigmoid_detector_has_its_control(tmp_path: Path) -> None:
    ours, theirs = (Toy(activation="sigmoid", mode=m).write(tmp_path / m).path for m in ("train", "test"))
    said: list[str] = []
    plan = Plan(trials=8, steps=4, seeds=1, finalists=1)
    found = tune(ours, theirs, tmp_path / "study", plan, note=said.append)
    tried = duckdb.sql(f"SELECT DISTINCT method FROM '{found.out}/trials.parquet'").fetchall()
    assert ("natural",) in tried
    left_out = {line.partition(" ")[0] for line in said if "is left out" in line}
    assert "simcal" in left_out and "natural" not in left_out
