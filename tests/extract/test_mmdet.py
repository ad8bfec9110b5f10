"""The adapter for mmdetection 3, where it is installed with mmcv's operators: the detector's own detections."""

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch

from calib.artifact import Artifact, HeadInfo, load, save
from calib.cache import Cache
from calib.errors import InputError, MissingExtraError, ReplayError, UnknownNameError, UnsupportedError
from calib.export.export import Export, export
from calib.export.graph import read_program
from calib.extract.classes import in_class_order
from calib.extract.dataset import Dataset
from calib.extract.extraction import extract
from calib.extract.mmdet import MMDetAdapter, open_detector
from calib.extract.options import Extraction
from calib.heads.detector import detector_head
from calib.heads.linear import LinearClassifier
from calib.heads.sigmoid import SigmoidHead
from calib.score import detector_nms, score
from calib.training import train

CPU = torch.device("cpu")
CLASSES = 4
SIZES = [(60, 90), (60, 90), (41, 57), (7, 9), (90, 31)]

CONFIG = """
norm = dict(type="GN", num_groups=8, requires_grad=True)
deltas = dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2])
model = dict(
    type="FasterRCNN",
    data_preprocessor=dict(
        type="DetDataPreprocessor", mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4], bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type="ResNet", depth=18, num_stages=4, out_indices=(0, 1, 2, 3), norm_cfg=norm, norm_eval=False, style="pytorch"
    ),
    neck=dict(type="FPN", in_channels=[64, 128, 256, 512], out_channels=32, num_outs=5, norm_cfg=norm),
    rpn_head=dict(
        type="RPNHead", in_channels=32, feat_channels=32,
        anchor_generator=dict(type="AnchorGenerator", scales=[2], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[1.0] * 4),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True), loss_bbox=dict(type="L1Loss"),
    ),
    roi_head=dict(
        type="StandardRoIHead",
        bbox_roi_extractor=dict(
            type="SingleRoIExtractor", out_channels=32, featmap_strides=[4, 8, 16, 32],
            roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=0, use_torchvision=True),
        ),
        bbox_head=dict(
            type="Shared2FCBBoxHead", in_channels=32, fc_out_channels=64, roi_feat_size=7, num_classes=4,
            bbox_coder=deltas, reg_class_agnostic=False, loss_bbox=dict(type="L1Loss"),
            loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
            sampler=dict(type="RandomSampler", num=64, pos_fraction=0.5, add_gt_as_proposals=False),
            allowed_border=-1, pos_weight=-1,
        ),
        rpn_proposal=dict(nms_pre=300, max_per_img=60, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(
            assigner=dict(
                type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, match_low_quality=False
            ),
            sampler=dict(type="RandomSampler", num=32, pos_fraction=0.25, add_gt_as_proposals=True), pos_weight=-1,
        ),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=300, max_per_img=40, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.02, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
    ),
)
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(96, 64), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "ori_shape", "img_shape", "scale_factor")),
]
test_dataloader = dict(dataset=dict(type="CocoDataset", pipeline=pipeline))
"""
CASCADE = """
roi_head = model["roi_head"]
bbox_head = dict(roi_head["bbox_head"], reg_class_agnostic=True)
sizes = ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
roi_head.update(
    type="CascadeRoIHead", num_stages=3, stage_loss_weights=[1, 0.5, 0.25],
    bbox_head=[dict(bbox_head, bbox_coder=dict(deltas, target_stds=stds)) for stds in sizes],
)
model["type"] = "CascadeRCNN"
rcnn = model["train_cfg"]["rcnn"]
model["train_cfg"]["rcnn"] = [
    dict(rcnn, assigner=dict(rcnn["assigner"], pos_iou_thr=iou, neg_iou_thr=iou, min_pos_iou=iou))
    for iou in (0.5, 0.6, 0.7)
]
"""
HTC = """
model["type"] = "HybridTaskCascade"
roi_head.update(
    type="HybridTaskCascadeRoIHead",
    semantic_roi_extractor=dict(
        type="SingleRoIExtractor", out_channels=32, featmap_strides=[8],
        roi_layer=dict(type="RoIAlign", output_size=14, sampling_ratio=0, use_torchvision=True),
    ),
    semantic_head=dict(
        type="FusedSemanticHead", num_ins=5, fusion_level=1, seg_scale_factor=1 / 8, num_convs=1, in_channels=32,
        conv_out_channels=32, num_classes=7, loss_seg=dict(type="CrossEntropyLoss", ignore_index=255),
    ),
)
"""
LOSS = """
for one in (roi_head["bbox_head"] if CASCADED else [model["roi_head"]["bbox_head"]]):
    one.update(CHANGE)
"""


def changing(change: str, cascaded: bool = False) -> str:
    """Python of a config that changes every bbox_head."""
    return LOSS.replace("CASCADED", str(cascaded)).replace("CHANGE", change)


NORMED = 'cls_predictor_cfg=dict(type="NormedLinear", tempearture=20)'
SEESAW = f'loss_cls=dict(type="SeesawLoss", num_classes=4), {NORMED}'
# Name -> what is added to the config, the activation, and the number of stages.
FORMS = {
    "softmax": ("", "softmax", 1),
    "agnostic": (changing("reg_class_agnostic=True"), "softmax", 1),
    "normed": (changing(NORMED), "softmax", 1),
    "seesaw": (changing(SEESAW), "seesaw", 1),
    "sigmoid loss": (changing('loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True)'), "softmax", 1),
    "sigmoid": (
        changing('loss_cls=dict(type="CrossEntropyCustomLoss", use_sigmoid=True, num_classes=4)'),
        "sigmoid",
        1,
    ),
    "cascade": (CASCADE, "softmax", 3),
    "cascade, boxes per class": (CASCADE + changing("reg_class_agnostic=False", True), "softmax", 3),
    "cascade, seesaw": (CASCADE + changing(SEESAW, True), "seesaw", 3),
    "htc": (CASCADE + HTC, "softmax", 3),
    "htc, seesaw": (CASCADE + HTC + changing(SEESAW, True), "seesaw", 3),
}


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., MMDetAdapter]:
    """``opened(form)``: a detector with random weights, by its config (``more`` added) and a file of weights."""
    pytest.importorskip("mmcv.ops")
    pytest.importorskip("mmdet")
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    def make(form: str, more: str = "") -> MMDetAdapter:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        (tmp_path / "config.py").write_text(CONFIG + FORMS[form][0] + more)
        register_all_modules()
        config = Config.fromfile(str(tmp_path / "config.py"))
        model: Any = MODELS.build(config.model)
        with torch.no_grad():
            heads = model.roi_head.bbox_head
            heads = list(heads) if isinstance(heads, torch.nn.ModuleList) else [heads]
            for layer in (model.rpn_head.rpn_cls, *(h.fc_cls for h in heads)):
                layer.weight.normal_(std=0.5)
            for head in heads:
                head.fc_reg.weight.normal_(std=0.1)
        torch.save({"state_dict": model.state_dict(), "meta": {"epoch": 1}}, tmp_path / "w.pth")
        return open_detector(str(tmp_path / "config.py"), CPU, weights=tmp_path / "w.pth")

    return make


def own_detections(adapter: MMDetAdapter, pixels: list[Any]) -> list[Any]:
    given = [adapter.pipeline({"img": np.ascontiguousarray(p[:, :, ::-1]), "img_id": 0}) for p in pixels]
    with torch.no_grad():
        found = adapter.model.test_step({k: [g[k] for g in given] for k in ("inputs", "data_samples")})
    return [f.pred_instances for f in found]


@pytest.mark.parametrize("form", FORMS)
def test_replaying_the_cache_gives_the_detectors_own_detections(
    form: str, opened: Callable[..., MMDetAdapter], document: Any, read: Any, draw: Any, tmp_path: Path
) -> None:
    adapter = opened(form)
    pixels = [draw(h, w, i) for i, (h, w) in enumerate(SIZES)]
    batches = [[0, 1], [2], [3], [4]]
    own = [d for b in batches for d in own_detections(adapter, [pixels[i] for i in b])]
    dataset: Dataset = read(document(SIZES))
    extract(adapter, dataset, tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    cache = Cache(tmp_path / "c")
    detector, (change, activation, stages) = cache.manifest.detector, FORMS[form]
    assert (detector.activation, detector.stages) == (activation, stages)
    assert detector.average == ("logits" if stages > 1 else "probabilities")
    assert detector.head_type == ("cosine" if NORMED in change else "linear")
    for stage in cache.stages:
        assert stage.logits is not None
        features, logits = (m.read(0, cache.n_rows) for m in (stage.features, stage.logits))
        assert np.allclose(stage.classifier.logits(features), logits, atol=1e-3)
    assert sum(len(o) for o in own) > 50
    for ours, theirs in zip(score(cache, detector_head(cache), detector_nms(cache)), own, strict=True):
        d = ours.detections
        assert d.category.tolist() == theirs.labels.tolist()
        assert np.allclose(d.score, theirs.scores.numpy(), rtol=0, atol=1e-6)
        assert np.allclose(d.box, theirs.bboxes.numpy(), rtol=0, atol=1e-2)
    again = [d for b in batches for d in own_detections(adapter, [pixels[i] for i in b])]
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(own, again, strict=True))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in adapter.model.roi_head.modules())


def test_detectors_that_score_in_their_own_way_are_found_out(
    opened: Callable[..., MMDetAdapter], document: Any, read: Any, tmp_path: Path
) -> None:
    """A temperature, another order of classes, cosines: heads and layers that override a method."""

    def tempered(self: Any, *, cls_score: torch.Tensor, **more: Any) -> Any:
        return type(self)._predict_by_feat_single(self, cls_score=cls_score / 1.5, **more)

    def reordered(self: Any, *, cls_score: torch.Tensor, **more: Any) -> Any:
        return type(self)._predict_by_feat_single(self, cls_score=cls_score[:, [1, 0, 2, 3, 4]], **more)

    def cosine(self: Any, x: torch.Tensor) -> torch.Tensor:
        normal = torch.nn.functional.normalize
        return 20 * normal(x) @ normal(self.weight).T

    for k, (name, change) in enumerate(
        [("_predict_by_feat_single", tempered), ("_predict_by_feat_single", reordered), ("forward", cosine)]
    ):
        adapter = opened("softmax")
        head = adapter.model.roi_head.bbox_head
        owner = head.fc_cls if name == "forward" else head
        setattr(owner, name, MethodType(change, owner))
        with pytest.raises(ReplayError, match="the detector itself gives"):
            extract(adapter, read(document(SIZES)), tmp_path / "images", tmp_path / f"c{k}", Extraction())


def test_training_rows_are_those_of_training(
    opened: Callable[..., MMDetAdapter], document: Any, read: Any, draw: Any, tmp_path: Path
) -> None:
    adapter = opened("softmax")
    assert adapter.sampling.rows_per_image == 32
    offered = []

    def note(i: int, boxes: Any, scores: Any, ratio: Any) -> Any:
        offered.append(len(boxes))
        return boxes[:0], scores[:0]

    (rois,) = adapter.rois([draw(60, 90)], note)
    assert offered == [60] and rois.features.shape == (0, 64) and rois.logits.shape == (0, CLASSES + 1)
    dataset = read(document(SIZES[:2], [(1, 30, 5, 5, 40, 30), (2, 10, 10, 10, 30, 30)]))
    extract(adapter, dataset, tmp_path / "images", tmp_path / "c", Extraction("train", dtype="float32"))
    label, is_gt = Cache(tmp_path / "c").meta("label", "is_gt")
    assert is_gt.sum() == 2 and sorted(label[is_gt]) == [0, 2]


def test_a_head_trained_on_a_cascade_scores_like_the_detector_it_is_folded_into(
    opened: Callable[..., MMDetAdapter], document: Any, read: Any, draw: Any, tmp_path: Path
) -> None:
    adapter = opened("cascade")
    dataset = read(document(SIZES[:2], [(1, 30, 5, 5, 40, 30), (2, 10, 10, 10, 30, 30)]))
    for mode in ("test", "train"):
        extract(adapter, dataset, tmp_path / "images", tmp_path / mode, Extraction(mode, dtype="float32"))
    settings = {"steps": 5, "lr": 0.5, "rows_per_step": 16}
    head = train("crt", tmp_path / "train", tmp_path / "crt" / "1", settings).head
    wanted = Export("mmdet", checkpoint=tmp_path / "w.pth")
    export(tmp_path / "crt" / "1", tmp_path / "test", tmp_path / "new.pth", wanted)
    before = own_detections(adapter, [draw(60, 90)])[0].scores
    adapter.model.load_state_dict(torch.load(tmp_path / "new.pth", weights_only=True)["state_dict"])
    own = own_detections(adapter, [draw(*SIZES[0]), draw(*SIZES[1], 1)])
    assert not torch.equal(before, own[0].scores)
    cache = Cache(tmp_path / "test")
    for ours, theirs in zip(score(cache, head, detector_nms(cache)), own, strict=True):
        assert ours.detections.category.tolist() == theirs.labels.tolist()
        assert np.allclose(ours.detections.score, theirs.scores.numpy(), atol=1e-6)


def test_rows_of_a_cascade_are_matched_by_the_iou_of_their_stage(
    opened: Callable[..., MMDetAdapter], document: Any, read: Any, draw: Any, tmp_path: Path
) -> None:
    adapter = opened("htc")
    assert (adapter.sampling.foreground_iou, adapter.sampling.next_ious) == (0.5, (0.6, 0.7))
    assert adapter.detector.settings == {"stage_loss_weights": [1, 0.5, 0.25]}
    dataset = read(document(SIZES[:2], [(1, 30, 5, 5, 40, 30), (2, 10, 10, 10, 30, 30)]))
    extract(adapter, dataset, tmp_path / "images", tmp_path / "c", Extraction("train", dtype="float32"))
    stages = Cache(tmp_path / "c").stages
    for iou, stage in zip((0.5, 0.6, 0.7), stages, strict=True):
        label, found, is_gt = stage.meta("label", "max_iou", "is_gt")
        known = label >= 0
        assert ((label < CLASSES)[known] == (found >= iou)[known]).all()
        assert is_gt.sum() == (2 if stage is stages[0] else 0)
    (none,) = adapter.rois([draw(60, 90)], lambda i, boxes, scores, ratio: (boxes[:0], scores[:0]))
    assert [s.logits.shape for s in (none, *none.next)] == [(0, CLASSES + 1)] * 3


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_a_program_in_the_place_of_fc_cls_gives_the_detections_of_calib_score(
    form: str, opened: Callable[..., MMDetAdapter], document: Any, read: Any, draw: Any, tmp_path: Path
) -> None:
    adapter = opened(form)
    extract(adapter, read(document(SIZES[:2])), tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    cache = Cache(tmp_path / "c")
    weight = torch.randn(CLASSES, 64, generator=torch.Generator().manual_seed(1)) * 0.2
    made = SigmoidHead(LinearClassifier(weight, torch.zeros(CLASSES)))
    save(tmp_path / "m" / "1", Artifact(made, HeadInfo.of(cache, "eql", {}, 0, [])))
    head = load(tmp_path / "m" / "1").head
    metrics = export(tmp_path / "m" / "1", tmp_path / "c", tmp_path / "l.pt2", Export("layer"))
    assert metrics["replaces"] == "bbox_head.fc_cls" and metrics["scale"] == (4 if form == "softmax" else 1)
    adapter.model.roi_head.bbox_head.fc_cls = read_program(tmp_path / "l.pt2")
    adapter.model.roi_head.test_cfg.score_thr /= metrics["scale"]
    own = own_detections(adapter, [draw(*SIZES[0]), draw(*SIZES[1], 1)])
    for ours, theirs in zip(score(cache, head, detector_nms(cache)), own, strict=True):
        d = ours.detections
        assert len(d.category) > 20 and d.category.tolist() == theirs.labels.tolist()
        assert np.allclose(d.score, metrics["scale"] * theirs.scores.numpy(), rtol=1e-5, atol=0)
    with pytest.raises(UnsupportedError, match="which detectors of mmdet do not have"):
        export(tmp_path / "m" / "1", tmp_path / "c", tmp_path / "m.pt2", Export("module"))


def test_classes_are_numbered_as_by_its_own_data_set(
    opened: Callable[..., MMDetAdapter], document: Any, read: Any, draw: Any, tmp_path: Path
) -> None:
    """In the json's order; a head, detections and an export follow without being told."""
    from mmdet.datasets import CocoDataset

    adapter = opened("softmax")
    given = document(SIZES[:2], [(1, 30, 5, 5, 40, 30), (2, 10, 10, 10, 30, 30), (1, 20, 30, 10, 20, 20)])
    given["categories"] = [given["categories"][k] for k in (2, 0, 3, 1)]
    dataset = read(given)
    names = tuple(sorted(c["name"] for c in given["categories"]))  # their order is not theirs
    where = {"ann_file": str(tmp_path / "a.json"), "data_prefix": {"img": ""}}
    own = CocoDataset(**where, metainfo={"classes": names}, pipeline=[], test_mode=True)
    own.full_init()
    assert list(own.cat_ids) == [30, 10, 40, 20]
    for mode in ("test", "train"):
        extract(adapter, dataset, tmp_path / "images", tmp_path / mode, Extraction(mode, dtype="float32"))
    cache = Cache(tmp_path / "test")
    assert cache.categories.category_id.tolist() == [30, 10, 40, 20]
    label, is_gt, image = Cache(tmp_path / "train").meta("label", "is_gt", "image_id")
    theirs = [(d["img_id"], i["bbox_label"]) for d in own.load_data_list() for i in d["instances"]]
    assert sorted(zip(image[is_gt].tolist(), label[is_gt].tolist(), strict=True)) == sorted(theirs)
    assert np.array_equal(cache.classifier.weight, adapter.model.roi_head.bbox_head.fc_cls.weight.detach().numpy())
    for ours, found in zip(
        score(cache, detector_head(cache), detector_nms(cache)),
        own_detections(adapter, [draw(*SIZES[0]), draw(*SIZES[1], 1)]),
        strict=True,
    ):
        assert ours.detections.category.tolist() == found.labels.tolist()


NAMES = tuple(f"kind {c}" for c in range(CLASSES))
METAINFO = "\ntest_dataloader['dataset']['metainfo'] = dict(classes=" + repr(NAMES[::-1]) + ")"


def test_names_of_classes_are_compared_with_the_json(
    opened: Callable[..., MMDetAdapter], document: Any, read: Any, tmp_path: Path
) -> None:
    """Those of the checkpoint's ``meta``, else of the config; an order that contradicts the json's is refused."""
    opened("softmax")
    state = torch.load(tmp_path / "w.pth", weights_only=True)["state_dict"]
    dataset = read(document(SIZES[:1]))

    def order(meta: Any, arguments: str = "") -> list[int]:
        torch.save({"meta": meta, "state_dict": state}, tmp_path / "named.pth")
        adapter = open_detector(str(tmp_path / "config.py"), CPU, weights=tmp_path / "named.pth", arguments=arguments)
        return in_class_order(adapter, dataset).categories.category_id.tolist()

    ids = [10, 20, 30, 40]
    assert order({}) == order({"dataset_meta": {"CLASSES": NAMES}}) == order({"CLASSES": list(NAMES)}) == ids
    turned = {"dataset_meta": {"classes": NAMES[::-1], "palette": None}}
    with pytest.raises(InputError, match="'kind 3' would be category 10") as e:
        order(turned)
    assert "class_order" in e.value.hint
    assert order(turned, '{"class_order": "names"}') == ids[::-1]
    assert order(turned, '{"class_order": "json"}') == order(turned, '{"class_order": "id"}') == ids
    with pytest.raises(InputError, match="calls a class 'other'"):
        order({"dataset_meta": {"classes": (*NAMES[:3], "other")}})
    with pytest.raises(InputError, match="has names for 3 classes"):
        order({"dataset_meta": {"classes": NAMES[:3]}})
    with pytest.raises(InputError, match="names classes"):
        order({}, '{"class_order": "names"}')
    with pytest.raises(UnknownNameError):
        order({}, '{"class_order": "alphabet"}')
    # LVIS's own data set does not look at names, one of which it misspells.
    lvis = '{"test_dataloader.dataset.type": "LVISV1Dataset"}'
    assert order({"dataset_meta": {"classes": (*NAMES[:3], "kind 3 misspelt")}}, lvis) == ids
    opened("softmax", METAINFO)
    with pytest.raises(InputError, match="'kind 3' would be category 10"):
        order({})


def test_a_checkpoint_of_a_training_is_read_and_exported(
    opened: Callable[..., MMDetAdapter], document: Any, read: Any, tmp_path: Path
) -> None:
    """As mmengine writes it: with message hub and optimizer. What is exported mmengine can load."""
    from mmengine.logging import MessageHub
    from mmengine.runner import load_checkpoint

    adapter = opened("softmax")
    hub = MessageHub.get_instance("calib test")
    hub.update_scalar("train/loss", 0.5, count=2)
    hub.update_info("last", np.float64(3.5))
    optimizer = torch.optim.AdamW(adapter.model.parameters())
    state = {"meta": {"epoch": 12, "dataset_meta": {"classes": NAMES}}, "state_dict": adapter.model.state_dict()}
    torch.save(
        state | {"message_hub": hub.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "epoch_12.pth"
    )
    again = open_detector(str(tmp_path / "config.py"), CPU, weights=tmp_path / "epoch_12.pth")
    assert again.classes.names == NAMES
    extract(again, read(document(SIZES[:1])), tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    cache = Cache(tmp_path / "c")
    save(tmp_path / "m" / "1", Artifact(detector_head(cache), HeadInfo.of(cache, "softmax", {}, 0, [])))
    wanted = Export("mmdet", checkpoint=tmp_path / "epoch_12.pth")
    export(tmp_path / "m" / "1", tmp_path / "c", tmp_path / "new.pth", wanted)
    loaded = load_checkpoint(adapter.model, str(tmp_path / "new.pth"), map_location="cpu")
    assert loaded["meta"]["dataset_meta"] == {"classes": NAMES} and "message_hub" not in loaded


def test_what_is_not_supported_says_why(opened: Callable[..., MMDetAdapter], tmp_path: Path) -> None:
    opened("softmax")
    focal = '{"model.roi_head.bbox_head.loss_cls": {"_delete_": true, "type": "FocalCustomLoss", "num_classes": 4}}'
    state = torch.load(tmp_path / "w.pth", weights_only=True)["state_dict"]
    for part in ("weight", "bias"):
        state[f"roi_head.bbox_head.fc_cls.{part}"] = state[f"roi_head.bbox_head.fc_cls.{part}"][:CLASSES]
    torch.save(state, tmp_path / "f.pth")
    with pytest.raises(UnsupportedError, match=r"FocalCustomLoss makes scores of its own \(4 outputs\)"):
        open_detector(str(tmp_path / "config.py"), CPU, weights=tmp_path / "f.pth", arguments=focal)
    with pytest.raises(InputError, match="untrained"):
        open_detector(str(tmp_path / "config.py"), CPU)
    cascade = opened("cascade")
    heads = cascade.model.roi_head
    heads.__class__ = type("OtherRoIHead", (type(heads),), {})
    with pytest.raises(UnsupportedError, match="OtherRoIHead is no cascade that calib knows"):
        MMDetAdapter(cascade.model, cascade.pipeline, "other", CPU)


def test_without_mmdetection_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mmcv.ops", None)
    with pytest.raises(MissingExtraError, match="mmdetection 3") as e:
        open_detector("config.py", CPU)
    assert "mim install" in e.value.hint
