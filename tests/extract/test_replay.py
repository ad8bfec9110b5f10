"""Detections of a detector against those of cached rows; torchvision's that score in a way of their own are found out,
and no head is put into them."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from calib.artifact import Artifact, HeadInfo, load, save
from calib.cache import Cache
from calib.errors import NonFiniteError, ReplayError, UnsupportedError
from calib.export.export import Export, export
from calib.export.predictor import calibrate
from calib.extract.adapter import Own
from calib.extract.dataset import Dataset
from calib.extract.extraction import extract
from calib.extract.options import Extraction
from calib.extract.replay import Difference, Rows, compare
from calib.extract.torchvision import TorchvisionAdapter
from calib.heads.detector import detector_head
from calib.settings import Nms

pytest.importorskip("torchvision")
CPU = torch.device("cpu")
SIZES = [(60, 90), (41, 57)]


def scaled(heads: Any) -> None:
    """Scores are multiplied after the softmax, as by objectness."""

    def postprocess(self: Any, *args: Any) -> Any:
        boxes, scores, labels = type(self).postprocess_detections(self, *args)
        return boxes, [s**0.5 for s in scores], labels

    heads.postprocess_detections = MethodType(postprocess, heads)


def cosine(heads: Any) -> None:
    """As few-shot projects' predictors."""

    def forward(self: Any, x: torch.Tensor) -> Any:
        x = x.flatten(1)
        return 20 * normalize(x) @ normalize(self.cls_score.weight).T, self.bbox_pred(x)

    heads.box_predictor.forward = MethodType(forward, heads.box_predictor)


def warmed(heads: Any) -> None:
    """Another temperature."""

    def postprocess(self: Any, logits: torch.Tensor, *args: Any) -> Any:
        return type(self).postprocess_detections(self, logits / 1.5, *args)

    heads.postprocess_detections = MethodType(postprocess, heads)


def merging(heads: Any) -> None:
    """One class takes the scores of another."""

    def postprocess(self: Any, logits: torch.Tensor, *args: Any) -> Any:
        return type(self).postprocess_detections(self, logits[:, [0, 2, 1, *range(3, logits.shape[1])]], *args)

    heads.postprocess_detections = MethodType(postprocess, heads)


def test_boxes_without_area_count_for_the_cap_of_some_detectors() -> None:
    """Detectron2 leaves them out behind the cap, where they have taken the places of others."""
    none = Own(np.empty(0, np.int64), np.empty(0, np.float32), np.empty((0, 4), np.float32))
    boxes = np.array([[9, 0, 9, 50], [8, 0, 8, 50], [0, 0, 20, 20]], np.float32)
    for score, explained in ((0.4, True), (0.9, False)):
        scores = np.array([[0.5], [0.6], [score]], np.float32)
        kept = Rows(scores, boxes, [(2, 0)], Nms(score_threshold=0.1, nms_iou=0.5, max_detections=2), 1e-30)
        assert compare(none, kept) == (0.0, [] if explained else [Difference(0, None, pytest.approx(score))])


@pytest.mark.parametrize("change", [scaled, cosine, warmed, merging])
def test_a_detector_that_scores_in_its_own_way_is_found_out(
    change: Callable[[Any], None],
    detector: Any,
    document: Callable[..., dict[str, Any]],
    read: Callable[[dict[str, Any]], Dataset],
    tmp_path: Path,
) -> None:
    dataset, images = read(document(SIZES)), tmp_path / "images"
    assert (
        extract(
            TorchvisionAdapter(detector, "torchvision:tiny", CPU), dataset, images, tmp_path / "good", Extraction()
        ).proof["images"]
        == 2
    )
    change(detector.roi_heads)
    adapter = TorchvisionAdapter(detector, "torchvision:tiny", CPU)
    with pytest.raises(ReplayError) as e:
        extract(adapter, dataset, images, tmp_path / "c", Extraction())
    assert "--check-images 0" in e.value.hint and not (tmp_path / "c").exists()
    extract(adapter, dataset, images, tmp_path / "c", Extraction(check_images=0))
    cache = Cache(tmp_path / "c")
    assert cache.manifest.proof == {"images": 0}
    save(tmp_path / "m" / "1", Artifact(detector_head(cache), HeadInfo.of(cache, "softmax", {}, 0, [])))
    torch.save(detector.state_dict(), tmp_path / "d.pth")
    for to, checkpoint in (("torchvision", tmp_path / "d.pth"), ("module", None), ("layer", None)):
        with pytest.raises(UnsupportedError, match="--check-images 0"):
            export(tmp_path / "m" / "1", cache.path, tmp_path / "out.pth", Export(to, checkpoint=checkpoint))
        assert not (tmp_path / "out.pth").exists()
    with pytest.raises(UnsupportedError, match="--check-images 0"):
        calibrate(detector, load(tmp_path / "m" / "1"))
    assert export(tmp_path / "m" / "1", cache.path, tmp_path / "o.pt2", Export("torch"))["largest_difference"] < 1e-5


@pytest.mark.parametrize("layer", ["cls_score", "bbox_pred"])
def test_weights_that_are_not_finite_are_told_as_such(
    detector: Any, document: Callable[..., Any], read: Callable[[Any], Dataset], tmp_path: Path, layer: str
) -> None:
    broken = deepcopy(detector)
    with torch.no_grad():
        getattr(broken.roi_heads.box_predictor, layer).weight[-1, 0] = float("nan")
    dataset, adapter = read(document(SIZES)), TorchvisionAdapter(broken, "torchvision:tiny", CPU)
    with pytest.raises(NonFiniteError) as e:
        extract(adapter, dataset, tmp_path / "images", tmp_path / "c", Extraction())
    assert "tmp" not in str(e.value) and "weights" in e.value.hint and not (tmp_path / "c").exists()


def test_an_export_says_what_was_compared(
    detector: Any,
    document: Callable[..., dict[str, Any]],
    read: Callable[[dict[str, Any]], Dataset],
    tmp_path: Path,
) -> None:
    made = extract(
        TorchvisionAdapter(detector, "torchvision:tiny", CPU),
        read(document(SIZES)),
        tmp_path / "images",
        tmp_path / "c",
        Extraction(),
    )
    cache = Cache(tmp_path / "c")
    save(tmp_path / "m" / "1", Artifact(detector_head(cache), HeadInfo.of(cache, "softmax", {}, 0, [])))
    metrics = export(tmp_path / "m" / "1", cache.path, tmp_path / "o.pt2", Export("layer"))
    assert metrics["proof"] == made.proof_text() and load(tmp_path / "m" / "1").info.detector["proof"] == made.proof
    calibrate(detector, load(tmp_path / "m" / "1"))()
