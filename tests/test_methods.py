"""Every method of the registry must pass all of this; nothing here knows any of them by name."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calib.artifact import load
from calib.cache import Cache
from calib.errors import ShapeError
from calib.heads.base import Head
from calib.registry import METHODS
from calib.registry import load as load_target
from calib.settings import known_keys
from calib.train import train

from .toy import Toy

STEPS = 6


def quick(method: str, **more: Any) -> dict[str, Any]:
    """A few steps of every loop, a small hidden layer, a rate that moves the weights."""
    keys = known_keys(load_target(METHODS[method].target)())
    short = {"steps": STEPS, "hidden": 5, "warmup_steps": 0, "lr": 0.1, "rows_per_step": 40}
    chosen = {k: short[k.rpartition(".")[2]] for k in keys if k.rpartition(".")[2] in short}
    return chosen | more


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Toy().write(tmp_path_factory.mktemp("toy") / "cache")


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(23, Toy().feature_size, generator=torch.Generator().manual_seed(3))


def fitted(method: str, cache: Cache, tmp_path: Path, seed: int = 0, **more: Any) -> Head:
    return train(method, cache, tmp_path / f"{method}-{seed}" / "1", quick(method, **more), seed=seed).head


def learned(method: str) -> bool:
    return any(k.endswith("steps") and "warmup" not in k for k in known_keys(load_target(METHODS[method].target)()))


every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_its_module_names_paper_equations_and_differences(method: str) -> None:
    text = inspect.getdoc(import_module(METHODS[method].target.split(":")[0])) or ""
    assert "Paper:" in text or "Papers:" in text
    assert "Eq." in text
    assert "Differs:" in text


@every_method
def test_scores_are_a_matrix_in_0_to_1(method: str, cache: Cache, features: Tensor, tmp_path: Path) -> None:
    head = fitted(method, cache, tmp_path)
    scores = head.scores(features)
    assert scores.shape == (23, 7) and scores.dtype == torch.float32
    assert bool((scores >= 0).all()) and bool((scores <= 1).all())
    logits = torch.from_numpy(cache.classifier.logits(features.numpy()))
    assert torch.allclose(head.scores(features, logits), scores, atol=1e-5)


@every_method
def test_none_and_one_proposal(method: str, cache: Cache, features: Tensor, tmp_path: Path) -> None:
    head = fitted(method, cache, tmp_path)
    assert head.scores(features[:0]).shape == (0, 7)
    assert torch.allclose(head.scores(features[:1]), head.scores(features)[:1], atol=1e-6)


@every_method
def test_the_order_of_proposals_does_not_matter(method: str, cache: Cache, features: Tensor, tmp_path: Path) -> None:
    head = fitted(method, cache, tmp_path)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(head.scores(features[order]), head.scores(features)[order], atol=1e-6)


@every_method
def test_saved_and_loaded_it_gives_the_same_bits(method: str, cache: Cache, features: Tensor, tmp_path: Path) -> None:
    head = fitted(method, cache, tmp_path)
    again = load(tmp_path / f"{method}-0" / "1")
    assert torch.equal(again.head.scores(features), head.scores(features))
    assert again.info.method == method and again.info.category_ids == cache.categories.category_id.tolist()


@every_method
def test_one_seed_one_head(method: str, cache: Cache, features: Tensor, tmp_path: Path) -> None:
    first = fitted(method, cache, tmp_path / "a").scores(features)
    assert torch.equal(fitted(method, cache, tmp_path / "b").scores(features), first)
    if learned(method):
        assert not torch.equal(fitted(method, cache, tmp_path, seed=1).scores(features), first)


@every_method
def test_a_single_class(method: str, features: Tensor, tmp_path: Path) -> None:
    cache = Toy(counts=(30,)).write(tmp_path / "cache")
    scores = fitted(method, cache, tmp_path).scores(features)
    assert scores.shape == (23, 1) and bool(torch.isfinite(scores).all())


@every_method
def test_a_cosine_detector(method: str, features: Tensor, tmp_path: Path) -> None:
    cache = Toy(cosine=True).write(tmp_path / "cache")
    scores = fitted(method, cache, tmp_path).scores(features)
    assert scores.shape == (23, 7) and bool(torch.isfinite(scores).all())


@every_method
def test_features_and_logits_of_another_width_are_refused(
    method: str, cache: Cache, features: Tensor, tmp_path: Path
) -> None:
    head = fitted(method, cache, tmp_path)
    with pytest.raises(ShapeError, match=r"features have shape \[23, 7\]: expected \[N, 8\]"):
        head.scores(features[:, :-1])
    with pytest.raises(ShapeError, match="logits"):
        head.scores(features, torch.zeros(23, 7))


class _Interrupt(Exception):  # noqa: N818
    pass


class _Bar:
    """Raises at the n-th step of all loops together."""

    def __init__(self, n: int) -> None:
        self.left = n

    def advance(self, n: int = 1, **figures: float) -> None:
        self.left -= n
        if self.left <= 0:
            raise _Interrupt


@pytest.mark.parametrize("method", [m for m in METHODS if learned(m)])
@pytest.mark.parametrize("after", [1, 3, STEPS])
def test_interrupted_and_resumed_it_is_the_same_head(
    method: str, after: int, cache: Cache, features: Tensor, tmp_path: Path
) -> None:
    whole = fitted(method, cache, tmp_path / "whole", checkpoint_every=1)
    bar = _Bar(after)

    @contextmanager
    def progress(label: str, *, total: int, unit: str) -> Iterator[_Bar]:
        yield bar

    out = tmp_path / "cut" / "1"
    with pytest.raises(_Interrupt):
        train(method, cache, out, quick(method, checkpoint_every=1), progress=progress)
    assert not out.exists()
    resumed = train(method, cache, out, quick(method, checkpoint_every=1)).head
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(resumed.scores(features), whole.scores(features))


@every_method
def test_permuted_classes_permute_the_scores(method: str, features: Tensor, tmp_path: Path) -> None:
    """For methods that draw nothing: another order of categories is another order of columns. Learned methods draw
    initial weights and samples by position."""
    if learned(method):
        pytest.skip("draws by position")
    cache = Toy().write(tmp_path / "cache")
    order = np.asarray([3, 0, 6, 1, 5, 2, 4])
    permuted = _permuted(cache, order)
    first = load_target(METHODS[method].target)(**quick(method))
    from calib.heads.base import FitRun

    ours, theirs = (first.fit(c, FitRun()).eval() for c in (cache, permuted))
    assert torch.allclose(theirs.scores(features), ours.scores(features)[:, order], atol=1e-5)


def _permuted(cache: Cache, order: np.ndarray[Any, Any]) -> Cache:
    """The same cache with its categories in another order, in memory."""
    from calib.cache import Categories, Classifier

    other = Cache(cache.path)
    k, c = cache.categories, cache.classifier
    other.categories = Categories(
        k.category_id,  # must ascend
        tuple(k.name[i] for i in order),
        k.instance_count[order],
        k.image_count[order],
        tuple(k.frequency[i] for i in order),
    )
    rows = np.append(order, len(order))
    other.classifier = Classifier(c.weight[rows], None if c.bias is None else c.bias[rows], c.scale)
    inverse = np.append(np.argsort(order), [len(order), -1]).astype(np.int32)  # background, ignore (index -1)
    other.labels = inverse[cache.labels]
    return other
