"""Heads inside live detectors: the same detections, to the last digit of AP, as ``calib score`` of the same head."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calib.artifact import Artifact, HeadInfo
from calib.cache import Cache
from calib.errors import UnsupportedError
from calib.evaluate.evaluate_files import Options, evaluate_files
from calib.export.export import Export, export
from calib.export.graph import read_program
from calib.export.predictor import CalibratedLogits, calibrate, scale_for
from calib.extract.dataset import Dataset
from calib.extract.extraction import Extraction, extract
from calib.extract.pictures import read_image
from calib.extract.torchvision import TorchvisionAdapter
from calib.heads.linear import LinearClassifier
from calib.heads.sigmoid import SigmoidHead
from calib.score import detector_nms, score
from calib.score.detections import Output, write_detections

from ..extract.conftest import tiny_detector
from .conftest import ALL_KINDS, Fit, Fitted

pytest.importorskip("torchvision")
OfKind = Callable[[str], Fitted]


@pytest.fixture
def model(detector_file: Path) -> Any:
    from calib.data.detector import load_detector

    return load_detector(detector_file)[0]


@pytest.fixture(scope="module")
def val(shapes_set: Path) -> Dataset:
    return Dataset.read(shapes_set / "val.json")


@torch.inference_mode()
def detect(model: Any, pixels: Any) -> dict[str, Tensor]:
    """The model's own detections."""
    found: dict[str, Tensor] = model([torch.from_numpy(pixels).permute(2, 0, 1).float() / 255])[0]
    return found


def run(model: Any, dataset: Dataset, images: Path, out: Path) -> Path:
    """LVIS results of the model as torchvision users write them."""
    ids, results = dataset.categories.category_id, []
    for record in dataset.images:
        found = detect(model, read_image(record, images))
        box = found["boxes"].double()
        box[:, 2:] -= box[:, :2]
        for b, label, s in zip(box.tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True):
            results.append({"image_id": record["id"], "category_id": int(ids[label - 1]), "bbox": b, "score": s})
    out.write_text(json.dumps(results))
    return out


@pytest.mark.parametrize(("method", "settings"), [("crt", {}), ("fracal", {})])
def test_a_folded_checkpoint_has_the_ap_of_calib_score(
    fit: Fit,
    train_cache: Cache,
    exact_val_cache: Cache,
    shapes_set: Path,
    val: Dataset,
    detector_file: Path,
    tmp_path: Path,
    method: str,
    settings: dict[str, Any],
) -> None:
    from calib.data.detector import load_detector

    fitted = fit(method, train_cache, exact_val_cache, **settings)
    scored = tmp_path / "scored.parquet"
    write_detections(exact_val_cache, [Output(fitted.artifact, detector_nms(exact_val_cache), scored)])
    folded, module = tmp_path / "folded.safetensors", tmp_path / "module.pt2"
    export(fitted.folder, fitted.cache, folded, Export("torchvision", detector_file))
    export(fitted.folder, fitted.cache, module, Export("module"))
    results = [scored, run(load_detector(folded)[0], val, shapes_set / "images", tmp_path / "folded.json")]
    other: Any = load_detector(detector_file)[0]
    other.roi_heads.box_predictor = read_program(module)
    results.append(run(other, val, shapes_set / "images", tmp_path / "module.json"))
    folders = [tmp_path / f"results-{k}" for k in range(3)]
    ap = [e.summary["AP"] for e in evaluate_files(shapes_set / "val.json", results, folders, Options())]
    assert ap[0] > 0.05
    assert ap[1:] == pytest.approx([ap[0]] * 2, abs=1e-4)  # the last bits of a logit may swap two equal ranks


@pytest.mark.parametrize("kind", [k for k in ALL_KINDS if k != "sigmoid-product"])
def test_every_head_scores_inside_the_live_model(
    of_kind: OfKind, model: Any, val: Dataset, shapes_set: Path, tmp_path: Path, kind: str
) -> None:
    """Replaced in place, and by the exported program; a head on maps takes the place of the box head as well."""
    fitted, cache = of_kind(kind), Cache(of_kind(kind).cache)
    image = next(iter(score(cache, fitted.artifact.head, detector_nms(cache))))
    record = next(r for r in val.images if r["id"] == image.image_id)
    pixels = read_image(record, shapes_set / "images")
    wanted = image.detections

    def check(found: dict[str, Tensor], scale: float) -> None:
        torch.testing.assert_close(scale * found["scores"], torch.from_numpy(wanted.score), atol=1e-5, rtol=1e-3)
        near = torch.from_numpy(wanted.score[:-1] - wanted.score[1:] > 1e-4)  # where the order is sure
        sure = torch.cat([near, near[:0]]) if len(near) == 0 else torch.cat([near[:1], near[1:] & near[:-1]])
        label = torch.from_numpy(wanted.category) + 1
        assert torch.equal(found["labels"][:-1][sure], label[:-1][sure])
        torch.testing.assert_close(
            found["boxes"][:-1][sure], torch.from_numpy(wanted.box)[:-1][sure], atol=1e-2, rtol=1e-4
        )

    metrics = export(fitted.folder, fitted.cache, tmp_path / "module.pt2", Export("module"))
    before = detect(model, pixels)
    undo = calibrate(model, fitted.artifact)
    check(detect(model, pixels), 1.0)
    undo()
    after = detect(model, pixels)
    assert all(torch.equal(before[k], after[k]) for k in before)
    program = read_program(tmp_path / "module.pt2")
    assert float(program.state_dict()["logits.scale"]) == metrics["scale"]
    model.roi_heads.box_predictor = program
    model.roi_heads.score_thresh /= metrics["scale"]
    if metrics["input"] == "maps":
        model.roi_heads.box_head = nn.Flatten()
    check(detect(model, pixels), metrics["scale"])


def bold(cache: Cache, logit: float = 0.0) -> Artifact:
    """Sigmoids that are all near ``logit``: rows sum to half the number of classes."""
    c, d = len(cache.categories), cache.manifest.detector.feature_size
    weight = torch.randn(c, d, generator=torch.Generator().manual_seed(0)) * 0.01
    head = SigmoidHead(LinearClassifier(weight, torch.full((c,), logit))).eval().requires_grad_(False)
    return Artifact(head, HeadInfo.of(cache, "eql", {}, 0, []))


def test_rows_above_one_are_divided_by_one_number(exact_val_cache: Cache) -> None:
    """A softmax cannot give 192 sigmoids of about 0.5; a 128th of each it can, in the same order."""
    artifact = bold(exact_val_cache)
    x = torch.from_numpy(exact_val_cache.features.read(0, 300))
    scores = artifact.head.scores(x)
    scale = scale_for(scores)
    assert scale == 128 and float(scores.sum(dim=1).max()) <= scale
    layer = CalibratedLogits(artifact, scale)
    p = layer(x).softmax(dim=1)
    torch.testing.assert_close(p[:, 1:] * scale, scores, atol=1e-6, rtol=1e-4)  # torchvision: background first
    torch.testing.assert_close(layer.scores(layer(x)), scores, atol=1e-6, rtol=1e-4)
    # With no scale every row is divided by its own sum.
    p = CalibratedLogits(artifact)(x).softmax(dim=1)
    torch.testing.assert_close(p[:, 1:], scores / scores.sum(dim=1, keepdim=True), atol=1e-6, rtol=1e-4)
    assert scale_for(torch.tensor([[0.6, 0.4]])) == 1 and scale_for(torch.tensor([[0.6, 0.5]])) == 2


def test_a_scale_divides_the_threshold_of_the_live_model(exact_val_cache: Cache, model: Any) -> None:
    pixels = np.full((144, 144, 3), 90, np.uint8)
    model.roi_heads.score_thresh = 0.5
    undo = calibrate(model, bold(exact_val_cache))
    assert model.roi_heads.score_thresh == 0.5 / 256  # 192 sigmoids sum to no more
    found = detect(model, pixels)["scores"]
    assert len(found) and float(found.min()) > 0.5 and float(found.max()) < 1
    undo()
    assert model.roi_heads.score_thresh == 0.5


def test_scores_of_zero_and_one_stay_finite(exact_val_cache: Cache) -> None:
    x = torch.from_numpy(exact_val_cache.features.read(0, 3))
    for logit, wanted in ((-200.0, 0.0), (200.0, 1.0)):
        artifact = bold(exact_val_cache, logit)
        z = CalibratedLogits(artifact, 256.0)(x)
        assert bool(z.isfinite().all())
        torch.testing.assert_close(256 * z.softmax(dim=1)[:, 1:], torch.full((3, 192), wanted), atol=1e-4, rtol=0)
        artifact.info.detector["activation"] = "sigmoid"
        z = CalibratedLogits(artifact)(x)
        assert bool(z.isfinite().all()) and z.shape == (3, 192)
        torch.testing.assert_close(z.sigmoid(), torch.full((3, 192), wanted), atol=1e-6, rtol=0)


def test_boxes_per_class_come_out_of_the_program(tmp_path: Path, shapes_set: Path) -> None:
    """The cache leaves background's deltas out; torchvision wants them, and never looks at them."""
    model: Any = tiny_detector(num_classes=193)
    model.roi_heads.score_thresh = 0.0
    adapter = TorchvisionAdapter(model, "tiny", torch.device("cpu"))
    dataset = Dataset.read(shapes_set / "tune.json")
    extract(adapter, dataset, shapes_set / "images", tmp_path / "cache", Extraction(dtype="float32"))
    from calib.training import train

    train("softmax", tmp_path / "cache", tmp_path / "models" / "softmax" / "1")
    metrics = export(tmp_path / "models" / "softmax" / "1", tmp_path / "cache", tmp_path / "m.pt2", Export("module"))
    assert metrics["scale"] == 1
    pixels = read_image(dataset.images[0], shapes_set / "images")
    wanted = detect(model, pixels)
    model.roi_heads.box_predictor = read_program(tmp_path / "m.pt2")
    found = detect(model, pixels)
    assert len(wanted["scores"]) == 50
    torch.testing.assert_close(found["scores"], wanted["scores"], atol=1e-5, rtol=1e-4)
    assert float((found["labels"] == wanted["labels"]).float().mean()) > 0.9
    same = found["labels"] == wanted["labels"]
    torch.testing.assert_close(found["boxes"][same], wanted["boxes"][same], atol=1e-2, rtol=1e-3)


class FastRCNNOutputs(nn.Module):
    """What Detectron2's FastRCNNOutputLayers shows of itself: forward, then ``inference`` on its result, which cuts off
    the last column of sigmoids, too. The real one: ``tests/extract/test_detectron2.py``."""

    def __init__(self, classifier: Any, *, sigmoid: bool = False) -> None:
        super().__init__()
        outputs, d = classifier.weight.shape
        self.cls_score, self.bbox_pred = nn.Linear(d, outputs + sigmoid), nn.Linear(d, 4)
        self.test_score_thresh, self.sigmoid = 0.05, sigmoid

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)

    def inference(self, predictions: tuple[Tensor, Tensor]) -> Tensor:
        scores = (predictions[0].sigmoid() if self.sigmoid else predictions[0].softmax(dim=1))[:, :-1]
        return scores.where(scores > self.test_score_thresh, 0.0)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_duck_type_of_detectron2(fit: Fit, sigmoid_cache: Cache, tmp_path: Path, activation: str) -> None:
    """No Detectron2 can be installed for these tests: a predictor with its interface stands in for it."""
    from ..toy import Toy

    cache = sigmoid_cache if activation == "sigmoid" else Toy().write(tmp_path / "cache")
    fitted = fit("bags", cache, cache)
    model: Any = nn.Module()
    model.roi_heads = nn.Module()
    model.roi_heads.box_head = nn.Identity()
    model.roi_heads.box_predictor = FastRCNNOutputs(cache.classifier, sigmoid=activation == "sigmoid")
    x = torch.from_numpy(cache.features.read(0, 40))
    wanted = fitted.artifact.head.scores(x)
    undo = calibrate(model, fitted.artifact)
    predictor = model.roi_heads.box_predictor
    scale = 0.05 / predictor.test_score_thresh
    predictions = predictor(model.roi_heads.box_head(x))
    assert predictions[1].shape == (40, 4) and scale == (1 if activation == "sigmoid" else 8)
    found = scale * predictor.inference(predictions)
    torch.testing.assert_close(found, wanted.where(wanted > 0.05, 0.0), atol=1e-5, rtol=1e-4)
    undo()
    assert isinstance(model.roi_heads.box_predictor, FastRCNNOutputs)
    assert model.roi_heads.box_predictor.test_score_thresh == 0.05


def test_models_without_such_a_part_are_refused(exact_val_cache: Cache) -> None:
    cascade: Any = nn.Module()
    cascade.roi_heads = nn.Module()
    cascade.roi_heads.box_predictor = nn.ModuleList([nn.Linear(2, 2)])
    for model in (nn.Linear(2, 2), cascade):
        with pytest.raises(UnsupportedError, match="box_predictor of one stage"):
            calibrate(model, bold(exact_val_cache))
