"""The small detector and its file: saved and loaded alike, foreign files refused, the shipped one works."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from calib.data.detector import class_names, load_detector, save_detector, shapes_detector
from calib.data.detector_training import Store, TrainSettings, train_model
from calib.data.plan import ShapesSettings, make_plan
from calib.data.resources import shipped
from calib.data.shapes import build
from calib.data.train_set import TrainSet, make_batch
from calib.errors import (
    CalibError,
    ExistsError,
    FormatError,
    InputError,
    MissingExtraError,
    MissingFileError,
    NonFiniteError,
    SettingError,
    ShapeError,
    UnsupportedError,
    VersionError,
)
from calib.extract.dataset import Dataset

from ..scripts import load_script

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
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255


def _iou(boxes: torch.Tensor, bbox: list[float]) -> torch.Tensor:
    from torchvision.ops import box_iou

    x, y, w, h = bbox
    iou: torch.Tensor = box_iou(boxes, torch.tensor([[x, y, x + w, y + h]], dtype=torch.float32))
    return iou


@pytest.fixture(scope="module")
def trainer() -> ModuleType:
    return load_script("data/train_detector.py")


def test_the_script_trains_a_detector_that_loads(trainer: ModuleType, tmp_path: Path) -> None:
    scene = ShapesSettings(categories=3, images=10, tune_per_category=1, val_per_category=1)
    build(tmp_path / "set", scene)
    settings = trainer.TrainSettings(epochs=3.2, batch=2, warmup_steps=1, learning_rate=0.02)
    last = trainer.LastLayerSettings(steps=20)
    source = trainer.Source.of_folder(tmp_path / "set")
    log = trainer.run(source, tmp_path / "d.safetensors", tmp_path / "log.json", settings, last)
    model, kwargs = load_detector(tmp_path / "d.safetensors")
    assert kwargs == {"num_classes": 4, "image_size": 144}
    assert json.loads((tmp_path / "log.json").read_bytes()) == json.loads(json.dumps(log))
    assert [row["weight_decay"] for row in log["tried"]] == [-1.0, *last.weight_decays]
    assert log["loss_curve"][-1]["step"] == 16
    assert log["loss_curve"][-1]["classifier"] < 1.39  # log(4): better than knowing nothing
    assert not model.training
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.safetensors", "log.json", "set"]


@pytest.fixture
def odd_set(trainer: ModuleType, tmp_path: Path) -> Any:
    """A COCO json with long thin objects in grey pictures of several sizes, one of them without objects."""
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (tmp_path / "grey").mkdir()
    for k, (height, width) in enumerate([(60, 90), (90, 60), (50, 50), (64, 96)]):
        pixels = rng.integers(0, 60, (height, width), np.uint8)
        for _ in range(0 if k == 2 else 3):
            x, y = rng.integers(0, width - 30), rng.integers(0, height - 30)
            long, is_wide = int(rng.integers(20, 30)), int(rng.integers(0, 2))
            w, h = (long, 4) if is_wide else (4, long)
            pixels[y : y + h, x : x + w] = 255
            ids = {"id": len(annotations) + 1, "image_id": k + 1, "category_id": (7, 2)[is_wide]}
            annotations.append(ids | {"bbox": [int(x), int(y), w, h], "area": w * h})
        Image.fromarray(pixels).save(tmp_path / "grey" / f"{k}.png")
        images.append({"id": k + 1, "file_name": f"{k}.png", "height": height, "width": width})
    categories = [{"id": 7, "name": "tall"}, {"id": 2, "name": "wide"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "odd.json").write_text(json.dumps(document))
    return trainer.Source(tmp_path / "odd.json", tmp_path / "grey")


def test_the_script_takes_any_json(trainer: ModuleType, odd_set: Any, tmp_path: Path, capsys: Any) -> None:
    from calib.extract.torchvision import open_detector

    settings = trainer.TrainSettings(epochs=2, batch=2, warmup_steps=1, learning_rate=0.01, mirror=False)
    network = trainer.NetworkSettings("data", 2, 2, proposals=40, rois=16)
    out = tmp_path / "d.safetensors"
    log = trainer.run(odd_set, out, None, settings, trainer.LastLayerSettings(), network=network)
    assert log["pictures"] == 3 and "tried" not in log
    model, kwargs = load_detector(out)
    assert kwargs["image_size"] == 96 and kwargs["num_classes"] == 3 and kwargs["proposals"] == 40
    assert [len(level) for level in kwargs["anchor_sizes"]] == [2, 2, 2]
    low, high = kwargs["anchor_ratios"]
    assert low < 0.25 and high > 4
    assert model.rpn.anchor_generator.aspect_ratios == ((low, high),) * 3  # type: ignore[union-attr]
    assert "anchors" in capsys.readouterr().err
    assert class_names(out) == ("wide", "tall")  # ascending id
    adapter = open_detector(str(out), torch.device("cpu"))
    assert adapter.classes.hints == ("wide", "tall") and adapter.most_rows("test") == 40
    with torch.no_grad():
        assert len(model([torch.rand(3, 60, 90)])[0]["boxes"]) > 0


def test_mirrored_boxes_stay_on_their_objects(trainer: ModuleType) -> None:
    pixels = np.zeros((1, 10, 10, 3), np.uint8)
    pixels[0, 2:4, 1:6] = 255
    target = {"boxes": torch.tensor([[1.0, 2.0, 6.0, 4.0]]), "labels": torch.tensor([1])}
    chosen = np.zeros(12, np.int64)
    for one in (pixels, pixels[..., 0]):  # coloured, grey
        train = TrainSet(one, [target], 1)
        for mirror, places in ((True, {1, 4}), (False, {1})):
            images, targets = make_batch(train, chosen, np.random.default_rng(0), mirror=mirror)
            seen = set()
            for image, t in zip(images, targets, strict=True):
                x1, y1, x2, y2 = (int(v) for v in t["boxes"][0])
                assert image.shape == (3, 10, 10)
                assert image[:, y1:y2, x1:x2].min() == 1 and image.sum() == 3 * 10
                seen.add(x1)
            assert seen == places


def test_parts_of_a_batch_are_the_batch() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)
    targets = [{"boxes": torch.tensor([[k, 1.0, 7.0, 4.0]]), "labels": torch.tensor([1])} for k in range(5)]
    train, chosen = TrainSet(pixels, targets, 1), np.array([4, 0, 3, 3, 1])
    whole, _ = make_batch(train, chosen, np.random.default_rng(1))
    parts = [make_batch(train, chosen, np.random.default_rng(1), part=(k, 2))[0] for k in range(2)]
    assert [len(part) for part in parts] == [3, 2]
    assert all(torch.equal(image, parts[k % 2][k // 2]) for k, image in enumerate(whole))


class Interrupted:
    """Pictures that can be read ``left`` times."""

    def __init__(self, pixels: Any, left: int) -> None:
        self.pixels, self.left = pixels, left

    def __getitem__(self, i: int, /) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.pixels[i]


def _trained(pixels: Any, settings: TrainSettings, store: Store) -> tuple[Any, Any]:
    rng = np.random.default_rng(3)
    targets = [
        {"boxes": torch.from_numpy(np.float32([[x, 5, x + 20, 30]])), "labels": torch.tensor([1 + x % 2])}
        for x in rng.integers(0, 70, 7).tolist()
    ]
    torch.manual_seed(settings.seed)
    model: Any = shapes_detector(3, image_size=96).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    curve = train_model(model, TrainSet(pixels, targets, 2), settings, store=store)
    return model.state_dict(), curve


def test_a_training_goes_on_as_if_it_had_not_been_interrupted(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 96, 96, 3), np.uint8)
    settings = TrainSettings(epochs=4, batch=3, warmup_steps=2, save_every=2)
    whole, curve = _trained(pixels, settings, Store(tmp_path / "whole", {"data": "a"}))
    store = Store(tmp_path / "state", {"data": "a"})
    with pytest.raises(KeyboardInterrupt):
        _trained(Interrupted(pixels, 3 * 5 + 1), settings, store)  # in the sixth step of nine
    left = Interrupted(pixels, 3 * 5)
    again, its_curve = _trained(left, settings, store)
    assert left.left == 0  # steps 5 to 9 alone were done again
    assert its_curve == curve and curve[-1]["step"] == 9
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    for other, identity in ((replace(settings, learning_rate=0.1), {"data": "b"}), (settings, {"data": "c"})):
        with pytest.raises(ExistsError, match="other settings"):
            _trained(pixels, other, Store(tmp_path / "state", identity))
    (tmp_path / "state").write_bytes((tmp_path / "state").read_bytes()[:1000])
    with pytest.raises(FormatError):
        _trained(pixels, settings, store)


def test_a_killed_script_is_gone_on_with_by_the_same_options_only(
    trainer: ModuleType, odd_set: Any, tmp_path: Path
) -> None:
    settings = trainer.TrainSettings(epochs=2, batch=2, warmup_steps=1)
    out, last = tmp_path / "d.safetensors", trainer.LastLayerSettings(steps=10)
    broken = replace(odd_set, tune=tmp_path / "tune.json")
    broken.tune.write_text("{}")
    with pytest.raises(FormatError):  # once the network is trained
        trainer.run(broken, out, None, settings, last)
    network = tmp_path / "d.safetensors.training" / "d.safetensors"
    before = network.stat().st_mtime_ns
    assert not out.exists()
    with pytest.raises(ExistsError, match="other options"):
        trainer.run(odd_set, out, None, settings, last)
    with pytest.raises(FormatError):
        trainer.run(broken, out, None, settings, last)
    assert network.stat().st_mtime_ns == before


@pytest.mark.slow
def test_processes_share_the_batches(odd_set: Any, tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "data" / "train_detector.py"
    files = []
    for k in range(2):
        out, log = tmp_path / f"{k}.safetensors", tmp_path / f"{k}.json"
        options = ["--annotations", odd_set.annotations, "--images", odd_set.images, "--out", out, "--log", log]
        options += ["--processes", 2, "--batch", 2, "--epochs", 4, "--warmup-steps", 1, "--learning-rate", 0.01]
        done = subprocess.run([sys.executable, script, *map(str, options)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files.append(load_file(out))
        told = json.loads(log.read_bytes())
        assert told["processes"] == 2 and told["loss_curve"][-1]["classifier"] < 1.1  # log(3)
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


def test_the_script_names_what_is_wrong_with_its_data(trainer: ModuleType, tmp_path: Path) -> None:
    def read() -> None:
        trainer.load_train_set(Dataset.read(tmp_path / "train.json"), tmp_path)

    with pytest.raises(MissingFileError, match=r"train\.json"):
        read()
    (tmp_path / "train.json").write_text('{"images": []')
    with pytest.raises(FormatError, match="not valid JSON"):
        read()
    (tmp_path / "train.json").write_text('{"images": []}')
    with pytest.raises(FormatError, match="categories"):
        read()
    document = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": [{"id": 1}]}
    (tmp_path / "train.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="no picture with objects"):
        read()
    for wrong in ({"anchors": "none"}, {"backbone_weights": tmp_path}, {"proposals": 0}):
        with pytest.raises(SettingError):
            trainer.NetworkSettings(**wrong)
    assert issubclass(InputError, CalibError)


@pytest.mark.slow
def test_the_script_exits_with_2_and_a_hint(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "data" / "train_detector.py"
    for options in (["--annotations", tmp_path / "no.json"], ["--data", tmp_path, "--batch", "0"]):
        command = [sys.executable, script, "--out", tmp_path / "d", *options]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_names_of_classes_are_kept_and_old_files_have_none(model: Any, saved: Path, tmp_path: Path) -> None:
    assert class_names(saved) == ()
    save_detector(model, tmp_path / "named", KWARGS, classes=("a", "b", "c"))
    assert class_names(tmp_path / "named") == ("a", "b", "c")
    with pytest.raises(FormatError, match="list of names"):
        class_names(_rewrite(saved, classes="[1]"))


@pytest.mark.parametrize(
    "wrong", [{"backbone": "resnet"}, {"anchor_sizes": [[1], [2]]}, {"roi_levels": 4}, {"anchor_ratios": 3}]
)
def test_settings_of_a_file_that_the_network_cannot_have_are_refused(saved: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(CalibError):
        load_detector(_rewrite(saved, kwargs=json.dumps(KWARGS | wrong)))
