"""A tiny random torchvision detector with class-specific boxes, and data sets of a few made-up pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from calib.extract.dataset import Dataset
from calib.extract.torchvision import TorchvisionAdapter

CLASSES = 4


def tiny_detector(seed: int = 0, num_classes: int = CLASSES + 1) -> Any:
    """torchvision's FasterRCNN: one level of stride 8, boxes per class, 40 to 64 network pixels."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(seed)
    backbone: Any = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 4, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, 2, 1), torch.nn.ReLU()
    )
    backbone.out_channels = 8
    model: Any = FasterRCNN(
        backbone,
        num_classes,
        rpn_anchor_generator=AnchorGenerator(((12, 30),), ((0.5, 1.0, 2.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        min_size=40,
        max_size=64,
        rpn_pre_nms_top_n_train=60,
        rpn_post_nms_top_n_train=40,
        rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_test=30,
        box_score_thresh=0.05,
        box_detections_per_img=50,
        box_batch_size_per_image=24,
    )
    # Untrained scores and offsets are all alike; spread them so that every step has something to decide.
    with torch.no_grad():
        model.rpn.head.cls_logits.weight.mul_(20)
        model.rpn.head.bbox_pred.weight.mul_(20)
        model.roi_heads.box_predictor.cls_score.weight.mul_(6)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(8)
    return model.eval()


@pytest.fixture
def detector() -> Any:
    pytest.importorskip("torchvision")
    torch.set_num_threads(1)
    return tiny_detector()


@pytest.fixture
def adapter(detector: Any) -> TorchvisionAdapter:
    return TorchvisionAdapter(detector, "tiny", torch.device("cpu"))


def picture(height: int, width: int, seed: int = 0) -> Any:
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def draw() -> Callable[..., Any]:
    """``draw(height, width, seed=0)``: a picture of noise, [height, width, 3]."""
    return picture


@pytest.fixture
def document(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``document(sizes, boxes=...)``: an LVIS document of noise pictures, which lie under ``images/``; ``boxes`` are
    (image number, category id, x, y, width, height)."""

    def make(sizes: list[tuple[int, int]], boxes: list[tuple[float, ...]] | None = None) -> dict[str, Any]:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        images = []
        for i, (height, width) in enumerate(sizes):
            Image.fromarray(picture(height, width, i)).save(folder / f"{i + 1}.png")
            images.append({"id": i + 1, "file_name": f"{i + 1}.png", "height": height, "width": width})
        annotations = [
            {"id": k + 1, "image_id": int(image), "category_id": int(category), "bbox": box, "area": box[2] * box[3]}
            for k, (image, category, *box) in enumerate(boxes or [])
        ]
        categories = [{"id": 10 * (c + 1), "name": f"kind {c}"} for c in range(CLASSES)]
        return {"images": images, "annotations": annotations, "categories": categories}

    return make


@pytest.fixture
def read(tmp_path: Path) -> Callable[[dict[str, Any]], Dataset]:
    """``read(document)``: the data set of a document."""

    def dataset(document: dict[str, Any]) -> Dataset:
        (tmp_path / "a.json").write_text(json.dumps(document))
        return Dataset.read(tmp_path / "a.json")

    return dataset
