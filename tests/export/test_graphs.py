"""ONNX, torch.export, TorchScript and Triton: every kind of head, any number of rows, without calib."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.errors import ExistsError, ExportError, SettingError
from calib.export.export import Export, export
from calib.export.graph import OPSET
from calib.registry import HEADS

from .conftest import ALL_KINDS, Fitted

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

OfKind = Callable[[str], Fitted]


def unseen(fitted: Fitted, n: int) -> torch.Tensor:
    """Rows that no cache has."""
    return torch.rand(n, fitted.artifact.head.feature_size, generator=torch.Generator().manual_seed(n)) * 2


def test_every_kind_of_head_is_among_them(of_kind: OfKind) -> None:
    heads = [of_kind(kind).artifact.head for kind in ALL_KINDS]
    # Those of cascades need another cache: tests/heads/test_cascade.py exports them. Maps by box size are refused.
    kinds = {m.kind for head in heads for m in head.modules() if hasattr(m, "kind")}
    assert kinds == set(HEADS) - {"cascade", "by-size"}


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_onnx_gives_the_scores_of_the_head(of_kind: OfKind, tmp_path: Path, kind: str) -> None:
    fitted, path = of_kind(kind), tmp_path / "head.onnx"
    metrics = export(fitted.folder, fitted.cache, path, Export("onnx"))
    assert 0 <= metrics["largest_difference"] <= 1e-5 and metrics["opset"] == OPSET
    model = onnx.load(path)
    assert [o.version for o in model.opset_import if not o.domain] == [OPSET]
    properties = {p.key: p.value for p in model.metadata_props}
    assert json.loads(properties["category_ids"]) == fitted.artifact.info.category_ids
    session = onnxruntime.InferenceSession(path)
    head = fitted.artifact.head
    assert session.get_inputs()[0].shape == ["N", head.feature_size]
    assert session.get_outputs()[0].shape == ["N", head.num_classes]
    for n in (0, 1, 2, 333):
        rows = unseen(fitted, n)
        (scores,) = session.run(["SCORES"], {"FEATURES": rows.numpy()})
        np.testing.assert_allclose(scores, head.scores(rows).numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("to", ["torch", "torchscript"])
def test_programs_give_the_scores_of_the_head(of_kind: OfKind, tmp_path: Path, kind: str, to: str) -> None:
    fitted, path = of_kind(kind), tmp_path / "head.pt"
    metrics = export(fitted.folder, fitted.cache, path, Export(to))
    assert metrics["largest_difference"] <= 1e-5
    with pytest.warns() if to == "torchscript" else _nothing():
        run: Any = torch.jit.load(path) if to == "torchscript" else torch.export.load(str(path)).module()  # type: ignore[no-untyped-call]
    for n in (0, 1, 2, 333):
        rows = unseen(fitted, n)
        torch.testing.assert_close(run(rows), fitted.artifact.head.scores(rows), atol=1e-6, rtol=1e-4)


def _nothing() -> Any:
    import warnings

    context = warnings.catch_warnings()
    warnings.simplefilter("ignore")
    return context


def test_what_differs_is_not_left_behind(of_kind: OfKind, tmp_path: Path) -> None:
    fitted = of_kind("affine")
    out = tmp_path / "out"
    out.mkdir()
    for to in ("onnx", "triton", "module"):
        with pytest.raises(ExportError, match=r"differs from its head by up to .* 1e-12") as error:
            export(fitted.folder, fitted.cache, out / "a" if to != "triton" else out, Export(to, tolerance=1e-12))
        assert "tolerance" in error.value.hint
    assert list(out.iterdir()) == []


def test_numbers_that_make_no_check_are_refused(of_kind: OfKind, tmp_path: Path) -> None:
    fitted = of_kind("affine")
    for wrong in ({"rows": 0}, {"tolerance": 0.0}, {"tolerance": float("nan")}):
        with pytest.raises(SettingError):
            export(fitted.folder, fitted.cache, tmp_path / "a", Export("torch", **wrong))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def model_config() -> Any:
    """Triton's own schema of config.pbtxt, without the gRPC library that its package asks for."""
    package = importlib.util.find_spec("tritonclient")
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_triton_repository_is_one(of_kind: OfKind, tmp_path: Path) -> None:
    from google.protobuf import text_format

    fitted = of_kind("group")
    repository = tmp_path / "repository"
    metrics = export(fitted.folder, fitted.cache, repository, Export("triton"))
    assert (metrics["model"], metrics["version"]) == ("bags", "1") and metrics["largest_difference"] <= 1e-5
    assert {str(p.relative_to(repository)) for p in repository.rglob("*") if p.is_file()} == {
        "bags/config.pbtxt",
        "bags/1/model.onnx",
    }
    schema = model_config()
    config = text_format.Parse((repository / "bags" / "config.pbtxt").read_text(), schema.ModelConfig())
    session = onnxruntime.InferenceSession(repository / "bags" / "1" / "model.onnx")
    head = fitted.artifact.head
    assert (config.name, config.backend, config.max_batch_size) == ("bags", "onnxruntime", 0)
    for told, found, width in (
        (config.input, session.get_inputs(), head.feature_size),
        (config.output, session.get_outputs(), head.num_classes),
    ):
        assert [(t.name, t.data_type, list(t.dims)) for t in told] == [(found[0].name, schema.TYPE_FP32, [-1, width])]
    assert json.loads(config.parameters["category_ids"].string_value) == fitted.artifact.info.category_ids

    with pytest.raises(ExistsError, match="exists"):
        export(fitted.folder, fitted.cache, repository, Export("triton"))
    export(fitted.folder, fitted.cache, repository, Export("triton", overwrite=True))
    export(fitted.folder, fitted.cache, repository, Export("triton", name='quo"ted'))
    text_format.Parse((repository / 'quo"ted' / "config.pbtxt").read_text(), schema.ModelConfig())
    with pytest.raises(SettingError, match="name is"):
        export(fitted.folder, fitted.cache, repository, Export("triton", name="../up"))
