"""The small rendered set with one thing wrong, and the shipped detector with its classes in other orders."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.doctor import Case, Examination, Finding, Report, examine
from calib.extract.torchvision import TorchvisionAdapter

Change = Callable[[dict[str, Any]], object]
QUICK = Examination(sample=24, seconds=0, check_images=0)


def keep(document: dict[str, Any]) -> None:
    """No change."""


@pytest.fixture
def altered(shapes_set: Path, tmp_path: Path) -> Callable[..., Path]:
    """``altered(change, split="train", name="train")``: a json of the split after ``change(document)``."""

    def write(change: Change = keep, split: str = "train", name: str = "") -> Path:
        document = json.loads((shapes_set / f"{split}.json").read_bytes())
        change(document)
        path = tmp_path / f"{name or split}.json"
        path.write_text(json.dumps(document))
        return path

    return write


@pytest.fixture
def images(shapes_set: Path) -> Path:
    """The pictures of all splits."""
    return shapes_set / "images"


@pytest.fixture
def ordered(detector_file: Path) -> Callable[..., TorchvisionAdapter]:
    """``ordered(rows)``: the shipped detector, whose output k (background aside) is what output ``rows[k]`` was; -1:
    one that is never chosen; ``noise``: that many standard deviations of the weights are added."""
    pytest.importorskip("torchvision")

    def opened(rows: Sequence[int] | None = None, noise: float = 0.0) -> TorchvisionAdapter:
        from calib.data.detector import load_detector

        torch.set_num_threads(1)
        model: Any = load_detector(detector_file)[0]
        predictor = model.roi_heads.box_predictor
        weight, bias = predictor.cls_score.weight.detach(), predictor.cls_score.bias.detach()
        if rows is not None:
            at = torch.as_tensor(np.asarray(rows) + 1)
            unused = torch.as_tensor(np.asarray(rows) < 0)
            weight = torch.cat([weight[:1], torch.where(unused[:, None], torch.zeros(1), weight[at])])
            bias = torch.cat([bias[:1], torch.where(unused, torch.tensor(-50.0), bias[at])])
        generator = torch.Generator().manual_seed(0)
        weight = weight + noise * weight.std() * torch.randn(weight.shape, generator=generator)
        layer = torch.nn.Linear(weight.shape[1], len(weight))
        layer.weight, layer.bias = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(bias.clone())
        predictor.cls_score, predictor.num_classes = layer, len(weight)
        return TorchvisionAdapter(model, "torchvision:shapes", torch.device("cpu"))

    return opened


def found(report: Report, code: str) -> Finding:
    """The one finding of that code."""
    (one,) = [f for f in report.findings if f.code == code]
    return one


def look(annotations: Path, how: Examination = QUICK, **more: Any) -> Report:
    return examine(Case(annotations, **more), how)
