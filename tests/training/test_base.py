"""Heads built on fitted heads: every method on every kind of base, or the reason why not."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calib import notebook
from calib.artifact import Artifact, load
from calib.cache import Cache
from calib.decide.compose import combine
from calib.decide.confidence import Confidence, calibrate
from calib.errors import InputError, SettingError, UnknownNameError, UnsupportedError
from calib.heads.base import Head, LogitHead
from calib.registry import BASE_USES, METHODS
from calib.registry import load as load_target
from calib.settings import with_overrides
from calib.training import train
from calib.training.context import FitContext
from calib.training.stages import fit_alone

from ..test_methods import quick
from ..toy import Toy

TRANSFORMS = [m for m, info in METHODS.items() if info.base == "transforms"]
USES = [m for m, info in METHODS.items() if info.base != "ignores"]
BASE = {"steps": 30, "warmup_steps": 0, "lr": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    return Toy(maps=True).write(folder / "cache")


@pytest.fixture(scope="module")
def natural(cache: Cache, folder: Path) -> Artifact:
    return train("natural", cache, folder / "natural" / "1", BASE)


@pytest.fixture(scope="module")
def deep(cache: Cache, folder: Path) -> Artifact:
    """With logits, and no linear layer."""
    settings = {"loop.steps": 20, "loop.lr": 1.0, "loop.warmup_steps": 0}
    return train("disalign", cache, folder / "deep" / "1", settings)


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(23, Toy().feature_size, generator=torch.Generator().manual_seed(3))


def fitted(method: str, cache: Cache, base: Head | None, **more: Any) -> Head:
    settings = with_overrides(load_target(METHODS[method].target)(), quick(method) | more)
    return fit_alone(settings, cache, FitContext(base=base)).eval()


def of_detector(cache: Cache, base: Head) -> Cache:
    """``cache`` as a detector would have written it whose classifier is the layer of ``base``."""
    other = Cache(cache.path)
    weight, bias, _ = base.folded()
    other.classifier = replace(cache.classifier, weight=weight.numpy(), bias=bias.numpy())
    return other


def test_the_registry_says_what_every_method_does_with_a_base() -> None:
    assert {info.base for info in METHODS.values()} == set(BASE_USES)


@pytest.mark.parametrize("method", USES)
def test_on_a_linear_base_it_is_as_on_a_detector_with_that_layer(
    method: str, cache: Cache, natural: Artifact, features: Tensor
) -> None:
    ours = fitted(method, cache, natural.head)
    theirs = fitted(method, of_detector(cache, natural.head), None)
    assert torch.equal(ours.scores(features), theirs.scores(features))
    assert not torch.equal(ours.scores(features), fitted(method, cache, None).scores(features))
    logits = torch.randn(23, 8)  # of the detector: they say nothing of the base
    assert torch.equal(ours.scores(features, logits), ours.scores(features))


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("tau-norm", {"select": "tail"}),
    ("tau-norm", {"form": "original"}),
    ("logit-adjustment", {"when": "loss"}),
    ("norcal", {"applies_to": "probs", "renormalise": False}),
    ("norcal", {"applies_to": "logits"}),
    ("logn", {"momentum": 0.1, "batch_rows": 16}),
    ("ms-calibration", {"by": "diagonal", "renormalise": False}),
    ("simcal", {"form": "mlp"}),
    ("simcal", {"inference": "average"}),
    ("simcal", {"form": "2fc_rand"}),
    ("pcb", {"form": "map", "begin": 0.0}),
    ("disalign", {"confidence": False}),
]


@pytest.mark.parametrize(("method", "more"), VARIANTS, ids=str)
def test_so_is_every_variant(method: str, more: dict[str, Any], cache: Cache, natural: Artifact) -> None:
    ours = fitted(method, cache, natural.head, **more)
    theirs = fitted(method, of_detector(cache, natural.head), None, **more)
    rows = cache.maps if ours.inputs == "maps" else cache.features
    assert rows is not None
    x = torch.from_numpy(rows.read(0, 20))
    torch.testing.assert_close(ours.scores(x), theirs.scores(x), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("method", [m for m in TRANSFORMS if m not in ("tau-norm", "lws")])
def test_on_a_base_that_is_no_linear_layer_it_takes_its_scores(
    method: str, cache: Cache, deep: Artifact, features: Tensor, tmp_path: Path
) -> None:
    """The same on logits that are the logarithms of the base's scores: of a plain detector with these features."""
    artifact = train(method, cache, tmp_path / "1", quick(method), base=deep)
    head = artifact.head
    again = load(tmp_path / "1")
    assert torch.equal(again.head.scores(features), head.scores(features)) and again.info == artifact.info
    if method == "logit-adjustment":
        shift = head.state_dict()["shift"]
        expected = (deep.head.full_scores(features).log() + shift).softmax(dim=1)
        torch.testing.assert_close(head.full_scores(features), expected)
    if method == "ncm":
        torch.testing.assert_close(head.full_scores(features)[:, -1], deep.head.full_scores(features)[:, -1])
    if method == "logn":
        assert isinstance(deep.head, LogitHead)
        z = deep.head(torch.from_numpy(cache.features.read(0, cache.n_rows)))[:, :-1]
        torch.testing.assert_close(head.state_dict()["scale"][:-1], z.var(dim=0) ** -0.5, atol=1e-4, rtol=1e-4)
    if method == "ms-calibration":
        assert not torch.equal(head.state_dict()["factor"], fitted(method, cache, None).state_dict()["factor"])


@pytest.mark.parametrize("below", ["norcal", "fracal", "ms-calibration", "seesaw", "pcb", "logit-adjustment"])
def test_the_scores_of_a_base_are_the_softmax_of_what_is_built_on(
    below: str, cache: Cache, deep: Artifact, features: Tensor
) -> None:
    base = fitted(below, cache, deep.head if METHODS[below].base == "transforms" else None)
    assert isinstance(base, LogitHead)
    torch.testing.assert_close(base(features).softmax(dim=1), base.full_scores(features), atol=1e-6, rtol=1e-5)
    same = fitted("logit-adjustment", cache, base, tau=0.0)
    torch.testing.assert_close(same.scores(features), base.scores(features), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in USES])
def test_methods_that_ignore_a_base_refuse_it(method: str, cache: Cache, natural: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"{method} takes no base"):
        train(method, cache, tmp_path / "1", quick(method), base=natural)
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("disalign", {"base": "cosine"}),
        ("balanced-softmax", {"form": "sigmoid"}),
        ("balanced-softmax", {"start": "linear"}),
        ("class-margin", {"start": "cosine"}),
        ("pcb", {"base": "seesaw"}),
        ("simcal", {"form": "3fc_ft"}),
    ],
    ids=str,
)
def test_so_do_settings_that_draw_a_fresh_layer(
    method: str, more: dict[str, Any], cache: Cache, natural: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="a base has no part in this training"):
        train(method, cache, tmp_path / "1", quick(method) | more, base=natural)


@pytest.mark.parametrize("method", ["tau-norm", "lws", "natural", "reweight"])
def test_weights_are_not_taken_of_a_base_without_a_layer(
    method: str, cache: Cache, deep: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="weights of the base are needed, and it is no linear layer"):
        train(method, cache, tmp_path / "1", quick(method), base=deep)


@pytest.mark.parametrize(
    ("below", "more"),
    [
        ("bags", {}),
        ("ncm", {}),
        ("tde", {}),
        ("simcal", {}),
        ("eql-v2", {}),
        ("norcal", {"applies_to": "probs", "renormalise": False}),
        ("simcal", {"form": "2fc_rand"}),
        ("pcb", {"base": "eql-v2"}),
    ],
    ids=str,
)
def test_a_base_needs_logits(below: str, more: dict[str, Any], cache: Cache, tmp_path: Path) -> None:
    base = train(below, cache, tmp_path / "base" / "1", quick(below) | more)
    with pytest.raises(UnsupportedError, match=r"is no base|the base takes maps"):
        train("norcal", cache, tmp_path / "1", base=base)


def test_composed_heads_are_no_bases(cache: Cache, natural: Artifact, folder: Path, tmp_path: Path) -> None:
    one = combine("average", folder / "natural" / "1", folder / "natural" / "1", tmp_path / "mean")
    with pytest.raises(UnsupportedError, match="a head of kind 'average' is no base"):
        train("norcal", cache, tmp_path / "1", base=one)


def test_a_base_of_another_detector_is_refused(natural: Artifact, tmp_path: Path) -> None:
    for toy in (Toy(seed=4), Toy(feature_size=6), Toy(counts=(40, 3)), Toy(stages=3)):
        other = toy.write(tmp_path / f"{toy.seed}{toy.feature_size}{len(toy.counts)}{toy.stages}")
        with pytest.raises(InputError, match="was fitted for detector"):
            train("norcal", other, tmp_path / "1", base=natural)
    for toy, size in ((Toy(feature_size=6), 6), (Toy(feature_size=6, stages=2), 12)):
        with pytest.raises(UnsupportedError, match=f"features of {size}"):
            fitted("norcal", toy.write(tmp_path / f"width{size}"), natural.head)


def test_a_chain_is_one_linear_layer_and_the_artifact_has_every_link(
    cache: Cache, natural: Artifact, features: Tensor, tmp_path: Path
) -> None:
    first = train("natural", cache, tmp_path / "a" / "1", BASE)
    second = train("tau-norm", cache, tmp_path / "b" / "1", {"tau": 0.3}, base=tmp_path / "a" / "1")
    third = train("logit-adjustment", cache, tmp_path / "c" / "1", {"tau": 0.5}, base=tmp_path / "b" / "1")
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    again = load(tmp_path / "c" / "1")
    assert torch.equal(again.head.scores(features), third.head.scores(features))
    weight, bias, activation = again.head.folded()
    expected = torch.nn.functional.linear(features, weight, bias).softmax(dim=1)[:, :-1]
    torch.testing.assert_close(expected, again.head.scores(features))
    assert activation == "softmax" and len(again.head.state_dict()) == 5  # one layer and three vectors
    assert [link["method"] for link in again.info.base] == ["tau-norm", "natural"]
    assert [link["digest"] for link in again.info.base] == [second.digest(), first.digest()]
    assert again.info.base[0]["settings"]["tau"] == 0.3 and first.info.base == [] and first.digest() == natural.digest()
    assert again.digest() == third.digest() not in (first.digest(), second.digest())


def test_maps_of_confidence_are_a_link_of_the_chain(folder: Path, natural: Artifact, tmp_path: Path) -> None:
    tune = Toy(mode="test", maps=True).write(tmp_path / "tune")
    calibrate(folder / "natural" / "1", tune, tmp_path / "mapped" / "1", Confidence())
    (link,) = load(tmp_path / "mapped" / "1").info.base
    assert link["method"] == "natural" and link["digest"] == natural.digest()


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("method", USES)
def test_every_stage_of_a_cascade_is_built_on_its_own(method: str, average: str, tmp_path: Path) -> None:
    cache = Toy(stages=2, average=average).write(tmp_path / "cache")
    base = train("natural", cache, tmp_path / "base" / "1", BASE)
    if method == "ncm" and average == "logits":
        return  # it has no logits to be averaged
    artifact = train(method, cache, tmp_path / "1", quick(method), base=base)
    assert len(artifact.info.base) == 1
    if average == "probabilities" and artifact.head.kind == "cascade":
        alone = [fitted(method, stage, own) for stage, own in zip(cache.stages, base.head.stages, strict=True)]
        x = torch.randn(9, 16)
        parts = zip(alone, x.chunk(2, dim=1), strict=True)
        expected = torch.stack([h.full_scores(own) for h, own in parts]).mean(dim=0)
        torch.testing.assert_close(artifact.head.full_scores(x), expected, atol=1e-6, rtol=1e-5)


def test_sigmoid_and_seesaw_detectors(features: Tensor, tmp_path: Path) -> None:
    cache = Toy(activation="sigmoid").write(tmp_path / "sigmoid")
    base = train("tau-norm", cache, tmp_path / "tau" / "1", {"tau": 0.5})
    spread = train("fracal", cache, tmp_path / "fracal" / "1", base=base).head
    theirs = fitted("fracal", of_detector(cache, base.head), None)
    assert torch.equal(spread.scores(features), theirs.scores(features))
    with pytest.raises(UnsupportedError, match="gives sigmoid scores"):
        train("norcal", cache, tmp_path / "x", base=base)
    for activation in ("sigmoid", "seesaw"):  # a softmax on either
        cache = Toy(activation=activation).write(tmp_path / activation / "again")
        base = train("crt", cache, tmp_path / activation / "crt", quick("crt"))
        shifted = train("logit-adjustment", cache, tmp_path / activation / "shifted", base=base).head
        assert torch.equal(shifted.scores(features), fitted("logit-adjustment", cache, base.head).scores(features))
        assert shifted.folded().activation == "softmax"


class _Interrupt:
    def __init__(self, steps: int) -> None:
        self.left = steps

    @contextmanager
    def progress(self, label: str, *, total: int, unit: str) -> Iterator["_Interrupt"]:
        yield self

    def advance(self, n: int = 1, **metrics: float) -> None:
        self.left -= n
        if self.left <= 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [5, 33, 38])
def test_interrupted_it_goes_on_with_the_base_too(
    after: int, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: Tensor
) -> None:
    """The base has 30 steps, the head 10."""
    text = "natural:steps=30:warmup_steps=0:checkpoint_every=2"
    more: dict[str, Any] = {"steps": 10, "warmup_steps": 0, "checkpoint_every": 2, "lr": 0.1}
    monkeypatch.setattr(notebook, "bar", _Interrupt(10**6).progress)
    whole = notebook.fit_head("reweight", cache, tmp_path / "whole" / "1", base=text, **more)
    monkeypatch.setattr(notebook, "bar", _Interrupt(after).progress)
    with pytest.raises(KeyboardInterrupt):
        notebook.fit_head("reweight", cache, tmp_path / "cut" / "1", base=text, **more)
    left = _Interrupt(10**6)
    monkeypatch.setattr(notebook, "bar", left.progress)
    again = notebook.fit_head("reweight", cache, tmp_path / "cut" / "1", base=text, **more)
    assert torch.equal(again.head.scores(features), whole.head.scores(features)) and again.info == whole.info
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["1"]
    assert again.info.base[0]["settings"]["loop"]["steps"] == 30


def test_a_head_on_another_base_is_another_head(
    cache: Cache, natural: Artifact, deep: Artifact, tmp_path: Path
) -> None:
    kept = train(["norcal", "logn"], cache, tmp_path / "m", base=natural)
    assert kept["logn"].info.base == natural.chain()
    before = (tmp_path / "m" / "norcal" / "1" / "head.json").stat().st_mtime_ns
    train(["norcal"], cache, tmp_path / "m", base=natural)
    assert (tmp_path / "m" / "norcal" / "1" / "head.json").stat().st_mtime_ns == before
    again = train(["norcal"], cache, tmp_path / "m", base=deep, overwrite=True)
    assert again["norcal"].info.base[0]["method"] == "disalign"


def test_the_command(
    calib: Callable[..., Any], fails: Callable[..., str], cache: Cache, natural: Artifact, folder: Path, tmp_path: Path
) -> None:
    out, own = tmp_path / "models" / "1", ("--cache", cache.path)
    calib("train", "norcal", "--base", folder / "natural" / "1", *own, "--out", out)
    assert load(out).info.base == natural.chain()
    quick_base = "natural:steps=30:warmup_steps=0:lr=0.2"
    outcome = calib("train", "norcal", "logn", "--one-pass", "--base", quick_base, *own, "--out", tmp_path / "pass")
    assert outcome.exit_code == 0, outcome.output
    assert load(tmp_path / "pass" / "logn" / "1").info.base == natural.chain()
    tune = Toy(mode="test", maps=True).write(tmp_path / "tune")
    choice = ("--tune", tune.path, "--choose", "tau=0.5,1")
    chosen = calib("train", "logit-adjustment", "--base", quick_base, *own, "--out", tmp_path / "la", *choice)
    assert chosen.exit_code == 0, chosen.output
    assert load(tmp_path / "la").info.base == natural.chain()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["la", "models", "pass", "tune"]
    train_norcal = ("train", "norcal", *own, "--out", tmp_path / "x", "--base")
    assert "Did you mean 'natural'" in fails(*train_norcal, "naturel:steps=3")
    assert "unknown setting" in fails(*train_norcal, "natural:stps=3")
    assert "is no setting" in fails(*train_norcal, "natural:steps")
    assert "head not found" in fails(*train_norcal, tmp_path / "nowhere")
    assert "crt takes no base" in fails("train", "crt", *own, "--out", tmp_path / "x", "--base", "natural")
    assert "unknown setting" in fails(*train_norcal, "natural", "--set", "nothing=1")
    assert not (tmp_path / "x").exists() and not (tmp_path / ".x.base").exists()


@pytest.mark.slow
def test_several_processes(cache: Cache, natural: Artifact, folder: Path, calib: Callable[..., Any], features: Tensor,
                           tmp_path: Path) -> None:  # fmt: skip
    own = ("--cache", cache.path, "--set", "steps=20", "--set", "warmup_steps=0", "--device", "cpu")
    bases = (folder / "natural" / "1", "natural:steps=30:lr=0.2:warmup_steps=0")
    found = []
    for nproc, base in ((1, bases[0]), (2, bases[0]), (2, bases[1])):
        out = tmp_path / str(len(found))
        outcome = calib(
            "train", "residual", "--set", "hidden=8", *own, "--out", out, "--base", base, "--processes", nproc
        )
        assert outcome.exit_code == 0, outcome.output
        found.append(load(out).head.scores(features))
        torch.testing.assert_close(found[-1], found[0], atol=1e-4, rtol=1e-3)
    dealt = ("train", "norcal", "reweight", "--one-pass", "--processes", 2, "--out", tmp_path / "m", "--base", bases[0])
    outcome = calib(*dealt, *own)
    assert outcome.exit_code == 0, outcome.output
    assert load(tmp_path / "m" / "reweight" / "1").info.base == natural.chain()


def test_names_of_methods_and_folders(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError):
        notebook.fit_head("norcal", cache, tmp_path / "1", base="none:such=1")
    with pytest.raises(SettingError):
        notebook.fit_head("norcal", cache, tmp_path / "1", base="natural:lr")
    monkeypatch.chdir(tmp_path)
    train("natural", cache, tmp_path / "a:b=c", BASE)
    assert notebook.fit_head("norcal", cache, tmp_path / "1", base="a:b=c").info.base[0]["method"] == "natural"


def test_a_file_may_not_hold_a_head_without_logits_below(cache: Cache, deep: Artifact, tmp_path: Path) -> None:
    from calib.heads.affine import AffineHead

    head = train("norcal", cache, tmp_path / "1", base=deep).head
    config = head.config() | {"classifier": train("ncm", cache, tmp_path / "2").head.description()}
    with pytest.raises(ValueError, match="has no logits"):
        AffineHead.build(config)
