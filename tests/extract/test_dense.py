"""Dense detectors of torchvision: their own detections from the rows of a cache, and heads back in the detector."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.artifact import Artifact, HeadInfo, save
from calib.cache import Cache
from calib.errors import InputError, SettingError, UnsupportedError
from calib.export.export import Export, export
from calib.extract import frameworks
from calib.extract.dataset import Dataset
from calib.extract.dense import DenseAdapter
from calib.extract.extraction import extract
from calib.extract.options import Extraction
from calib.extract.torchvision import open_detector
from calib.extract.torchvision_dense import TorchvisionDenseAdapter
from calib.heads import blocks
from calib.heads.base import Head
from calib.heads.detector import detector_head
from calib.heads.linear import LinearClassifier, LinearHead
from calib.heads.sigmoid import SigmoidHead
from calib.score import detector_nms, score
from tests.extract.dense_models import CLASSES, KINDS, build

pytest.importorskip("torchvision")

CPU = torch.device("cpu")
# One row of pixels, smaller than the smallest anchor, and large ones; neighbours of one size share a batch.
SIZES = [(40, 60), (40, 60), (41, 57), (7, 9), (1, 30), (90, 31), (64, 64), (64, 64), (5, 200)]
Document = Callable[..., dict[str, Any]]
Read = Callable[[dict[str, Any]], Dataset]


def opened(model: Any, **more: Any) -> TorchvisionDenseAdapter:
    torch.set_num_threads(1)
    return TorchvisionDenseAdapter(model, "torchvision:tiny", CPU, **more)


def own_detections(model: Any, pixels: list[Any]) -> list[dict[str, Any]]:
    with torch.no_grad():
        found = model([torch.from_numpy(p).permute(2, 0, 1).float().div_(255) for p in pixels])
    return [{k: v.numpy() for k, v in one.items()} for one in found]


def unlimited(kind: str) -> dict[str, int]:
    """Settings with which an untrained model leaves nothing out: it finds something everywhere."""
    return {"topk_candidates": 10_000, "detections_per_img": 40}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_give_the_detectors_own_detections(
    kind: str, document: Document, read: Read, draw: Callable[..., Any], tmp_path: Path
) -> None:
    model = build(kind, **unlimited(kind))
    with torch.no_grad():  # no detection has the label of no class, which would take places
        for p in model.head.classification_head.parameters():
            if p.ndim == 1 and len(p) % (CLASSES + 1) == 0 and kind in ("retinanet", "fcos"):
                p.view(-1, CLASSES + 1)[:, 0] = -30
    # A picture of one row, resized to many, has many scores of one value.
    sizes = [s for s in SIZES if min(s) > 1 or not kind.startswith("ssd")]
    extract(opened(model), read(document(sizes)), tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    cache = Cache(tmp_path / "c")
    assert cache.manifest.proof["images"] == 4 and cache.manifest.proof["largest_difference"] < 1e-5
    found = list(score(cache, detector_head(cache), detector_nms(cache)))
    pixels = [draw(h, w, i) for i, (h, w) in enumerate(sizes)]
    batches = [[p for _, p in same] for _, same in groupby(zip(sizes, pixels, strict=True), key=lambda one: one[0])]
    own = [d for batch in batches for d in own_detections(model, batch)]
    assert sum(len(d["scores"]) for d in own) > 100 and len({int(c) for d in own for c in d["labels"]}) > 1
    for ours, theirs in zip(found, own, strict=True):
        d = ours.detections
        assert d.category.tolist() == (theirs["labels"] - 1).tolist()
        assert np.allclose(d.score, theirs["scores"], rtol=0, atol=1e-6)
        assert np.allclose(d.box, theirs["boxes"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_that_the_detector_leaves_out_explain_what_it_does_not_find(
    kind: str, document: Document, read: Read, tmp_path: Path
) -> None:
    """All levels are full, and the label of no class is found, too: the proof passes on what is above the cut."""
    model = build(kind, topk_candidates=40)
    adapter = opened(model)
    extract(adapter, read(document(SIZES)), tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    assert Cache(tmp_path / "c").manifest.proof["detections"] > 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_detector_is_described_and_left_as_it_was(kind: str, draw: Callable[..., Any]) -> None:
    model, pixels = build(kind), [draw(40, 60), draw(40, 60, 1)]
    before, adapter = own_detections(model, pixels), opened(model)
    d, softmax = adapter.detector, kind.startswith("ssd")
    assert (d.num_classes, d.activation, d.background_first) == (CLASSES, "softmax" if softmax else "sigmoid", softmax)
    a, b = adapter.rois(pixels)
    alone = adapter.rois(pixels[1:])[0]
    assert np.allclose(b.features, alone.features, atol=1e-5) and np.allclose(b.refined, alone.refined, atol=1e-3)
    for rois in (a, b):
        assert len(rois.features) <= adapter.most_rows("test") and rois.features.shape[1] == d.feature_size
        assert rois.objectness.min() >= 0 and rois.objectness.max() <= 1
        assert np.allclose(adapter.classifier().logits(rois.features), rois.logits, atol=1e-5)
    for first, again in zip(before, own_detections(model, pixels), strict=True):
        assert all(np.array_equal(first[k], again[k]) for k in first)
    assert "postprocess_detections" not in vars(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_pictures_without_a_candidate_above_the_floor_have_rows_and_no_detections(
    document: Document, read: Read, tmp_path: Path
) -> None:
    model = build("fcos", score_thresh=0.999)
    extract(opened(model), read(document(SIZES[:3])), tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    cache = Cache(tmp_path / "c")
    assert cache.n_rows > 100 and cache.manifest.proof == {"images": 3, "detections": 0, "largest_difference": 0.0}
    assert [len(f.detections.score) for f in score(cache, detector_head(cache), detector_nms(cache))] == [0, 0, 0]


def test_training_rows_are_labelled_by_the_boxes_that_were_decoded(
    document: Document, read: Read, draw: Callable[..., Any], tmp_path: Path
) -> None:
    adapter = opened(build("retinanet"))
    box = adapter.rois([draw(*SIZES[0])])[0]
    scale = SIZES[0][1] / box.net_size[1]
    x1, y1, x2, y2 = (float(v) * scale for v in box.proposals[np.argmax(box.objectness)])
    dataset = read(document(SIZES[:2], [(1, 20, x1, y1, x2 - x1, y2 - y1)]))
    extract(adapter, dataset, tmp_path / "images", tmp_path / "c", Extraction("train", dtype="float32"))
    cache = Cache(tmp_path / "c")
    label, max_iou, is_gt = cache.meta("label", "max_iou", "is_gt")
    assert (label[max_iou >= 0.5] == 1).all() and (label == 1).any() and not is_gt.any()
    assert set(label) == {1, CLASSES} and (max_iou[label == CLASSES] < 0.4).all()


def folded_model(kind: str, adapter: DenseAdapter, cache: Cache, head: Head, tmp_path: Path) -> Any:
    """The model of a checkpoint that ``calib export`` wrote."""
    save(tmp_path / "m" / "1", Artifact(head, HeadInfo.of(cache, "natural", {}, 0, [])))
    torch.save({"model": adapter.model.state_dict()}, tmp_path / "weights.pth")
    wanted = Export("torchvision", checkpoint=tmp_path / "weights.pth")
    done = export(tmp_path / "m" / "1", cache.path, tmp_path / "new.pth", wanted)
    assert done["largest_difference"] <= 1e-5 and "classification_head" in done["layer"]
    model = build(kind, **unlimited(kind))
    model.load_state_dict(torch.load(tmp_path / "new.pth", weights_only=True)["model"])
    return model


@pytest.mark.parametrize("layout", blocks.LAYOUTS)
@pytest.mark.parametrize("kind", ["retinanet", "ssd", "ssdlite"])
def test_a_head_goes_back_into_the_detector(
    kind: str,
    layout: str,
    document: Document,
    read: Read,
    draw: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchvision itself then detects what the head does on the cache, whose rows are all places here."""
    monkeypatch.setattr(blocks, "LAYOUTS", (layout, *(one for one in blocks.LAYOUTS if one != layout)))
    adapter = opened(build(kind, **unlimited(kind)))
    assert adapter.blocks.layout == layout
    extract(adapter, read(document(SIZES[:3])), tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    cache, generator = Cache(tmp_path / "c"), torch.Generator().manual_seed(3)
    own = torch.from_numpy(cache.classifier.weight)
    weight = own + torch.randn(own.shape, generator=generator) * 0.3 / own.shape[1] ** 0.5
    if adapter.detector.activation == "sigmoid":
        weight[0] *= 1.5
    linear = LinearClassifier(weight, torch.randn(len(weight), generator=generator) * 0.5)
    softmax = adapter.detector.activation == "softmax"
    head = LinearHead(linear) if softmax else SigmoidHead(linear)
    model = folded_model(kind, adapter, cache, head, tmp_path)
    found = own_detections(model, [draw(h, w, i) for i, (h, w) in enumerate(SIZES[:2])])
    for ours, theirs in zip(score(cache, head, detector_nms(cache)), found, strict=False):
        d, of_class = ours.detections, theirs["labels"] > 0
        count = int(of_class.sum())
        assert count > 10
        assert np.allclose(d.score[:count], theirs["scores"][of_class], rtol=0, atol=1e-5)
        assert (d.category[:count] == theirs["labels"][of_class] - 1).mean() > 0.9  # a few round otherwise


def test_what_does_not_fit_is_refused_with_the_reason(document: Document, read: Read, tmp_path: Path) -> None:
    adapter = opened(build("fcos"))
    extract(adapter, read(document(SIZES[:2])), tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    cache = Cache(tmp_path / "c")
    save(tmp_path / "m" / "1", Artifact(detector_head(cache), HeadInfo.of(cache, "softmax", {}, 0, [])))
    torch.save(adapter.model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UnsupportedError, match="centredness"):
        export(tmp_path / "m" / "1", cache.path, tmp_path / "n.pth", Export("torchvision", tmp_path / "w.pth"))
    for to in ("module", "layer"):
        with pytest.raises(UnsupportedError, match="dense"):
            export(tmp_path / "m" / "1", cache.path, tmp_path / "n.pt2", Export(to))
    assert adapter.roi_map is None and not adapter.takes_proposals
    with pytest.raises(InputError):
        opened(build("ssd"), first_label=0)
    with pytest.raises(UnsupportedError):
        opened(torch.nn.Linear(1, 1))
    build_ssd = "tests.extract.dense_models:build"
    with pytest.raises(SettingError):
        frameworks.open_detector(f"torchvision:{build_ssd}", CPU, arguments='{"kind": "ssd"}', precision="bf16")
    counted = open_detector(build_ssd, CPU, arguments='{"kind": "retinanet", "first_label": 0}')
    assert counted.detector.num_classes == CLASSES + 1


def test_a_checkpoint_of_another_detector_is_noticed(document: Document, read: Read, tmp_path: Path) -> None:
    adapter = opened(build("ssdlite"))
    extract(adapter, read(document(SIZES[:1])), tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    cache = Cache(tmp_path / "c")
    save(tmp_path / "m" / "1", Artifact(detector_head(cache), HeadInfo.of(cache, "softmax", {}, 0, [])))
    torch.save(build("ssdlite", seed=1).state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match="is not the classifier"):
        export(tmp_path / "m" / "1", cache.path, tmp_path / "n.pth", Export("torchvision", tmp_path / "w.pth"))
