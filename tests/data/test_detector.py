"""The small detector and its file: saved and loaded alike, foreign files refused, the shipped one works."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.data.detector import load_detector, save_detector, shapes_detector
from calib.data.plan import ShapesSettings, make_plan
from calib.data.resources import shipped
from calib.data.shapes import build
from calib.errors import (
    CalibError,
    FormatError,
    InputError,
    MissingExtraError,
    MissingFileError,
    NonFiniteError,
    ShapeError,
    UnsupportedError,
    VersionError,
)

pytest.importorskip("torchvision")

KWARGS = {"num_classes": 4, "image_size": 96}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Layers this small gain nothing from threads, and lose much where other tests run beside this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return shapes_detector(**KWARGS).eval()


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    save_detector(model, tmp_path / "d.safetensors", KWARGS)
    return tmp_path / "d.safetensors"


def _rewrite(path: Path, **metadata: str) -> Path:
    """The same tensors under altered metadata."""
    whole = {"format": "calib-detector", "version": "1", "factory": "calib.data.detector:shapes_detector"}
    save_file(load_file(path), path, {**whole, "kwargs": json.dumps(KWARGS), **metadata})
    return path


def test_it_is_torchvisions_class_with_class_agnostic_boxes(model: Any) -> None:
    from torchvision.models.detection import FasterRCNN

    assert isinstance(model, FasterRCNN)
    features = torch.randn(5, 256)
    logits, deltas = model.roi_heads.box_predictor(features)
    assert logits.shape == (5, 4)
    per_class = deltas.view(5, 4, 4)  # [N, 1+C, 4]
    assert torch.equal(per_class, per_class[:, :1].expand(-1, 4, -1))


def test_the_demo_detector_has_1_4_million_parameters() -> None:
    n = sum(p.numel() for p in shapes_detector(193).parameters())
    assert 1.35e6 < n < 1.45e6


def test_what_is_saved_comes_back_rounded_to_half_precision(model: Any, saved: Path) -> None:
    model.backbone.stem[1].running_var.fill_(1e-6)  # float16 would keep two digits of it
    save_detector(model, saved, KWARGS)
    loaded, kwargs = load_detector(saved)
    assert kwargs == KWARGS and not loaded.training
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        is_kept = "running" in name or not tensor.is_floating_point()
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor if is_kept else tensor.half().float()), name


def test_saving_what_was_loaded_gives_the_same_file(saved: Path, tmp_path: Path) -> None:
    loaded, kwargs = load_detector(saved)
    save_detector(loaded, tmp_path / "again.safetensors", kwargs)
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(t, again[name]) for name, t in load_file(saved).items())


def test_a_picture_of_the_right_size_is_not_resampled(model: Any) -> None:
    picture = torch.rand(3, 96, 96)
    batch, _ = model.transform([picture])
    assert batch.image_sizes == [(96, 96)]
    assert torch.equal(batch.tensors[0, :, :96, :96], (picture - 0.5) / 0.25)


def test_pictures_of_any_shape_are_taken(model: Any) -> None:
    with torch.no_grad():
        found = model([torch.rand(3, 50, 120), torch.rand(3, 200, 80)])
    for (height, width), one in zip(((50, 120), (200, 80)), found, strict=True):
        x, y = one["boxes"][:, [0, 2]], one["boxes"][:, [1, 3]]
        assert len(one["boxes"]) > 0
        assert x.min() >= 0 and x.max() <= width + 1e-3 and y.min() >= 0 and y.max() <= height + 1e-3


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"none\.safetensors"):
        load_detector(tmp_path / "none.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    with pytest.raises(FormatError, match="truncated or not a safetensors file"):
        load_detector(saved)


def test_foreign_files_are_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not weights " * 50)
    with pytest.raises(FormatError, match="truncated or not"):
        load_detector(tmp_path / "text")
    with pytest.raises(FormatError, match="truncated or not"):
        load_detector(tmp_path)  # a folder
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match="not a detector file"):
        load_detector(tmp_path / "other.safetensors")
    with pytest.raises(VersionError, match="version '2'"):
        load_detector(_rewrite(saved, version="2"))


@pytest.mark.parametrize(
    "factory",
    [
        "os:system",
        "calib.files:write_text",
        "calib.data.detector:load_detector",
        "torchvision.models.detection:FasterRCNN",
        "torchvision.models.detection.faster_rcnn:model_urls",
        "subprocess",
        "",
    ],
)
def test_a_file_cannot_call_what_is_not_a_model_factory(saved: Path, model: Any, factory: str) -> None:
    with pytest.raises(UnsupportedError, match="may not call"):
        load_detector(_rewrite(saved, factory=factory))
    with pytest.raises(UnsupportedError, match="may not call"):
        save_detector(model, saved, KWARGS, factory=factory)


@pytest.mark.parametrize("kwargs", ["", "[1]", "{", '"text"'])
def test_kwargs_that_are_no_object_are_refused(saved: Path, kwargs: str) -> None:
    with pytest.raises(FormatError, match="must be a JSON object"):
        load_detector(_rewrite(saved, kwargs=kwargs))


def test_kwargs_the_factory_does_not_take_are_refused(saved: Path) -> None:
    with pytest.raises(FormatError, match="does not take the arguments"):
        load_detector(_rewrite(saved, kwargs='{"num_classes": 4, "colour": "red"}'))


def test_weights_of_another_size_are_refused(saved: Path) -> None:
    with pytest.raises(ShapeError, match="do not fit"):
        load_detector(_rewrite(saved, kwargs='{"num_classes": 7, "image_size": 96}'))


def test_weights_that_are_not_finite_are_refused(model: Any, saved: Path) -> None:
    tensors = load_file(saved)
    tensors["rpn.head.cls_logits.bias"][0] = float("nan")
    metadata = {"format": "calib-detector", "version": "1", "factory": "calib.data.detector:shapes_detector"}
    save_file(tensors, saved, {**metadata, "kwargs": json.dumps(KWARGS)})
    with pytest.raises(NonFiniteError, match=r"rpn\.head\.cls_logits\.bias"):
        load_detector(saved)
    with torch.no_grad():
        model.roi_heads.box_head.fc6.bias[0] = 1e6  # beyond float16
    before = saved.read_bytes()
    with pytest.raises(NonFiniteError, match=r"fc6\.bias"):
        save_detector(model, saved, KWARGS)
    assert saved.read_bytes() == before


def test_a_torchvision_detector_loads_without_the_network(tmp_path: Path) -> None:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    kwargs: dict[str, Any] = {"num_classes": 3}
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, **kwargs)
    factory = "torchvision.models.detection:ssdlite320_mobilenet_v3_large"
    save_detector(model, tmp_path / "ssd.safetensors", kwargs, factory=factory)
    loaded, _ = load_detector(tmp_path / "ssd.safetensors")
    assert type(loaded) is type(model)


def test_without_torchvision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", None)
    with pytest.raises(MissingExtraError, match="torchvision is not installed"):
        shapes_detector(4)


def test_the_shipped_detector_finds_the_objects_of_pictures_it_never_saw(tmp_path: Path) -> None:
    """Its categories are those of the default seed; frequent objects must be found, boxed and named."""
    settings = ShapesSettings(tune_per_category=1, val_per_category=1, images=72)
    build(tmp_path / "set", settings)
    frequent = {c.category_id for c in make_plan(settings).categories[:45]}
    dataset = json.loads((tmp_path / "set" / "val.json").read_bytes())
    model, kwargs = load_detector(shipped("shapes_detector.safetensors"))
    assert kwargs["num_classes"] == len(dataset["categories"]) + 1
    ids = sorted(c["id"] for c in dataset["categories"])
    named = []
    for record in dataset["images"]:
        with torch.no_grad():
            (found,) = model([_pixels(tmp_path / "set" / "images" / record["file_name"])])
        for a in dataset["annotations"]:
            if a["image_id"] == record["id"] and a["category_id"] in frequent:
                is_it = (found["labels"] == ids.index(a["category_id"]) + 1) & (found["scores"] > 0.2)
                named.append(bool((_iou(found["boxes"][is_it], a["bbox"]) > 0.5).any()))
    assert len(named) >= 40
    assert np.mean(named) > 0.6


def _pixels(path: Path) -> torch.Tensor:
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255


def _iou(boxes: torch.Tensor, bbox: list[float]) -> torch.Tensor:
    from torchvision.ops import box_iou

    x, y, w, h = bbox
    iou: torch.Tensor = box_iou(boxes, torch.tensor([[x, y, x + w, y + h]], dtype=torch.float32))
    return iou


@pytest.fixture(scope="module")
def trainer() -> ModuleType:
    """The training script, which is a file and not a module of the package."""
    path = Path(__file__).parents[2] / "data" / "train_detector.py"
    spec = importlib.util.spec_from_file_location("train_detector", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_detector"] = module
    spec.loader.exec_module(module)
    return module


def test_the_script_trains_a_detector_that_loads(trainer: ModuleType, tmp_path: Path) -> None:
    scene = ShapesSettings(categories=3, images=10, tune_per_category=1, val_per_category=1)
    build(tmp_path / "set", scene)
    settings = trainer.TrainSettings(epochs=3.2, batch=2, warmup_steps=1, learning_rate=0.02)
    last = trainer.LastLayerSettings(steps=20)
    log = trainer.run(tmp_path / "set", tmp_path / "d.safetensors", tmp_path / "log.json", settings, last)
    model, kwargs = load_detector(tmp_path / "d.safetensors")
    assert kwargs == {"num_classes": 4, "image_size": 144}
    assert json.loads((tmp_path / "log.json").read_bytes()) == json.loads(json.dumps(log))
    assert [row["weight_decay"] for row in log["tried"]] == [-1.0, *last.weight_decays]
    assert log["loss_curve"][-1]["step"] == 16
    assert log["loss_curve"][-1]["classifier"] < 1.39  # log(4): better than knowing nothing
    assert not model.training


def test_mirrored_boxes_stay_on_their_objects(trainer: ModuleType) -> None:
    pixels = np.zeros((1, 10, 10, 3), np.uint8)
    pixels[0, 2:4, 1:6] = 255
    target = {"boxes": torch.tensor([[1.0, 2.0, 6.0, 4.0]]), "labels": torch.tensor([1])}
    train = trainer.TrainSet(pixels, [target], 1)
    images, targets = trainer.make_batch(train, np.zeros(12, np.int64), np.random.default_rng(0))
    seen = set()
    for image, t in zip(images, targets, strict=True):
        x1, y1, x2, y2 = (int(v) for v in t["boxes"][0])
        assert image[:, y1:y2, x1:x2].min() == 1 and image.sum() == 3 * 10
        seen.add(x1)
    assert seen == {1, 4}


def test_the_script_names_what_is_wrong_with_its_data(trainer: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"train\.json"):
        trainer.load_train_set(tmp_path)
    (tmp_path / "train.json").write_text('{"images": []')
    with pytest.raises(FormatError, match="not valid JSON"):
        trainer.load_train_set(tmp_path)
    (tmp_path / "train.json").write_text('{"images": []}')
    with pytest.raises(FormatError, match="not in LVIS format"):
        trainer.load_train_set(tmp_path)
    (tmp_path / "train.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(InputError, match="no picture with objects"):
        trainer.load_train_set(tmp_path)
    assert issubclass(InputError, CalibError)
