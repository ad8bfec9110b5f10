"""Heads that are one linear layer inside the detector's own checkpoint, and every reason to refuse."""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from calib.artifact import Artifact, load
from calib.cache import Cache, Classifier
from calib.checkpoint import Checkpoint
from calib.errors import (
    CalibError,
    ExportError,
    FormatError,
    InputError,
    SettingError,
    UnknownNameError,
    UnsupportedError,
)
from calib.export.export import Export, export
from calib.export.fold import Fold

from ..toy import Toy
from .conftest import ALL_KINDS, Fit, Fitted

# Every method whose head is linear, in all its forms that are.
LINEAR: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "natural": ("natural", {}),
    "tau-norm": ("tau-norm", {"tau": 0.5}),
    "tau-norm original": ("tau-norm", {"form": "original"}),
    "crt": ("crt", {}),
    "lws": ("lws", {}),
    "logit-adjustment": ("logit-adjustment", {}),
    "logit-adjustment loss": ("logit-adjustment", {"when": "loss"}),
    "norcal": ("norcal", {}),
    "norcal logits": ("norcal", {"applies_to": "logits"}),
    "norcal probs": ("norcal", {"applies_to": "probs"}),
    "fracal": ("fracal", {}),
    "logn": ("logn", {}),
    "balanced-softmax": ("balanced-softmax", {}),
    "reweight": ("reweight", {}),
    "focal": ("focal", {}),
    "class-margin": ("class-margin", {}),
    "disalign": ("disalign", {"confidence": False}),
    "disalign eq6": ("disalign", {"confidence": False, "parametrisation": "eq6"}),
    "pcb": ("pcb", {"iterations": 1}),
}
# Why the others are not.
REASONS = {
    "group": "softmax of its own",
    "aligned": "blended by a confidence",
    "dual": "--part tail",
    "mlp": "--part tail",
    "box-head": "--part tail",
    "average": "mean of two heads",
    "select": "rows come from two heads",
    "ncm": "distance to class means",
    "sigmoid": "the detector has a softmax",
    "objectness": "objectness",
    "iterative": "2 passes",
    "iterative-map": "RoI maps",
    "tde": "divided by their norm",
    "discriminant": "the classes have another one",
    "residual": "hidden layer",
    "gumbel": "no sigmoids or softmax",
    "text": "divides projected features by their norm",
    "decided": "thresholds",
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Toy().write(tmp_path_factory.mktemp("toy") / "cache")


def layer(cache: Cache, *, first: bool = False) -> dict[str, torch.Tensor]:
    """The detector's rows as a framework has them."""
    c = cache.classifier
    parts = {"weight": torch.from_numpy(c.weight), "bias": torch.from_numpy(c.bias)}  # type: ignore[arg-type]
    return {k: v.roll(1, dims=0) if first else v.clone() for k, v in parts.items()}


def write_checkpoint(framework: str, cache: Cache, folder: Path) -> Path:
    """As the framework writes it, with a bit of everything else that stands in one."""
    first = framework == "torchvision"
    prefix = "roi_head.bbox_head.fc_cls" if framework == "mmdet" else "roi_heads.box_predictor.cls_score"
    state = OrderedDict({"backbone.conv.weight": torch.randn(3, 3), "backbone.bn.num_batches_tracked": torch.tensor(7)})
    state |= {f"{prefix}.{k}": v for k, v in layer(cache, first=first).items()}
    state["roi_heads.box_predictor.bbox_pred.weight"] = torch.randn(4, 8)
    path = folder / f"detector.{'pkl' if framework == 'detectron2 pkl' else 'pth'}"
    if framework == "torchvision":
        torch.save(state, path)
    elif framework == "detectron2":
        torch.save({"model": state, "optimizer": {"lr": 0.1, "state": {0: torch.ones(2)}}, "iteration": 9}, path)
    elif framework == "detectron2 pkl":
        arrays = {k: v.numpy() for k, v in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone", "matching_heuristics": True}))
    else:
        torch.save({"meta": {"epoch": 12, "CLASSES": ("a", "b")}, "state_dict": state}, path)
    return path


def read_checkpoint(path: Path) -> Any:
    return pickle.loads(path.read_bytes()) if path.suffix == ".pkl" else torch.load(path, weights_only=True)


def as_framework(framework: str, path: Path, features: torch.Tensor) -> torch.Tensor:
    """Foreground scores as the framework computes them from the checkpoint."""
    document = read_checkpoint(path)
    state = document.get("model", document.get("state_dict", document))
    name = "roi_head.bbox_head.fc_cls" if framework == "mmdet" else "roi_heads.box_predictor.cls_score"
    z = functional.linear(features, *(torch.as_tensor(state[f"{name}.{k}"]) for k in ("weight", "bias")))
    p = z.softmax(dim=1)
    return p[:, 1:] if framework == "torchvision" else p[:, :-1]


def same(a: Any, b: Any, except_for: str) -> bool:
    """Equal documents, but for tensors whose name contains ``except_for``."""
    if isinstance(a, dict):
        return (
            type(a) is type(b)
            and list(a) == list(b)
            and all(except_for in str(k) or same(a[k], b[k], except_for) for k in a)
        )
    if isinstance(a, torch.Tensor | np.ndarray):
        return a.dtype == b.dtype and bool((a == b).all())
    return bool(a == b)


@pytest.mark.parametrize("framework", ["torchvision", "detectron2", "detectron2 pkl", "mmdet"])
@pytest.mark.parametrize("name", LINEAR)
def test_a_folded_checkpoint_scores_like_the_head(
    fit: Fit, toy: Cache, tmp_path: Path, name: str, framework: str
) -> None:
    method, settings = LINEAR[name]
    fitted = fit(method, toy, toy, **settings)
    checkpoint = write_checkpoint(framework, toy, tmp_path)
    before = checkpoint.read_bytes()
    out = tmp_path / f"folded{checkpoint.suffix}"
    metrics = export(fitted.folder, toy.path, out, Export(framework.split()[0], checkpoint))
    assert metrics["largest_difference"] <= 1e-5
    assert metrics["background"] == ("first" if framework == "torchvision" else "last")
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(as_framework(framework, out, x), fitted.artifact.head.scores(x), atol=1e-6, rtol=1e-4)
    assert checkpoint.read_bytes() == before
    assert same(read_checkpoint(checkpoint), read_checkpoint(out), except_for=metrics["layer"])


@pytest.mark.parametrize("kind", REASONS)
def test_other_heads_are_refused_with_the_reason(
    of_kind: Callable[[str], Fitted], tmp_path: Path, detector_file: Path, kind: str
) -> None:
    fitted = of_kind(kind)
    with pytest.raises(UnsupportedError, match=REASONS[kind]) as error:
        export(fitted.folder, fitted.cache, tmp_path / "a.safetensors", Export("torchvision", detector_file))
    assert "--to module" in error.value.hint
    assert list(tmp_path.iterdir()) == []


def test_every_kind_is_foldable_or_refused() -> None:
    assert set(ALL_KINDS) - set(REASONS) == {"linear", "affine", "sigmoid-product"}


def test_scores_multiplied_after_the_softmax_are_refused(fit: Fit, toy: Cache, tmp_path: Path) -> None:
    checkpoint = write_checkpoint("detectron2", toy, tmp_path)
    for method, settings in (("ms-calibration", {}), ("norcal", {"applies_to": "probs", "renormalise": False})):
        fitted = fit(method, toy, toy, **settings)
        with pytest.raises(UnsupportedError, match="after the softmax"):
            export(fitted.folder, toy.path, tmp_path / "a.pth", Export("detectron2", checkpoint))


def test_the_last_layer_of_simcal_is_a_part(fit: Fit, toy: Cache, tmp_path: Path) -> None:
    fitted = fit("simcal", toy, toy)
    checkpoint = write_checkpoint("mmdet", toy, tmp_path)
    metrics = export(fitted.folder, toy.path, tmp_path / "a.pth", Export("mmdet", checkpoint, part="tail"))
    assert metrics["kind"] == "linear"
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    wanted = fitted.artifact.head.tail.scores(x)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(as_framework("mmdet", tmp_path / "a.pth", x), wanted, atol=1e-6, rtol=1e-4)
    with pytest.raises(UnknownNameError, match=r"unknown part 'tial'\. Did you mean 'tail'"):
        export(fitted.folder, toy.path, tmp_path / "b.pth", Export("mmdet", checkpoint, part="tial"))


def test_a_sigmoid_detector_takes_sigmoid_heads(fit: Fit, sigmoid_cache: Cache, tmp_path: Path) -> None:
    """Detectron2 keeps a row for background that its sigmoids never read: it stays."""
    fitted = fit("tau-norm", sigmoid_cache, sigmoid_cache, tau=0.5)
    rows, name = layer(sigmoid_cache), "roi_heads.box_predictor.cls_score"
    extra = {"weight": torch.full((1, 8), 5.0), "bias": torch.tensor([6.0])}
    torch.save({"model": {f"{name}.{k}": torch.cat([v, extra[k]]) for k, v in rows.items()}}, tmp_path / "d.pth")
    export(fitted.folder, sigmoid_cache.path, tmp_path / "a.pth", Export("detectron2", tmp_path / "d.pth"))
    state = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    z = functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])
    torch.testing.assert_close(z[:, :-1].sigmoid(), fitted.artifact.head.scores(x), atol=1e-6, rtol=1e-4)
    assert torch.equal(state[f"{name}.weight"][-1:], extra["weight"])
    product = fit("fracal", sigmoid_cache, sigmoid_cache)
    with pytest.raises(UnsupportedError, match="products of two sigmoids"):
        export(product.folder, sigmoid_cache.path, tmp_path / "b.pth", Export("detectron2", tmp_path / "d.pth"))


def test_where_background_stands_is_seen_not_assumed(fit: Fit, toy: Cache, tmp_path: Path) -> None:
    """mmdetection 1.x, of which the code of BAGS and SimCal is, has it first."""
    fitted = fit("crt", toy, toy)
    state = {f"bbox_head.fc_cls.{k}": v for k, v in layer(toy, first=True).items()}
    torch.save({"state_dict": state}, tmp_path / "d.pth")
    metrics = export(fitted.folder, toy.path, tmp_path / "a.pth", Export("mmdet", tmp_path / "d.pth"))
    assert (metrics["layer"], metrics["background"]) == ("bbox_head.fc_cls", "first")


def test_half_precision_keeps_the_head_exact(fit: Fit, toy: Cache, tmp_path: Path) -> None:
    """The rest stays float16; the head's own layer would lose up to 5e-4 of every weight."""
    name, rows = "roi_heads.box_predictor.cls_score", {k: v.half() for k, v in layer(toy).items()}
    torch.save({f"{name}.{k}": v for k, v in rows.items()} | {"other": torch.ones(2).half()}, tmp_path / "d.pth")
    checkpoint, own = Checkpoint.read(tmp_path / "d.pth"), Cache(toy.path)
    own.classifier = Classifier(rows["weight"].float().numpy(), rows["bias"].float().numpy())  # as extraction saw it
    head = fit("crt", toy, toy).artifact.head
    found = Fold.find(checkpoint, own, "detectron2")
    found.apply(head, checkpoint)
    checkpoint.write(tmp_path / "a.pth")
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    assert torch.equal(state[f"{name}.weight"], head.state_dict()["classifier.weight"])
    assert state["other"].dtype == torch.float16


def test_another_detectors_checkpoint_is_refused(fit: Fit, toy: Cache, tmp_path: Path) -> None:
    fitted = fit("crt", toy, toy)
    checkpoint = write_checkpoint("detectron2", Toy(seed=1).write(tmp_path / "other"), tmp_path)
    with pytest.raises(InputError, match="is not the classifier that cache"):
        export(fitted.folder, toy.path, tmp_path / "a.pth", Export("detectron2", checkpoint))


def test_a_cascade_needs_the_name_of_its_layer(fit: Fit, toy: Cache, tmp_path: Path) -> None:
    fitted = fit("crt", toy, toy)
    names = [f"roi_heads.box_predictor.{k}.cls_score" for k in range(2)]
    torch.save({"model": {f"{n}.{k}": v for n in names for k, v in layer(toy).items()}}, tmp_path / "d.pth")
    with pytest.raises(FormatError, match="no layers named roi_heads") as error:
        export(fitted.folder, toy.path, tmp_path / "a.pth", Export("detectron2", tmp_path / "d.pth"))
    assert names[1] in error.value.hint
    wanted = Export("detectron2", tmp_path / "d.pth", layer=names[1])
    export(fitted.folder, toy.path, tmp_path / "a.pth", wanted)
    state = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    assert torch.equal(state[f"{names[0]}.weight"], layer(toy)["weight"])
    assert not torch.equal(state[f"{names[1]}.weight"], layer(toy)["weight"])
    with pytest.raises(FormatError, match="has no absent"):
        export(fitted.folder, toy.path, tmp_path / "b.pth", Export("detectron2", tmp_path / "d.pth", layer="absent"))


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("ending", ["pth", "pkl"])
def test_nothing_in_a_checkpoint_is_run(fit: Fit, toy: Cache, tmp_path: Path, ending: str) -> None:
    fitted = fit("crt", toy, toy)
    checkpoint, trace = tmp_path / f"d.{ending}", tmp_path / "trace"
    document = {"model": {}, "evil": Evil(trace)}
    checkpoint.write_bytes(pickle.dumps(document)) if ending == "pkl" else torch.save(document, checkpoint)
    with pytest.raises(FormatError, match="holds no state dict: its entries are model") as error:
        export(fitted.folder, toy.path, tmp_path / f"a.{ending}", Export("detectron2", checkpoint))
    assert "only code can make" in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "ending", "said"),
    [
        (b"", "pth", "cannot be read"),
        (b"no pickle", "pth", "cannot be read"),
        (b"no pickle", "pkl", "cannot be read"),
        (b"no safetensors", "safetensors", "cannot be read"),
        (pickle.dumps([1]), "pkl", "no state dict"),
        (pickle.dumps({"model": {"a": 1}}), "pkl", "no state dict"),
    ],
)
def test_damaged_checkpoints_are_named(
    fit: Fit, toy: Cache, tmp_path: Path, content: bytes, ending: str, said: str
) -> None:
    checkpoint = tmp_path / f"d.{ending}"
    checkpoint.write_bytes(content)
    with pytest.raises(FormatError, match=said) as error:
        export(fit("crt", toy, toy).folder, toy.path, tmp_path / f"a.{ending}", Export("detectron2", checkpoint))
    assert str(checkpoint) in str(error.value)


def test_a_checkpoint_is_not_overwritten_and_keeps_its_format(fit: Fit, toy: Cache, tmp_path: Path) -> None:
    folder, checkpoint = fit("crt", toy, toy).folder, write_checkpoint("detectron2", toy, tmp_path)
    for out, said in ((checkpoint, "is the checkpoint itself"), (tmp_path / "a.pkl", "another ending")):
        with pytest.raises(InputError, match=said):
            export(folder, toy.path, out, Export("detectron2", checkpoint))
    with pytest.raises(ExportError, match="more than 1e-12"):
        shifted = fit("fracal", toy, toy).folder
        export(shifted, toy.path, tmp_path / "a.pth", Export("detectron2", checkpoint, tolerance=1e-12))
    assert not (tmp_path / "a.pth").exists()
    with pytest.raises(CalibError, match="inside a head or a cache"):
        export(folder, toy.path, folder / "a.pth", Export("detectron2", checkpoint))


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="needs the checkpoint"):
        Export("mmdet")
    with pytest.raises(SettingError, match="takes no checkpoint"):
        Export("onnx", tmp_path)
    with pytest.raises(SettingError, match="--layer goes with"):
        Export("onnx", layer="a")
    with pytest.raises(UnknownNameError, match="Did you mean 'onnx'"):
        Export("onxx")


def test_a_cosine_detector_takes_no_linear_layer(fit: Fit, tmp_path: Path) -> None:
    cache = Toy(cosine=True).write(tmp_path / "cache")
    torch.save(
        {"roi_heads.box_predictor.cls_score.weight": torch.from_numpy(cache.classifier.weight)}, tmp_path / "d.pth"
    )
    for method in ("softmax", "crt"):
        fitted = fit(method, cache, cache)
        with pytest.raises(UnsupportedError, match="divides features by their norm"):
            export(fitted.folder, cache.path, tmp_path / "a.pth", Export("torchvision", tmp_path / "d.pth"))


def test_a_detector_file_of_calib_stays_one(
    of_kind: Callable[[str], Fitted], tmp_path: Path, detector_file: Path
) -> None:
    from calib.data.detector import load_detector

    fitted = of_kind("linear")
    export(fitted.folder, fitted.cache, tmp_path / "a.safetensors", Export("torchvision", detector_file))
    model: Any = load_detector(tmp_path / "a.safetensors")[0]
    artifact: Artifact = load(fitted.folder)
    own = artifact.head.state_dict()["classifier.weight"]
    assert torch.equal(model.roi_heads.box_predictor.cls_score.weight, own.roll(1, dims=0))
    before, after = load_file(detector_file), load_file(tmp_path / "a.safetensors")
    changed = {k for k in before if before[k].dtype != after[k].dtype or not torch.equal(before[k], after[k])}
    assert changed == {f"roi_heads.box_predictor.cls_score.{k}" for k in ("weight", "bias")}
