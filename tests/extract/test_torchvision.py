"""The adapter for torchvision: the detector's own numbers, on pictures of any kind, and the model left as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from calib.cache import Cache
from calib.errors import (
    CalibError,
    FormatError,
    InputError,
    MissingFileError,
    NonFiniteError,
    UnknownNameError,
    UnsupportedError,
)
from calib.extract.classes import by_id
from calib.extract.dataset import Dataset
from calib.extract.extraction import extract
from calib.extract.options import Extraction
from calib.extract.torchvision import TorchvisionAdapter, open_detector
from calib.heads.detector import detector_head
from calib.score import detector_nms, score

pytest.importorskip("torchvision")

CPU = torch.device("cpu")
# Odd sizes, one row of pixels, smaller than the smallest anchor, and large ones; neighbours of one size share a batch.
SIZES = [(40, 60), (40, 60), (41, 57), (7, 9), (1, 30), (90, 31), (64, 64), (64, 64), (64, 64), (5, 200)]

Document = Callable[..., dict[str, Any]]
Read = Callable[[dict[str, Any]], Dataset]


def own_detections(model: Any, pixels: list[Any]) -> list[dict[str, torch.Tensor]]:
    with torch.no_grad():
        out: list[dict[str, torch.Tensor]] = model(
            [torch.from_numpy(p).permute(2, 0, 1).float().div_(255) for p in pixels]
        )
    return out


def test_class_specific_boxes_give_the_detectors_own_detections(
    adapter: TorchvisionAdapter, detector: Any, document: Document, read: Read, draw: Callable[..., Any], tmp_path: Path
) -> None:
    dataset = read(document(SIZES))
    extract(adapter, dataset, tmp_path / "images", tmp_path / "c", Extraction(dtype="float32", images_per_shard=4))
    cache = Cache(tmp_path / "c")
    assert not cache.manifest.detector.class_agnostic
    found = list(score(cache, detector_head(cache), detector_nms(cache)))
    pixels = [draw(h, w, i) for i, (h, w) in enumerate(SIZES)]
    batches = [[0, 1], [2], [3], [4], [5], [6, 7], [8], [9]]
    own = [d for b in batches for d in own_detections(detector, [pixels[i] for i in b])]
    assert sum(len(d["scores"]) for d in own) > 150
    assert len({int(c) for d in own for c in d["labels"]}) > 1
    for ours, theirs in zip(found, own, strict=True):
        d = ours.detections
        assert d.category.tolist() == (theirs["labels"] - 1).tolist()
        assert np.array_equal(d.score, theirs["scores"].numpy())
        # Boxes are decoded from the cached features: another summation order may move them by a few ulp.
        assert np.allclose(d.box, theirs["boxes"].numpy(), rtol=0, atol=1e-4)


FORMS = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
)


@pytest.mark.parametrize(("form", "outputs"), [*((f, 5) for f in FORMS), ("fasterrcnn_mobilenet_v3_large_320_fpn", 42)])
def test_every_form_gives_its_own_detections_and_is_left_alone(
    form: str, outputs: int, document: Document, read: Read, draw: Callable[..., Any], tmp_path: Path
) -> None:
    """Of more outputs than categories too, matched by id."""
    from torchvision.models import detection

    torch.set_num_threads(1)
    torch.manual_seed(1)
    sizes = {"min_size": 64, "max_size": 96, "rpn_post_nms_top_n_test": 30, "box_score_thresh": 0.1}
    sizes |= {"rpn_nms_thresh": 0.95, "box_nms_thresh": 0.9, "box_detections_per_img": 30, "rpn_score_thresh": 0.0}
    model = getattr(detection, form)(weights=None, weights_backbone=None, num_classes=outputs, **sizes).eval()
    with torch.no_grad():
        for layer in (model.rpn.head.bbox_pred, model.roi_heads.box_predictor.bbox_pred):
            layer.weight.mul_(5)
        # The signal of an untrained backbone may be so small that beside a bias only its rounding is left.
        for layer in (m for m in model.roi_heads.box_head.modules() if isinstance(m, torch.nn.Linear)):
            layer.bias.zero_()
        features = TorchvisionAdapter(model, form, CPU).rois([draw(48, 70, 0)])[0].features
        assert features.std(axis=0).mean() > 1e-5 * features.mean()
        # Untrained, all features are alike; what differs between them decides.
        classifier = model.roi_heads.box_predictor.cls_score
        classifier.weight.normal_(std=3 / float(features.std(axis=0).mean() * features.shape[1] ** 0.5))
        classifier.bias.copy_(-torch.from_numpy(features.mean(axis=0)) @ classifier.weight.T)
    pixels = [draw(h, w, i) for i, (h, w) in enumerate([(48, 70), (48, 70), (33, 50)])]
    before = own_detections(model, pixels[:2]) + own_detections(model, pixels[2:])
    dataset = read(document([p.shape[:2] for p in pixels]))
    dataset = by_id(dataset, outputs - 1) if outputs > 5 else dataset
    extract(
        TorchvisionAdapter(model, form, CPU), dataset, tmp_path / "images", tmp_path / "c", Extraction(dtype="float32")
    )
    after = own_detections(model, pixels[:2]) + own_detections(model, pixels[2:])
    cache = Cache(tmp_path / "c")
    assert sum(len(d["scores"]) for d in before) >= 15 and len({int(c) for d in before for c in d["labels"]}) > 2
    for ours, own, again in zip(score(cache, detector_head(cache), detector_nms(cache)), before, after, strict=True):
        assert all(torch.equal(own[k], again[k]) for k in own)
        d = ours.detections
        assert d.category.tolist() == (own["labels"] - 1).tolist()
        assert np.array_equal(d.score, own["scores"].numpy())
        assert np.allclose(d.box, own["boxes"].numpy(), rtol=0, atol=1e-3)


def test_columns_are_torchvisions_with_background_moved_last(
    adapter: TorchvisionAdapter, detector: Any, draw: Callable[..., Any]
) -> None:
    (rois,) = adapter.rois([draw(40, 60)])
    predictor = detector.roi_heads.box_predictor
    with torch.no_grad():
        logits, deltas = predictor(torch.from_numpy(rois.features))
    assert np.array_equal(rois.logits, torch.cat([logits[:, 1:], logits[:, :1]], 1).numpy())
    classifier = adapter.classifier()
    assert classifier.box_weight is not None and classifier.box_bias is not None
    assert np.allclose(classifier.logits(rois.features), rois.logits, atol=1e-4)
    ours = rois.features @ classifier.box_weight.T + classifier.box_bias
    assert np.allclose(ours, deltas[:, 4:], atol=1e-4)  # the background's boxes are left out
    assert rois.refined is None and len(rois.proposals) == len(rois.objectness) == 30
    assert np.all(np.diff(rois.objectness) <= 0) and 0 <= rois.objectness.min() <= rois.objectness.max() <= 1


def test_the_detector_is_described_by_its_own_settings(adapter: TorchvisionAdapter) -> None:
    d, s = adapter.detector, adapter.sampling
    assert (d.num_classes, d.feature_size, d.background_first) == (4, 1024, True)
    assert (d.score_threshold, d.nms_iou, d.max_detections) == (0.05, 0.5, 50)
    assert d.box_weights == (10.0, 10.0, 5.0, 5.0) and d.settings == {"min_size": [40], "max_size": 64}
    assert (s.foreground_iou, s.background_iou, s.rows_per_image, s.foreground_share) == (0.5, 0.5, 24, 0.25)


def state(model: Any) -> Any:
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    return hooks, sorted(vars(model.rpn)), model.rpn.post_nms_top_n(), model.rpn.pre_nms_top_n()


def test_the_model_is_left_as_it_was(adapter: TorchvisionAdapter, detector: Any, draw: Callable[..., Any]) -> None:
    before, weights = state(detector), {k: v.clone() for k, v in detector.state_dict().items()}
    pixels = [draw(40, 60), draw(30, 50)]
    own = own_detections(detector, pixels)
    adapter.rois(pixels)
    adapter.rois(pixels, lambda i, boxes, scores, ratio: (boxes[:3], scores[:3]))
    assert state(detector) == before
    assert all(torch.equal(v, weights[k]) for k, v in detector.state_dict().items())
    for a, b in zip(own, own_detections(detector, pixels), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_model_is_left_as_it_was_after_an_exception(
    adapter: TorchvisionAdapter, detector: Any, draw: Callable[..., Any]
) -> None:
    before = state(detector)

    def fail(*_: object) -> Any:
        raise InterruptedError("in the midst")

    with pytest.raises(InterruptedError):
        adapter.rois([draw(40, 60)], fail)
    assert state(detector) == before
    handle = detector.backbone.register_forward_hook(fail)
    with pytest.raises(InterruptedError):
        adapter.rois([draw(40, 60)])
    handle.remove()
    assert state(detector) == before


def test_training_mode_offers_as_many_proposals_as_training_does(
    adapter: TorchvisionAdapter, draw: Callable[..., Any]
) -> None:
    offered = []

    def note(i: int, boxes: Any, scores: Any, ratio: Any) -> Any:
        offered.append((i, len(boxes), ratio))
        return boxes[[4, 2]], scores[[4, 2]]

    (rois,) = adapter.rois([draw(80, 120)], note)
    assert offered == [(0, 40, pytest.approx((0.5, 0.5), rel=0.1))]
    assert len(rois.features) == 2 and rois.objectness[0] < rois.objectness[1]


def test_an_image_without_proposals(adapter: TorchvisionAdapter, detector: Any, draw: Callable[..., Any]) -> None:
    detector.rpn.score_thresh = 2.0
    rois = adapter.rois([draw(40, 60), draw(40, 60, 1)])
    for r in rois:
        assert r.features.shape == (0, 1024) and r.logits.shape == (0, 5) and r.proposals.shape == (0, 4)


def test_a_detector_that_gives_nan_is_named(
    adapter: TorchvisionAdapter, detector: Any, document: Document, read: Read, tmp_path: Path
) -> None:
    with torch.no_grad():
        detector.roi_heads.box_head.fc7.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match="gave NaN or infinite features for image 1"):
        extract(adapter, read(document([(40, 60)])), tmp_path / "images", tmp_path / "c", Extraction())
    with torch.no_grad():
        detector.roi_heads.box_head.fc7.bias[0] = 7e4
    with pytest.raises(NonFiniteError, match="exceed the range of float16") as e:
        extract(adapter, read(document([(40, 60)])), tmp_path / "images", tmp_path / "d", Extraction())
    assert "--dtype float32" in e.value.hint


def test_another_kind_of_model_is_refused() -> None:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    ssd = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    with pytest.raises(UnsupportedError, match="SSD cannot be extracted: it has no rpn"):
        TorchvisionAdapter(ssd, "ssd", CPU)


FACTORY = "torchvision.models.detection:fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.mark.parametrize(
    ("spec", "arguments", "error", "message"),
    [
        ("absent.safetensors", "", MissingFileError, r"absent\.safetensors"),
        ("fasterrcnn_resnet50", "", UnknownNameError, "Did you mean 'fasterrcnn_resnet50_fpn"),
        ("fasterrcnn_resnet50_fpn", "{num_classes: 3}", InputError, "detector arguments are not JSON"),
        ("fasterrcnn_resnet50_fpn", "[3]", InputError, "expected a JSON object"),
        (FACTORY, '{"num_classes": "three", "weights_backbone": null}', InputError, "refused"),
        ("fasterrcnn_resnet50_fpn", '{"num_classes": 3}', InputError, "without weights is an untrained detector"),
        ("absent_package.module:build", "", InputError, "cannot be imported"),
        ("math:absent", "", InputError, "cannot be imported"),
        ("math:floor", '{"x": 3}', InputError, "refused"),
        ("fractions:Fraction", '{"numerator": 3}', InputError, "returned Fraction: expected a torch module"),
        ("retinanet_resnet50_fpn", "", InputError, "without weights is an untrained detector"),
    ],
)
def test_a_detector_that_cannot_be_opened_says_why(
    spec: str, arguments: str, error: type[CalibError], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_detector(spec, CPU, arguments=arguments)


def test_a_checkpoint_takes_no_other_weights_or_settings(detector_file: Path, tmp_path: Path) -> None:
    for options in ({"weights": tmp_path / "absent.pth"}, {"arguments": '{"a": 1}'}):
        with pytest.raises(InputError, match="is a checkpoint with its own weights and settings"):
            open_detector(str(detector_file), CPU, **options)


def test_weights_of_a_factory_are_loaded_or_refused(tmp_path: Path) -> None:
    arguments = json.dumps({"num_classes": 3, "weights_backbone": None})
    tensors = open_detector(FACTORY, CPU, arguments=arguments).model.state_dict()
    tensors["roi_heads.box_predictor.cls_score.bias"] += 1
    save_file(tensors, tmp_path / "w.safetensors")
    torch.save({"model": tensors}, tmp_path / "w.pth")
    expected = tensors["roi_heads.box_predictor.cls_score.bias"].roll(-1).numpy()
    for name in ("w.safetensors", "w.pth"):
        adapter = open_detector(FACTORY, CPU, weights=tmp_path / name, arguments=arguments)
        bias = adapter.classifier().bias
        assert bias is not None and np.array_equal(bias, expected)
    other = json.dumps({"num_classes": 4, "weights_backbone": None})
    with pytest.raises(FormatError, match=r"w\.pth do not fit the detector: Error.* size mismatch for roi_heads"):
        open_detector(FACTORY, CPU, weights=tmp_path / "w.pth", arguments=other)
    for name in ("w.safetensors", "w.pth"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1000])
        with pytest.raises(FormatError, match=name):
            open_detector(FACTORY, CPU, weights=tmp_path / name, arguments=arguments)
    with pytest.raises(MissingFileError, match=r"absent\.pth"):
        open_detector(FACTORY, CPU, weights=tmp_path / "absent.pth", arguments=arguments)


def test_weights_that_carry_code_are_not_run(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "w.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    arguments = json.dumps({"num_classes": 3, "weights_backbone": None})
    with pytest.raises(FormatError, match=r"w\.pth") as e:
        open_detector(FACTORY, CPU, weights=tmp_path / "w.pth", arguments=arguments)
    assert "weights_only" not in str(e.value)  # no advice to run it after all
    assert not (tmp_path / "ran").exists()
