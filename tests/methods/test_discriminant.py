"""The discriminant head against scikit-learn and against a slow plain form, and its hard cases."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from calib.artifact import load
from calib.cache import Cache
from calib.cache.rows import RowMatrix
from calib.decide.choose import choose
from calib.errors import InputError, SettingError, UnsupportedError
from calib.heads.base import Head
from calib.heads.detector import detector_head
from calib.heads.discriminant import DiscriminantHead
from calib.methods import discriminant as module
from calib.methods.discriminant import Discriminant, discriminant, measured
from calib.training import train
from calib.training.context import FitContext
from calib.training.stages import fit_alone

from ..toy import Toy


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Toy().write(tmp_path_factory.mktemp("toy") / "cache")


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(23, Toy().feature_size, generator=torch.Generator().manual_seed(3))


def foreground(cache: Cache) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rows = np.flatnonzero((cache.labels >= 0) & (cache.labels < cache.background))
    return cache.features.take(rows).astype(np.float64), cache.labels[rows]


@pytest.mark.parametrize("shrinkage", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("e", [0.0, 1.0])
def test_it_is_the_analysis_of_scikit_learn(e: float, shrinkage: float, cache: Cache) -> None:
    """Their covariance is the mean over classes by prior: that of equal priors is e = 1, that of frequencies e = 0."""
    x, y = foreground(cache)
    priors = np.bincount(y) / len(y) if e == 0 else np.full(len(np.unique(y)), 1 / len(np.unique(y)))
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=priors).fit(x, y)
    weight, bias = discriminant(measured(cache, e, FitContext()), shrinkage)
    seen = len(theirs.classes_)  # the last class has no row
    np.testing.assert_allclose(weight[:seen].numpy(), theirs.coef_, atol=1e-9, rtol=1e-8)
    np.testing.assert_allclose(bias[:seen].numpy(), theirs.intercept_ - np.log(priors), atol=1e-8, rtol=1e-8)


def plainly(s: Discriminant, cache: Cache, features: Tensor, z: Tensor) -> Tensor:
    """Row by row and class by class; ``z`` [N, C+1] of the base."""
    x, y = foreground(cache)
    c, d = cache.background, x.shape[1]
    n = np.bincount(y, minlength=c)
    mean = [x[y == k].mean(axis=0) if n[k] else np.zeros(d) for k in range(c)]
    scatter, total = np.zeros((d, d)), 0.0
    for row, label in zip(x, y, strict=True):
        r, w = row - mean[label], n[label] ** -s.e
        scatter, total = scatter + w * np.outer(r, r), total + w
    scatter /= total
    inverse = np.linalg.inv((1 - s.s) * scatter + s.s * np.trace(scatter) / d * np.eye(d))
    count = np.maximum(cache.categories.instance_count, 1)
    out = np.zeros((len(features), c + 1))
    for i, f in enumerate(features.numpy().astype(np.float64)):
        shifted = [float(z[i, k]) - s.tau * np.log(count[k] / count.min()) for k in range(c)]
        background = float(np.exp(float(z[i, c])))
        background = background / (background + np.exp(shifted).sum())
        share = np.zeros(c)
        for k in np.flatnonzero(n):
            g = mean[k] @ inverse @ f - mean[k] @ inverse @ mean[k] / 2
            share[k] = np.exp(s.m / s.T * g + (1 - s.m) * shifted[k])
        out[i] = [*((1 - background) * share / share.sum()), background]
    return torch.from_numpy(out).float()


@pytest.mark.parametrize(
    "settings",
    [{}, {"m": 1.0, "T": 4.0}, {"m": 0.0, "tau": 1.0}, {"e": 0.0, "s": 1.0}, {"e": 0.8, "s": 0.01, "tau": 0.0}],
    ids=str,
)
def test_it_is_the_plain_form(settings: dict[str, float], cache: Cache, features: Tensor) -> None:
    method = Discriminant(**settings)
    head = fit_alone(method, cache, FitContext())
    z = torch.from_numpy(cache.classifier.logits(features.numpy()))
    torch.testing.assert_close(head.full_scores(features), plainly(method, cache, features, z), atol=1e-5, rtol=1e-4)
    given = torch.randn(23, 8, generator=torch.Generator().manual_seed(1))
    expected = plainly(method, cache, features, given)
    torch.testing.assert_close(head.full_scores(features, given), expected, atol=1e-5, rtol=1e-4)


def test_blocks_of_rows_change_nothing(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(cache, 0.5, FitContext())
    monkeypatch.setattr(module, "ROWS", 7)
    parts = measured(Cache(cache.path), 0.5, FitContext())
    assert torch.equal(parts.count, whole.count)
    torch.testing.assert_close(parts.covariance, whole.covariance, atol=1e-12, rtol=1e-12)


def test_features_are_read_once_whatever_is_chosen(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    take = RowMatrix.take

    def counted(self: RowMatrix, rows: Any) -> Any:
        taken.append(len(rows))
        return take(self, rows)

    own, tune = Cache(cache.path), Toy(mode="test").write(cache.path.with_name("tune"))
    monkeypatch.setattr(RowMatrix, "take", counted)
    for key, values in (("m", "0,0.5,1"), ("T", "2,8"), ("s", "0.1,0.9"), ("tau", "0,1"), ("e", "0,0.5")):
        choose("discriminant", own, tune, key, values.split(","), {})
    rows = len(foreground(cache)[1])
    assert sum(taken) - rows == 2 * rows  # both e, and what this test itself has read


def test_a_class_without_a_row_scores_0_and_one_with_a_single_row_does_not(tmp_path: Path) -> None:
    # Toy gives a class of n instances 2 n rows, at most ``most``.
    cache = Toy(counts=(30, 8, 2, 1, 0), most=1).write(tmp_path / "single")
    with pytest.raises(InputError, match=r"within 4 classes of 4 rows has no inverse"):
        fit_alone(Discriminant(), cache, FitContext())
    cache = Toy(counts=(30, 1, 0), most=7).write(tmp_path / "few")
    head = fit_alone(Discriminant(m=1.0), cache, FitContext())
    x = torch.randn(50, 8)
    scores = head.scores(x)
    assert bool((scores[:, 2] == 0).all()) and bool((scores[:, :2] > 0).any(dim=0).all())
    with pytest.raises(InputError, match="has no inverse with a shrinkage of 0"):
        fit_alone(Discriminant(s=0.0), cache, FitContext())  # eight numbers, seven rows


def test_what_it_cannot_do_it_says(cache: Cache, tmp_path: Path) -> None:
    wide = Toy(feature_size=4097, counts=(5, 2), images=3).write(tmp_path / "wide")
    with pytest.raises(UnsupportedError, match="covariance of 4097 x 4097"):
        train("discriminant", wide, tmp_path / "1")
    for settings in ({"m": 1.1}, {"s": -0.1}, {"s": 1.5}, {"T": 0.0}, {"tau": -1.0}, {"e": float("nan")}):
        with pytest.raises(SettingError):
            Discriminant(**settings)
    nothing = Toy(counts=(0, 0)).write(tmp_path / "nothing")
    with pytest.raises(InputError, match="none has a class"):
        train("discriminant", nothing, tmp_path / "1")


def test_without_the_gaussians_it_is_logit_adjustment_and_one_layer(features: Tensor, tmp_path: Path) -> None:
    cache = Toy(counts=(40, 9, 2)).write(tmp_path / "cache")
    base = train("natural", cache, tmp_path / "base", {"steps": 9, "warmup_steps": 0, "lr": 0.1})
    ours = train("discriminant", cache, tmp_path / "1", {"m": 0.0, "tau": 0.7}, base=base).head
    theirs = train("logit-adjustment", cache, tmp_path / "2", {"tau": 0.7}, base=base).head
    torch.testing.assert_close(ours.scores(features), theirs.scores(features))
    for a, b in zip(ours.folded()[:2], theirs.folded()[:2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ["sigmoid", "seesaw"])
def test_other_detectors_and_their_bases(activation: str, features: Tensor, tmp_path: Path) -> None:
    cache = Toy(activation=activation).write(tmp_path / "cache")
    z = detector_head(cache).full_scores(features).detach().log()
    if activation == "sigmoid":  # log odds against a background whose logit is 0
        z = torch.cat([torch.from_numpy(cache.classifier.logits(features.numpy())), torch.zeros(23, 1)], dim=1)
    method = Discriminant()
    heads: list[Head] = [fit_alone(method, cache, FitContext())]
    if activation == "sigmoid":
        base = train("tau-norm", cache, tmp_path / "base", {"tau": 0.0})
        heads.append(train("discriminant", cache, tmp_path / "1", base=base).head)
        folded = fit_alone(
            Discriminant(m=0.0), Toy(counts=(4, 2), activation=activation).write(tmp_path / "c"), FitContext()
        )
        assert folded.folded().weight.shape == (3, 8)
    for head in heads:
        torch.testing.assert_close(
            head.full_scores(features), plainly(method, cache, features, z), atol=1e-5, rtol=1e-4
        )
    train("discriminant", cache, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(again.head.scores(features), heads[0].scores(features))


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_of_a_cascade(average: str, tmp_path: Path) -> None:
    cache = Toy(stages=2, average=average).write(tmp_path / "cache")
    head = train("discriminant", cache, tmp_path / "1").head
    x = torch.randn(9, 16)
    stages = [fit_alone(Discriminant(), stage, FitContext()) for stage in cache.stages]
    parts = list(zip(stages, x.chunk(2, dim=1), strict=True))
    expected = sum(h.full_scores(own) for h, own in parts) / 2
    if average == "logits":
        assert all(isinstance(h, DiscriminantHead) for h in stages)
        expected = (sum(h.raw(own) for h, own in parts if isinstance(h, DiscriminantHead)) / 2).softmax(dim=1)
    torch.testing.assert_close(head.full_scores(x), expected, atol=1e-6, rtol=1e-5)
    assert bool((head.scores(x)[:, -1] == 0).all())
