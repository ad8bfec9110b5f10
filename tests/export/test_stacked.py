"""Heads on bases leave as others do: a chain of linear links into the checkpoint, the others as graphs."""

from pathlib import Path

import pytest
import torch

from calib.artifact import Artifact
from calib.cache import Cache
from calib.export.export import Export, export
from calib.training import train

from ..toy import Toy
from .test_fold import as_framework, write_checkpoint

SHORT = {"steps": 20, "warmup_steps": 0, "lr": 0.1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Toy(counts=(40, 12, 5, 3)).write(tmp_path_factory.mktemp("toy") / "cache")


@pytest.fixture(scope="module")
def natural(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return train("natural", cache, tmp_path_factory.mktemp("base") / "1", SHORT)


@pytest.mark.parametrize("framework", ["torchvision", "detectron2", "mmdet"])
def test_a_chain_of_linear_links_is_folded_into_the_checkpoint(
    framework: str, cache: Cache, natural: Artifact, tmp_path: Path
) -> None:
    middle = train("tau-norm", cache, tmp_path / "middle", {"tau": 0.4}, base=natural)
    head = train("logit-adjustment", cache, tmp_path / "head", {"tau": 0.5}, base=middle).head
    checkpoint = write_checkpoint(framework, cache, tmp_path)
    wanted = Export(framework, checkpoint=checkpoint)
    written = export(tmp_path / "head", cache.path, tmp_path / f"out{checkpoint.suffix}", wanted)
    assert written["largest_difference"] < 1e-6
    x = torch.randn(9, 8)
    found = as_framework(framework, tmp_path / f"out{checkpoint.suffix}", x)
    torch.testing.assert_close(found, head.scores(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "base"),
    [("fracal", "disalign"), ("ms-calibration", "residual"), ("discriminant", "natural"), ("ncm", "residual")],
)
@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_what_is_no_layer_is_a_graph(to: str, method: str, base: str, cache: Cache, tmp_path: Path) -> None:
    settings = {f"loop.{k}": v for k, v in SHORT.items()} | ({"hidden": 8} if base == "residual" else {})
    below = train(base, cache, tmp_path / "base", settings)
    train(method, cache, tmp_path / "head", base=below)
    written = export(tmp_path / "head", cache.path, tmp_path / "out", Export(to))
    assert written["largest_difference"] < 1e-5
