"""The adapter for Ultralytics YOLO: the detector's own numbers, heads back in its checkpoint, the model as it was."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.artifact import Artifact, HeadInfo, save
from calib.cache import Cache
from calib.errors import FormatError, InputError, MissingFileError, UnsupportedError
from calib.export.export import Export, export
from calib.extract.classes import in_class_order
from calib.extract.dataset import Dataset
from calib.extract.extraction import extract
from calib.extract.frameworks import checkpoint_reader
from calib.extract.options import Extraction
from calib.extract.proof import replayed
from calib.extract.replay import compare
from calib.extract.ultralytics import ENVIRONMENT, YoloAdapter, open_detector
from calib.heads.detector import detector_head
from calib.heads.linear import LinearClassifier
from calib.heads.sigmoid import SigmoidHead
from calib.score import detector_nms, score
from tests.extract.conftest import CLASSES

os.environ.update(ENVIRONMENT)
ultralytics = pytest.importorskip("ultralytics")

CPU = torch.device("cpu")
SIZES = [(40, 60), (40, 60), (41, 57), (7, 9), (90, 31), (64, 64)]
# Versions, and the heads of those that have two.
MODELS = [
    *((name, {}) for name in ("yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n")),
    *((name, {"nms": False}) for name in ("yolov10n", "yolo26n")),
]
SETTINGS = {"imgsz": 64, "conf": 0.2, "max_det": 40}
Document = Callable[..., dict[str, Any]]
Read = Callable[[dict[str, Any]], Dataset]


def checkpoint(name: str, path: Path, seed: int = 0) -> Path:
    """A random model with spread scores and boxes, in a file as the package writes it."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    yolo: Any = ultralytics.YOLO(f"{name}.yaml")
    from ultralytics.nn.tasks import DetectionModel

    yolo.model = DetectionModel(f"{name}.yaml", nc=CLASSES, verbose=False)
    yolo.model.names = {k: f"kind {k}" for k in range(CLASSES)}
    yolo.model.args, yolo.ckpt = {"imgsz": 64, "task": "detect"}, {}
    generator = torch.Generator().manual_seed(seed)
    head = yolo.model.model[-1]
    with torch.no_grad():
        for which in ("cv3", "one2one_cv3"):
            for part in getattr(head, which, None) or ():
                part[-1].weight.copy_(torch.randn(part[-1].weight.shape, generator=generator) * 2)
                part[-1].bias.copy_(torch.randn(CLASSES, generator=generator) - 1)
    yolo.save(path)
    return path


def opened(path: Path, **more: Any) -> YoloAdapter:
    return open_detector(str(path), CPU, arguments=json.dumps(SETTINGS | more))


@pytest.mark.parametrize(("name", "more"), MODELS)
def test_rows_give_the_detectors_own_detections(
    name: str, more: dict[str, Any], document: Document, read: Read, draw: Callable[..., Any], tmp_path: Path
) -> None:
    adapter = opened(checkpoint(name, tmp_path / "w.pt"), **more)
    extract(adapter, read(document(SIZES)), tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    cache = Cache(tmp_path / "c")
    d, proof = cache.manifest.detector, cache.manifest.proof
    assert (d.activation, d.nms_iou, d.clips_last) == ("sigmoid", 1.0 if more else 0.7, True)
    assert proof["images"] == 4 and proof["detections"] > 40 and proof["largest_difference"] < 1e-5
    found = list(score(cache, detector_head(cache), detector_nms(cache)))
    for i, ours in enumerate(found):
        pixels = draw(*SIZES[i], i)
        # Its public predict shows the best class of a box, so that some of ours are not among its own.
        (own,) = adapter.yolo.predict(pixels[..., ::-1].copy(), device="cpu", verbose=False, **SETTINGS, **more)
        mine, theirs = ours.detections, own.boxes
        assert len(theirs) > 0 and mine.box.min() >= 0 and (mine.box.max(axis=0) <= np.tile(SIZES[i][::-1], 2)).all()
        for box, value, k in zip(theirs.xyxy.numpy(), theirs.conf.numpy(), theirs.cls.numpy(), strict=True):
            same = (mine.category == k) & (np.abs(mine.score - value) < 1e-5)
            assert value <= mine.score.min() + 1e-5 or np.abs(mine.box[same] - box).max(axis=1).min() < 0.01


@pytest.mark.parametrize(("name", "more"), [("yolov8n", {}), ("yolo26n", {"nms": False})])
def test_the_detector_is_left_as_it_was(
    name: str, more: dict[str, Any], draw: Callable[..., Any], tmp_path: Path
) -> None:
    adapter, pixels = opened(checkpoint(name, tmp_path / "w.pt"), **more), [draw(40, 60), draw(40, 60, 1)]

    def own() -> Any:
        return [r.boxes.data.numpy() for r in adapter._predict(pixels)]

    before, (a, b) = own(), adapter.rois(pixels)
    assert all(np.array_equal(x, y) for x, y in zip(before, own(), strict=True))
    (alone,) = adapter.rois(pixels[1:])
    assert np.allclose(b.features, alone.features, atol=1e-4) and np.allclose(b.refined, alone.refined, atol=1e-3)
    assert len(a.features) <= adapter.most_rows("test") and a.features.shape[1] == adapter.detector.feature_size
    assert np.allclose(adapter.classifier().logits(a.features), a.logits, atol=1e-4)
    assert "_inference" not in vars(adapter._head)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in adapter._head.modules())


@pytest.mark.parametrize(("name", "more"), [("yolo11n", {}), ("yolo26n", {}), ("yolo26n", {"nms": False})])
def test_a_head_goes_back_into_the_checkpoint(
    name: str, more: dict[str, Any], document: Document, read: Read, draw: Callable[..., Any], tmp_path: Path
) -> None:
    """The package itself then detects what the head does on the cache, whose rows are all places here."""
    adapter = opened(checkpoint(name, tmp_path / "w.pt"), **more)
    dataset = in_class_order(adapter, read(document(SIZES[:3])))
    extract(adapter, dataset, tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    cache, generator = Cache(tmp_path / "c"), torch.Generator().manual_seed(3)
    own = torch.from_numpy(cache.classifier.weight)
    weight = own + 0.3 * torch.randn(own.shape, generator=generator)
    head = SigmoidHead(LinearClassifier(weight, torch.randn(CLASSES, generator=generator)))
    save(tmp_path / "m" / "1", Artifact(head, HeadInfo.of(cache, "natural", {}, 0, [])))
    wanted = Export("ultralytics", tmp_path / "w.pt", reader=checkpoint_reader("ultralytics"))
    done = export(tmp_path / "m" / "1", cache.path, tmp_path / "new.pt", wanted)
    assert done["largest_difference"] <= 1e-5 and "cv3.2.2" in done["layer"]
    folded = opened(tmp_path / "new.pt", **more)
    for i, record in enumerate(dataset.images):
        picture = draw(*SIZES[i], i)
        theirs = folded.detections(picture)
        largest, wrong = compare(theirs, replayed(adapter, dataset, record, picture, head))
        assert len(theirs.score) > 5 and largest < 1e-4 and not wrong
    other = Export("ultralytics", checkpoint(name, tmp_path / "o.pt", 1), reader=checkpoint_reader("ultralytics"))
    with pytest.raises(InputError, match="is not the classifier"):
        export(tmp_path / "m" / "1", cache.path, tmp_path / "n.pt", other)


def test_what_does_not_fit_says_why(tmp_path: Path) -> None:
    good = checkpoint("yolov8n", tmp_path / "w.pt")
    for wrong in ('{"imgsz": "64"}', '{"size": 64}', '{"conf": 2}', "[1]", "{"):
        with pytest.raises(InputError):
            open_detector(str(good), CPU, arguments=wrong)
    with pytest.raises(InputError, match="has its own weights"):
        open_detector(str(good), CPU, weights=good)
    with pytest.raises(MissingFileError):
        open_detector(str(tmp_path / "yolov8n.pt"), CPU)
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:999])
    with pytest.raises(FormatError):
        open_detector(str(tmp_path / "cut.pt"), CPU)
    segments = ultralytics.YOLO("yolov8n-seg.yaml")
    segments.save(tmp_path / "seg.pt")
    with pytest.raises(UnsupportedError, match="Segment for the task segment"):
        open_detector(str(tmp_path / "seg.pt"), CPU)
