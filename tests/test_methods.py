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
from calib.errors import ShapeError, UnsupportedError
from calib.heads.base import Head
from calib.registry import METHODS
from calib.registry import load as load_target
from calib.settings import known_keys, with_overrides
from calib.training import train
from calib.training.context import FitContext
from calib.training.stages import fit_alone

from .toy import Toy, permuted

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
    return METHODS[method].trains not in ("", "weight, bias (when=loss)")


NAMED_IN_MODULES = ("Paper:", "Eq.", "Differs:")
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_its_module_names_paper_equations_and_differences(method: str) -> None:
    text = inspect.getdoc(import_module(METHODS[method].target.split(":")[0])) or ""
    text = text.replace("Papers:", "Paper:")
    assert all(word in text for word in NAMED_IN_MODULES)


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
@pytest.mark.parametrize("size", [1, 4, 22])
def test_in_pieces_it_scores_as_in_one_go(
    method: str, size: int, cache: Cache, features: Tensor, tmp_path: Path
) -> None:
    head = fitted(method, cache, tmp_path)
    logits = torch.randn(23, 8, generator=torch.Generator().manual_seed(4))
    for given in (None, logits):
        rows = zip(features.split(size), given.split(size) if given is not None else [None] * 23, strict=False)
        pieces = torch.cat([head.scores(x, z) for x, z in rows])
        torch.testing.assert_close(pieces, head.scores(features, given), atol=1e-6, rtol=1e-5)


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
def test_a_class_without_samples_is_scored_too(method: str, cache: Cache, features: Tensor, tmp_path: Path) -> None:
    assert cache.categories.instance_count[-1] == 0 and not (cache.labels == cache.background - 1).any()
    scores = fitted(method, cache, tmp_path).scores(features)[:, -1]
    assert bool(torch.isfinite(scores).all()) and bool((scores >= 0).all())


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
        head.scores(features, torch.zeros(22, 8))
    try:  # heads that have no use for given logits do not look at them
        assert torch.equal(head.scores(features, torch.zeros(23, 7)), head.scores(features))
    except ShapeError as e:
        assert "logits have shape [23, 7]: expected [23, 8]" in str(e)


@every_method
@pytest.mark.parametrize(("activation", "columns"), [("sigmoid", 7), ("seesaw", 9)])
def test_a_detector_without_a_background_column_works_or_is_refused(
    method: str, activation: str, columns: int, features: Tensor, tmp_path: Path
) -> None:
    cache = Toy(activation=activation).write(tmp_path / "cache")
    if activation not in METHODS[method].activations:
        with pytest.raises(UnsupportedError, match=r"defined for softmax .*detectors"):
            fitted(method, cache, tmp_path)
        assert not (tmp_path / f"{method}-0").exists()
        return
    head = fitted(method, cache, tmp_path)
    logits = torch.from_numpy(cache.classifier.logits(features.numpy()))
    assert logits.shape == (23, columns)
    scores = head.scores(features, logits)
    assert torch.allclose(scores, head.scores(features), atol=1e-5)
    assert scores.shape == (23, 7) and bool((scores >= 0).all()) and bool((scores <= 1).all())
    again = load(tmp_path / f"{method}-0" / "1").head
    assert torch.equal(again.scores(features, logits), scores)
    assert torch.allclose(head.scores(features), scores, atol=1e-5)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("tau-norm", {"form": "original"}),
    ("tau-norm", {"select": "foreground"}),
    ("tau-norm", {"select": "tail"}),
    ("simcal", {"form": "mlp"}),
    ("simcal", {"form": "2fc_rand"}),
    ("simcal", {"form": "3fc_rand"}),
    ("simcal", {"form": "3fc_ft"}),
    ("simcal", {"inference": "average"}),
    ("bags", {"edges": (50,)}),
    ("bags", {"edges": (5, 10, 50, 100, 500, 1000, 5000)}),
    ("bags", {"others": "all"}),
    ("bags", {"others": "none"}),
    ("bags", {"background_group": False}),
    ("disalign", {"base": "cosine"}),
    ("disalign", {"parametrisation": "eq6"}),
    ("disalign", {"magnitude": False}),
    ("disalign", {"margin": False}),
    ("disalign", {"confidence": False}),
    ("lws", {"background_share": 0.2}),
    ("ncm", {"transform": "cl2n", "distance": "l2", "rows": "foreground"}),
    ("ncm", {"transform": "l2n", "distance": "cos"}),
    ("cosine", {"form": "normed"}),
    ("cosine", {"form": "squashed"}),
    ("cosine", {"learn_scale": True, "scale": 5.0}),
    ("seesaw", {"tau": 0.0, "p": 0.0, "q": 0.0, "counts": "dataset"}),
    ("seesaw", {"sampling": "natural"}),
    ("pcb", {"base": "seesaw", "begin": 0.0}),
    ("pcb", {"base": "eql-v2", "begin": 0.0}),
    ("pcb", {"iterations": 1, "begin": 0.0}),
    ("pcb", {"iterations": 3, "form": "map", "begin": 0.0}),
    ("pcb", {"iterations": 7, "mlp_layers": 3, "layer_norm": "logits", "begin": 0.0}),
    ("pcb", {"iterations": 4, "mlp_layers": 1, "layer_norm": "both", "form": "map", "begin": 0.0}),
    ("ms-calibration", {"by": "diagonal", "renormalise": False}),
    ("norcal", {"by": "effective", "gamma": 0.9}),
    ("norcal", {"applies_to": "probs", "renormalise": False}),
    ("norcal", {"applies_to": "logits"}),
    ("logit-adjustment", {"when": "loss"}),
    ("logit-adjustment", {"anchor": "prior"}),
    ("logit-adjustment", {"anchor": "uniform", "when": "loss"}),
    ("logn", {"momentum": 0.1, "batch_rows": 16}),
    ("fracal", {"shift": "logit", "counts": "instances"}),
    ("iif", {"when": "loss", "form": "smooth"}),
    ("iif", {"form": "gombit", "counts": "instances", "strength": 0.5}),
    ("iif", {"when": "loss", "start": "normed"}),
    ("balanced-softmax", {"form": "sigmoid"}),
    ("balanced-softmax", {"background": "count", "start": "linear"}),
    ("reweight", {"by": "effective"}),
    ("reweight", {"by": "reference", "high": 10.0}),
    ("reweight", {"by": "power", "rho": 0.5, "w_bg": 0.25}),
    ("focal", {"form": "sigmoid"}),
    ("class-margin", {"start": "cosine", "scale": 30.0}),
    ("eql", {"tail_share": 0.5}),
    ("loce", {"draw_classes": 0}),
    ("loce", {"start": "normed", "memory": 3, "momentum": 0.0}),
    ("bacl", {"begin": 0.0}),
    ("bacl", {"begin": 0.0, "draw_classes": 0, "threshold": 0.0}),
    ("gol", {"tail_share": 0.5}),
    ("gol", {"tail_share": 0.5, "masking": "eql"}),
    ("gol", {"masking": "none"}),
    ("ecm", {"background_ratio": None, "tau": 0.0}),
    ("ecm", {"power": 0.5, "weighted": False}),
    ("efl", {"scale": 0.0, "gamma": 0.5}),
    ("text", {"form": "softmax", "temperature": 10.0}),
    ("text", {"bias": -4.6}),
    ("tde", {"heads": 4, "official_quirks": True}),
]


@pytest.mark.parametrize(("method", "more"), VARIANTS, ids=lambda v: str(v))
def test_every_variant_trains_scores_saves_and_resumes(method: str, more: dict[str, Any], tmp_path: Path) -> None:
    cache = Toy(maps=True).write(tmp_path / "cache")
    head = fitted(method, cache, tmp_path, **more)
    source = cache.maps if head.inputs == "maps" else cache.features
    assert source is not None
    x = torch.from_numpy(source.read(0, 20))
    scores = head.scores(x)
    assert scores.shape == (20, 7) and bool((scores >= 0).all()) and bool((scores <= 1).all())
    again = load(tmp_path / f"{method}-0" / "1").head
    assert torch.equal(again.scores(x), scores) and again.inputs == head.inputs
    assert head.scores(x[:0]).shape == (0, 7)
    if "loop" in " ".join(known_keys(load_target(METHODS[method].target)())) and _trains(method, more):
        out = tmp_path / "cut" / "1"
        with pytest.raises(KeyboardInterrupt):
            train(method, cache, out, quick(method, **more, checkpoint_every=1), progress=_Bar(3).progress)
        resumed = train(method, cache, out, quick(method, **more, checkpoint_every=1)).head
        assert torch.equal(resumed.scores(x), scores)


def _trains(method: str, more: dict[str, Any]) -> bool:
    return learned(method) or more.get("when") == "loss"


def test_heads_on_maps_need_maps(cache: Cache, tmp_path: Path) -> None:
    for method, more in (("simcal", {"form": "3fc_ft"}), ("simcal", {"form": "2fc_rand"}), ("pcb", {"form": "map"})):
        with pytest.raises(UnsupportedError, match="no RoI maps"):
            fitted(method, cache, tmp_path, **more)


class _Bar:
    """Notes every advance; raises at the n-th step of all loops together."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.advances: list[int] = []

    @contextmanager
    def progress(self, label: str, *, total: int, unit: str) -> Iterator["_Bar"]:
        yield self

    def advance(self, n: int = 1, **metrics: float) -> None:
        self.advances.append(n)
        self.left -= n
        if self.left <= 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", [m for m in METHODS if learned(m)])
@pytest.mark.parametrize("after", [1, 3, STEPS])
def test_interrupted_and_resumed_it_is_the_same_head(
    method: str, after: int, cache: Cache, features: Tensor, tmp_path: Path
) -> None:
    settings = quick(method, checkpoint_every=1)
    whole = train(method, cache, tmp_path / "whole" / "1", settings)
    out, later = tmp_path / "cut" / "1", _Bar(10**6)
    with pytest.raises(KeyboardInterrupt):
        train(method, cache, out, settings, progress=_Bar(after).progress)
    assert not out.exists()
    resumed = train(method, cache, out, settings, progress=later.progress)
    assert later.advances[0] == after - 1  # the step that raised was not saved; all before it were not done again
    assert sum(later.advances) == STEPS
    assert resumed.info == whole.info and len(whole.info.losses) == 2
    for (name, a), b in zip(whole.head.state_dict().items(), resumed.head.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(resumed.head.scores(features), whole.head.scores(features))


@pytest.mark.parametrize("method", [m for m in METHODS if not learned(m)])
def test_permuted_classes_permute_the_scores(method: str, features: Tensor, tmp_path: Path) -> None:
    """For methods that draw nothing: another order of categories is another order of columns. Learned methods draw
    initial weights and samples by position."""
    cache = Toy().write(tmp_path / "cache")
    order = np.asarray([3, 0, 6, 1, 5, 2, 4])
    first = with_overrides(load_target(METHODS[method].target)(), quick(method))
    ours, theirs = (fit_alone(first, c, FitContext()).eval() for c in (cache, permuted(cache, order)))
    assert torch.allclose(theirs.scores(features), ours.scores(features)[:, order], atol=1e-5)
