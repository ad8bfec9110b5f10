"""Masks of Detectron2 and mmdetection, where they are installed: the detectors' own, for detections as they come."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from calib.extract.adapter import MASKS_AT_ONCE
from calib.extract.masks import run_length
from calib.score.detections import DETECTIONS_SCHEMA

from . import test_detectron2 as detectron2
from . import test_mmdet as mmdet

opened = mmdet.opened

# The first two are one batch; the last is not resized.
SIZES = [(60, 90), (60, 90), (41, 57), (7, 9), (90, 31), (200, 300), (64, 96)]
BATCHES = [[0, 1], [2], [3], [4], [5], [6]]

D2_MASKS: list[Any] = [
    *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
    *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 7),
]
D2_AGNOSTIC: list[Any] = ["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True]
D2_FORMS: dict[str, list[Any]] = {
    "standard": [],
    "standard, one mask": D2_AGNOSTIC,
    "cascade": detectron2.CASCADE,
    "cascade, one mask": [*detectron2.CASCADE, *D2_AGNOSTIC],
}
MM_MASKS = """
mask_head = dict(
    type="FCNMaskHead", num_convs=1, in_channels=32, conv_out_channels=8, num_classes=4, class_agnostic=AGNOSTIC,
    loss_mask=dict(type="CrossEntropyLoss", use_mask=True),
)
model["roi_head"].update(
    mask_head=mask_head, mask_roi_extractor=dict(model["roi_head"]["bbox_roi_extractor"]),
)
model["test_cfg"]["rcnn"]["mask_thr_binary"] = 0.5
"""
MM_HTC = """
mask_head.update(type="HTCMaskHead", conv_out_channels=32)
model["roi_head"]["mask_head"] = [dict(mask_head, with_conv_res=k > 0) for k in range(3)]
"""
MM_NO_SEMANTIC = "roi_head.update(semantic_roi_extractor=None, semantic_head=None)\n"
MM_SPECIFIC, MM_AGNOSTIC = (MM_MASKS.replace("AGNOSTIC", str(a)) for a in (False, True))
# Name -> the form of the detector, and what is added to its config.
MM_FORMS = {
    "standard": ("softmax", MM_SPECIFIC),
    "standard, one mask": ("softmax", MM_AGNOSTIC),
    "cascade": ("cascade", MM_SPECIFIC),
    "cascade, one mask": ("cascade", MM_AGNOSTIC),
    "htc": ("htc", MM_SPECIFIC + MM_HTC),
    "htc, one mask": ("htc", MM_AGNOSTIC + MM_HTC),
    "htc, no semantic branch": ("htc", MM_SPECIFIC + MM_HTC + MM_NO_SEMANTIC),
}


class Case(NamedTuple):
    """``spec`` and ``weights`` open the adapter on the command line; ``own(pixels)`` are the model's own detections."""

    adapter: Any
    spec: str
    weights: Path
    own: Callable[[list[Any]], list["Own"]]


class Own(NamedTuple):
    boxes: Any
    scores: Any
    categories: Any
    masks: Any


def spread(layer: Any) -> None:
    """Untrained masks are grey, or of one sign."""
    weight = layer.weight.normal_()
    weight.sub_(weight.mean(dim=1, keepdim=True))


def of_detectron2(form: str, folder: Path) -> Case:
    model = detectron2.tiny(*D2_MASKS, *D2_FORMS[form])
    with torch.no_grad():
        spread(model.roi_heads.mask_head.predictor)
    (folder / "model.yaml").write_text(detectron2.settings(*D2_MASKS, *D2_FORMS[form]).dump())
    torch.save({"model": model.state_dict()}, folder / "w.pth")

    def own(pixels: list[Any]) -> list[Own]:
        found = detectron2.own_detections(model, pixels)
        return [Own(*(x.numpy() for x in (d.pred_boxes.tensor, d.scores, d.pred_classes, d.pred_masks))) for d in found]

    return Case(detectron2.adapted(model), f"detectron2:{folder / 'model.yaml'}", folder / "w.pth", own)


def of_mmdet(form: str, folder: Path, opened: Callable[..., Any]) -> Case:
    adapter = opened(*MM_FORMS[form])
    head = adapter.model.roi_head.mask_head
    with torch.no_grad():
        for h in head if isinstance(head, torch.nn.ModuleList) else [head]:
            spread(h.conv_logits)
    torch.save({"state_dict": adapter.model.state_dict()}, folder / "w.pth")

    def own(pixels: list[Any]) -> list[Own]:
        found = mmdet.own_detections(adapter, pixels)
        return [Own(*(x.numpy() for x in (d.bboxes, d.scores, d.labels, d.masks))) for d in found]

    return Case(adapter, f"mmdet:{folder / 'config.py'}", folder / "w.pth", own)


@pytest.fixture
def made(request: Any, tmp_path: Path) -> Callable[[str], Case]:
    """``made("FRAMEWORK: FORM")``."""

    def make(name: str) -> Case:
        framework, form = name.split(": ")
        if framework == "detectron2":
            return of_detectron2(form, tmp_path)
        return of_mmdet(form, tmp_path, request.getfixturevalue("opened"))

    return make


@pytest.mark.parametrize("name", [*(f"detectron2: {f}" for f in D2_FORMS), *(f"mmdet: {f}" for f in MM_FORMS)])
def test_the_masks_are_the_detectors_own(name: str, made: Callable[[str], Case], draw: Callable[..., Any]) -> None:
    case = made(name)
    pixels = [draw(h, w, i) for i, (h, w) in enumerate(SIZES)]
    own = [d for batch in BATCHES for d in case.own([pixels[i] for i in batch])]
    branch = case.adapter.mask_branch
    assert branch is not None
    differing = []
    for image, d in zip(pixels, own, strict=True):
        found = list(branch(image, d.boxes, d.categories.astype(np.int64)))
        assert len(found) == len(d.boxes) > MASKS_AT_ONCE
        differing.append(sum(int((a != b).sum()) for a, b in zip(found, d.masks, strict=True)))
    # Boxes go from the network's pixels to the picture's and back: a pixel on the edge of a mask may turn.
    assert differing[-1] == 0 and sum(differing) <= 2e-4 * sum(d.masks.sum() for d in own)
    assert np.mean([m.any() for d in own for m in d.masks]) > 0.3
    assert list(branch(pixels[0], np.empty((0, 4), np.float32), np.empty(0, np.int64))) == []


@pytest.mark.parametrize("name", ["detectron2: standard", "detectron2: cascade", "mmdet: standard", "mmdet: htc"])
def test_rescored_detections_lead_to_mask_ap(
    name: str, made: Callable[[str], Case], document: Any, draw: Any, calib: Any, tmp_path: Path
) -> None:
    """Ground truth is the detector's own masks; the scores are others, and so is their order."""
    case, content = made(name), document(SIZES[1:4])
    rows, objects = [], []
    for i, size in enumerate(SIZES[1:4], start=1):
        (d,) = case.own([draw(*size, i - 1)])
        for k in np.flatnonzero(d.masks.any(axis=(1, 2))).tolist():
            plain = {"image_id": i, "category_id": 10 * (int(d.categories[k]) + 1), "bbox": [0, 0, 1, 1]}
            rows.append([i, plain["category_id"], float(1 - d.scores[k]), *d.boxes[k].tolist(), k])
            mask = {"segmentation": run_length(d.masks[k]), "area": int(d.masks[k].sum())}
            objects.append({"id": len(objects) + 1} | plain | mask)
    (tmp_path / "val.json").write_text(json.dumps(content | {"annotations": objects}))
    pq.write_table(pa.table(list(zip(*rows, strict=True)), schema=DETECTIONS_SCHEMA), tmp_path / "d.parquet")
    common = ["--annotations", tmp_path / "val.json"]
    done = calib(
        *("masks", "--detector", case.spec, "--weights", case.weights, "--detections", tmp_path / "d.parquet"),
        *(*common, "--images", tmp_path / "images", "--out", tmp_path / "m.json", "--json"),
    )
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads((tmp_path / "m.json").read_text())
    assert [(r["image_id"], r["category_id"], r["score"]) for r in found] == [
        (r[0], r[1], np.float32(r[2])) for r in rows
    ]
    done = calib(
        *("evaluate", "--iou-type", "segm", "--style", "coco", *common, "--results", tmp_path / "m.json"),
        *("--out", tmp_path / "r", "--json"),
    )
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads(done.stdout)["AP"] > 0.99


def test_masks_of_another_kind_are_refused(made: Callable[[str], Case]) -> None:
    case = made("mmdet: standard")
    from mmdet.models import roi_heads

    heads = case.adapter.model.roi_head
    for kind in (roi_heads.MaskScoringRoIHead, roi_heads.PointRendRoIHead):
        heads.__class__ = kind
        assert case.adapter.mask_branch is None
    heads.__class__, heads.mask_head = roi_heads.StandardRoIHead, None
    assert case.adapter.mask_branch is None


def test_mask_heads_of_another_kind_are_refused(made: Callable[[str], Case]) -> None:
    case = made("detectron2: standard")
    heads = case.adapter.model.roi_heads
    kind = type(heads.mask_head)
    heads.mask_head.__class__ = type("PointRendMaskHead", (kind,), {"forward": lambda self, *a: a})
    assert case.adapter.mask_branch is None
    heads.mask_head.__class__ = kind
    assert case.adapter.mask_branch is not None
    heads.mask_on = False
    assert case.adapter.mask_branch is None


def test_a_box_without_area_has_an_empty_mask(made: Callable[[str], Case], draw: Any) -> None:
    branch = made("detectron2: standard").adapter.mask_branch
    assert branch is not None
    boxes = np.float32([[2, 2, 50, 40], [9, 9, 9, 30], [2, 2, 50, 40]])
    first, empty, last = branch(draw(60, 90), boxes, np.array([2, 2, 2]))
    assert first.any() and not empty.any() and np.array_equal(first, last)
