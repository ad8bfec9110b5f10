"""What is no detector, or another framework's, is refused with the cause and with what to write instead."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calib.cache import Cache
from calib.errors import CalibError, InputError, MissingExtraError, MissingFileError, UnknownNameError
from calib.extract.classes import by_id
from calib.extract.dataset import Dataset
from calib.extract.frameworks import open_detector
from calib.extract.torchvision import open_detector as open_torchvision

from ..toy import Toy

CPU = torch.device("cpu")
NAME = "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.mark.parametrize(
    ("name", "error", "hint"),
    [
        (f"detectron2:{NAME}", InputError, f"--detector torchvision:{NAME}"),
        ("mmdet:maskrcnn_resnet50_fpn", InputError, "--detector torchvision:maskrcnn_resnet50_fpn"),
        ("torchvision:faster_rcnn.yaml", InputError, "--detector detectron2:faster_rcnn.yaml"),
        ("mmdet:faster_rcnn.yml", InputError, "--detector detectron2:faster_rcnn.yml"),
        ("torchvision:faster_rcnn.py", InputError, "--detector mmdet:faster_rcnn.py"),
        ("detectron2:w.safetensors", InputError, "--detector torchvision:w.safetensors"),
        ("detectron2:model.pth", InputError, "--detector detectron2:"),
        ("detectron2:R50", InputError, "--detector detectron2:"),
        ("mmdet:my.models:build", InputError, "docs/raw.md"),
        ("torchvision:", InputError, "--detector torchvision:NAME"),
        (f"torchvison:{NAME}", UnknownNameError, f"--detector torchvision:{NAME}"),
        ("mmdetection:config.py", UnknownNameError, "--detector mmdet:config.py"),
        ("hf:some/folder", UnknownNameError, "--detector transformers:some/folder"),
        (NAME, UnknownNameError, f"--detector torchvision:{NAME}"),
        ("w.safetensors", UnknownNameError, "--detector torchvision:w.safetensors"),
        ("my.models:build", UnknownNameError, "torchvision:my.models:build or detectron2:my.models:build"),
        ("yolo:yolov8n.pt", UnknownNameError, "--detector ultralytics:yolov8n.pt"),
        ("detectron:x", UnknownNameError, "detectron2"),
    ],
)
def test_what_another_framework_takes_is_told(name: str, error: type[CalibError], hint: str) -> None:
    with pytest.raises(error) as raised:
        open_detector(name, CPU, weights=Path("w.pth"))
    assert hint in raised.value.hint
    if name.startswith(("mmdetection", "yolo", "hf")):
        assert "Did you mean" not in str(raised.value)  # what is spelled alike is something else


def test_a_lazy_config_is_detectron2s() -> None:
    with pytest.raises((MissingExtraError, MissingFileError)):  # as it is not installed, or as there is no such file
        open_detector("detectron2:lazy_config.py", CPU, weights=Path("w.pth"))


FACTORIES = f"""
import torch
from torch import nn
from torchvision.models.detection import {NAME} as make

sizes = dict(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64)
model = make(**sizes)
number = 3

def good(): return make(**sizes)
def training(): return make(**sizes).train()
def parallel(): return nn.DataParallel(make(**sizes))
def compiled(): return torch.compile(make(**sizes))
def nothing(): pass
def as_dict(): return {{"model": model}}
def as_state(): return model.state_dict()
def key_error(): return {{}}["backbone"]
def runtime_error(): raise RuntimeError("no GPU here")
def exits(): raise SystemExit(3)
def file_missing(): return torch.load("/nowhere/w.pth")
def meta():
    with torch.device("meta"):
        return make(**sizes)
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "made_here.py").write_text(FACTORIES)
    (tmp_path / "broken_here.py").write_text("import nothing_of_this_name")
    (tmp_path / "wrong_here.py").write_text("def build(:")
    (tmp_path / "asking_here.py").write_text("raise SystemExit(2)")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("made_here", "broken_here", "wrong_here", "asking_here"):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
def test_what_wraps_the_model_of_a_factory_is_taken_off(factories: None) -> None:
    for name in ("good", "training", "parallel", "compiled"):
        opened = open_torchvision(f"made_here:{name}", CPU)
        assert type(opened.model).__name__ == "FasterRCNN"
        assert not any(m.training for m in opened.model.modules())


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("made_here:nothing", "returned NoneType: expected a torch module"),
        ("made_here:as_dict", "returned dict: expected a torch module"),
        ("made_here:as_state", "returned OrderedDict: expected a torch module"),
        ("made_here:key_error", "failed on {}: KeyError: 'backbone'"),
        ("made_here:runtime_error", "RuntimeError: no GPU here"),
        ("made_here:exits", "SystemExit"),
        ("made_here:file_missing", "/nowhere/w.pth"),
        ("made_here:meta", "on the meta device"),
        ("made_here:model", "is FasterRCNN, no function"),
        ("made_here:number", "is int, no function"),
        ("made_here:absent", "cannot be imported"),
        ("broken_here:build", "nothing_of_this_name"),
        ("wrong_here:build", "SyntaxError"),
        ("asking_here:build", "SystemExit"),
        ("made_here:a:b", "cannot be imported"),
    ],
)
def test_a_factory_that_makes_no_detector(factories: None, spec: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        open_torchvision(spec, CPU)
    assert spec in str(error.value) and said in str(error.value) and error.value.hint


def test_a_model_without_the_parts_is_named() -> None:
    with pytest.raises(CalibError, match=r"Linear cannot be extracted: it has no rpn, roi_heads\.box_head"):
        from calib.extract.torchvision import TorchvisionAdapter

        TorchvisionAdapter(nn.Linear(2, 2), "x", CPU)


def test_a_cache_without_an_object_trains_nothing(fails: Callable[..., str], tmp_path: Path) -> None:
    Toy(counts=(0, 0)).write(tmp_path / "c")
    for method in ("natural", "crt", "simcal", "bags", "ncm", "ms-calibration", "logn"):
        said = fails("train", method, "--cache", tmp_path / "c", "--out", tmp_path / method)
        assert "none has a class" in said and not (tmp_path / method).exists()
    fails("train", "crt", "bags", "--one-pass", "--cache", tmp_path / "c", "--out", tmp_path / "m")


def test_classes_by_id(
    document: Callable[..., dict[str, Any]], read: Callable[[dict[str, Any]], Dataset], tmp_path: Path
) -> None:
    given = read(document([(20, 30)], [(1, 10, 1, 1, 5, 5), (1, 30, 2, 2, 6, 6)]))
    own = by_id(given, 41)
    c = own.categories
    assert c.category_id.tolist() == list(range(1, 42))
    assert np.flatnonzero(c.instance_count).tolist() == [9, 29] and c.name[9] == "kind 0" and c.name[10] == "unused 11"
    assert own.objects(1).label.tolist() == [9, 29] and own.digest() != given.digest()
    for classes in (4, 39):
        with pytest.raises(InputError, match=f"is none of the outputs 1 to {classes}"):
            by_id(given, classes)


def test_a_cache_by_id_from_the_command_line(
    calib: Callable[..., Any], fails: Callable[..., str], factories: None, document: Callable[..., Any], tmp_path: Path
) -> None:
    import json

    content = document([(40, 60)], [(1, 1, 1, 1, 30, 30)])
    content["categories"] = [{"id": 1, "name": "a"}]
    (tmp_path / "a.json").write_text(json.dumps(content))
    arguments = ["extract", "--detector", "torchvision:made_here:good", "--annotations", tmp_path / "a.json",
                 "--images", tmp_path / "images", "--out", tmp_path / "c"]  # fmt: skip
    assert "--classes-by-id" in fails(*arguments)
    outcome = calib(*arguments, "--classes-by-id")
    assert outcome.exit_code == 0, outcome.output
    assert Cache(tmp_path / "c").categories.name == ("a", "unused 2")
