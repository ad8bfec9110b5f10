"""Detectron2 as projects use it: subclasses that score otherwise, the model zoo's files, configs of every kind."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch

from calib.cache import Cache
from calib.errors import FormatError, InputError, ReplayError
from calib.extract.detectron2_open import open_detector
from calib.extract.extraction import extract
from calib.extract.frameworks import open_detector as open_any
from calib.extract.options import Extraction
from calib.heads.detector import detector_head
from calib.score import detector_nms, score

from .test_detectron2 import CASCADE, CLASSES, CPU, SIZES, Document, Read, adapted, own_detections, settings, tiny

pytest.importorskip("detectron2")


def times_objectness(predictor: Any) -> None:
    """As CenterNet2's."""

    def inference(self: Any, predictions: Any, proposals: Any) -> Any:
        from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference

        probabilities = self.predict_probs(predictions, proposals)
        objectness = [i.objectness_logits.sigmoid()[:, None] for i in proposals]
        given = [(p * o) ** 0.5 for p, o in zip(probabilities, objectness, strict=True)]
        sizes = [i.image_size for i in proposals]
        limits = (self.test_score_thresh, self.test_nms_thresh, self.test_topk_per_image)
        return fast_rcnn_inference(self.predict_boxes(predictions, proposals), given, sizes, *limits)

    predictor.inference = MethodType(inference, predictor)


def cosine(predictor: Any) -> None:
    """As few-shot projects'."""

    def forward(self: Any, x: torch.Tensor) -> Any:
        x = x.flatten(1)
        normal = torch.nn.functional.normalize
        return 20 * normal(x) @ normal(self.cls_score.weight).T, self.bbox_pred(x)

    predictor.forward = MethodType(forward, predictor)


def warmed(predictor: Any) -> None:
    """Another temperature."""

    def predict_probs(self: Any, predictions: Any, proposals: Any) -> Any:
        return (predictions[0] / 1.5).softmax(1).split([len(p) for p in proposals])

    predictor.predict_probs = MethodType(predict_probs, predictor)


def suppressing_more(predictor: Any) -> None:
    """Nothing but the threshold of suppression is another, and no attribute says so."""

    def inference(self: Any, predictions: Any, proposals: Any) -> Any:
        from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference

        given = self.predict_boxes(predictions, proposals), self.predict_probs(predictions, proposals)
        return fast_rcnn_inference(*given, [i.image_size for i in proposals], self.test_score_thresh, 0.2, 100)

    predictor.inference = MethodType(inference, predictor)


@pytest.mark.parametrize("change", [times_objectness, cosine, warmed, suppressing_more])
@pytest.mark.parametrize("mode", ["test", "train"])
def test_a_detector_that_scores_in_its_own_way_is_found_out(
    change: Callable[[Any], None], mode: str, document: Document, read: Read, tmp_path: Path
) -> None:
    model = tiny()
    change(model.roi_heads.box_predictor)
    dataset = read(document(SIZES, [(1, 30, 5, 5, 40, 30)]))
    with pytest.raises(ReplayError, match=r"image 1: the detector itself gives .* 'kind \d'") as e:
        extract(adapted(model), dataset, tmp_path / "images", tmp_path / "c", Extraction(mode))
    assert "--check-images 0" in e.value.hint and not (tmp_path / "c").exists()
    made = extract(adapted(model), dataset, tmp_path / "images", tmp_path / "c", Extraction(mode, check_images=0))
    assert made.proof == {"images": 0}


def centernet(mult: bool) -> Any:
    """A small CenterNet2: its proposal generator, its cascade."""
    pytest.importorskip("centernet")
    from centernet.config import add_centernet_config
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    cfg = get_cfg()
    add_centernet_config(cfg)
    base = settings(*CASCADE)
    cfg.merge_from_other_cfg(base)
    changes = ["MODEL.PROPOSAL_GENERATOR.NAME", "CenterNet", "MODEL.ROI_HEADS.NAME", "CustomCascadeROIHeads"]
    changes += ["MODEL.ROI_BOX_HEAD.MULT_PROPOSAL_SCORE", mult, "MODEL.CENTERNET.ONLY_PROPOSAL", True]
    changes += ["MODEL.CENTERNET.WITH_AGN_HM", True, "MODEL.CENTERNET.INFERENCE_TH", 1e-4]
    changes += ["MODEL.CENTERNET.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]]
    changes += ["MODEL.CENTERNET.FPN_STRIDES", [4, 8, 16, 32, 64], "MODEL.CENTERNET.POST_NMS_TOPK_TEST", 40]
    changes += ["MODEL.CENTERNET.POST_NMS_TOPK_TRAIN", 60, "MODEL.CENTERNET.NORM", "GN"]
    changes += ["MODEL.CENTERNET.NMS_TH_TEST", 0.6, "MODEL.CENTERNET.NMS_TH_TRAIN", 0.9]
    cfg.merge_from_list(changes)
    torch.manual_seed(0)
    model: Any = build_model(cfg).eval()
    with torch.no_grad():
        for p in model.roi_heads.box_predictor:
            p.cls_score.weight.normal_(std=0.5)
            p.bbox_pred.weight.normal_(std=0.1)
    return model


def test_centernet2_is_extracted_without_its_product_and_found_out_with_it(
    document: Document, read: Read, draw: Callable[..., Any], tmp_path: Path
) -> None:
    dataset = read(document(SIZES[:3], [(1, 30, 5, 5, 40, 30)]))
    with pytest.raises(ReplayError):
        extract(adapted(centernet(True)), dataset, tmp_path / "images", tmp_path / "c", Extraction("train"))
    model = centernet(False)
    adapter = adapted(model)
    for mode in ("test", "train"):
        made = extract(adapter, dataset, tmp_path / "images", tmp_path / mode, Extraction(mode, max_shard_bytes=10**7))
        assert made.proof["images"] == 3 and made.proof["largest_difference"] < 1e-5
    (objectness,) = Cache(tmp_path / "test").stages[0].meta("objectness")
    own, _ = model.proposal_generator(
        model.preprocess_image([adapter._input(draw(60, 90))]),
        *[model.backbone(model.preprocess_image([adapter._input(draw(60, 90))]).tensor), None],
    )
    count = len(own[0])
    assert np.allclose(objectness[:count], own[0].objectness_logits.detach(), atol=1e-6)
    generator = model.proposal_generator
    assert (generator.post_nms_topk_test, generator.nms_thresh_test) == (40, 0.6)


def test_boxes_without_area_and_rows_that_are_not_finite_are_left_out_as_there(
    document: Document, read: Read, draw: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 160)
    predictor = model.roi_heads.box_predictor
    with torch.no_grad():
        predictor.bbox_pred.bias[:2] = 60.0  # class 0 lies beyond the border
    extract(adapted(model), read(document(SIZES)), tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    cache = Cache(tmp_path / "c")
    own = [own_detections(model, [draw(h, w, i)])[0] for i, (h, w) in enumerate(SIZES)]
    found = list(score(cache, detector_head(cache), detector_nms(cache)))
    assert sum((o.pred_classes == 0).sum() for o in own) < sum((o.pred_classes == 1).sum() for o in own)
    for ours, theirs in zip(found[2:], own[2:], strict=True):  # which are alone in their batches
        assert sorted(ours.detections.category.tolist()) == sorted(theirs.pred_classes.tolist())
    model.roi_heads.box_head.register_forward_hook(lambda m, a, out: out.index_fill(0, torch.tensor([3]), torch.nan))
    made = extract(adapted(model), read(document(SIZES)), tmp_path / "images", tmp_path / "n", Extraction())
    assert made.proof["images"] == 4 and made.rows == cache.n_rows - 4  # of four batches


def test_no_resizing_and_no_cap(document: Document, read: Read, draw: Callable[..., Any], tmp_path: Path) -> None:
    from calib.extract.detectron2 import Detectron2Adapter

    model = tiny("TEST.DETECTIONS_PER_IMAGE", -1, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    adapter = Detectron2Adapter(model, "tiny", CPU, min_size=0, max_size=96)
    assert adapter.detector.max_detections == 40 * CLASSES and adapter.accepts(7, 900)
    (rois,) = adapter.rois([draw(41, 57)])
    assert rois.net_size == (41, 57)
    made = extract(adapter, read(document([(64, 70)] * 4)), tmp_path / "images", tmp_path / "c", Extraction())
    assert made.proof["detections"] > 4 * 100 and made.proof["largest_difference"] < 1e-5


def caffe2_name(name: str) -> str:
    """The name of a weight of the tiny detector in Caffe2's model zoo."""
    end = {"weight": "w", "bias": "b"}
    *parts, last = name.split(".")
    if parts[-1] == "norm":
        parts, end = parts[:-1], {"weight": "gn_s", "bias": "gn_b"}
    path = ".".join(parts)
    known = {
        "backbone.bottom_up.stem.conv1": "conv1",
        "proposal_generator.rpn_head.conv": "conv_rpn_fpn2",
        "proposal_generator.rpn_head.anchor_deltas": "rpn_bbox_pred_fpn2",
        "proposal_generator.rpn_head.objectness_logits": "rpn_cls_logits_fpn2",
        "roi_heads.box_head.fc1": "fc6",
        "roi_heads.box_head.fc2": "fc7",
        "roi_heads.box_predictor.cls_score": "cls_score",
        "roi_heads.box_predictor.bbox_pred": "bbox_pred",
    }
    if path.startswith("backbone.bottom_up.res"):
        stage, block, layer = parts[2:]
        branch = {"conv1": "branch2a", "conv2": "branch2b", "shortcut": "branch1"}[layer]
        return f"{stage}_{block}_{branch}_{end[last]}"
    if path.startswith("backbone.fpn_"):
        kind, level = path[:-1].removeprefix("backbone.fpn_"), path[-1]
        middle = f"inner_res{level}_1_sum_lateral" if kind == "lateral" else f"res{level}_1_sum"
        return f"fpn_{middle}_{end[last]}"
    return f"{known[path]}_{end[last]}"


def zoo(state: dict[str, Any]) -> dict[str, Any]:
    """The same weights in the forms of the model zoo."""
    arrays = {k: v.numpy() for k, v in state.items()}
    buffers = {"pixel_mean": np.zeros((3, 1, 1)), "pixel_std": np.ones((3, 1, 1))}
    buffers["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((3, 4))
    bare = {k.removeprefix("backbone.bottom_up."): v for k, v in arrays.items()}
    caffe = {caffe2_name(k): v for k, v in arrays.items()}
    for name in ("cls_score_w", "cls_score_b"):
        caffe[name] = np.roll(caffe[name], 1, axis=0)  # background first
    for name in ("bbox_pred_w", "bbox_pred_b"):
        caffe[name] = np.concatenate([caffe[name][:4] * 0, caffe[name]])
    momentum = {f"{k}_momentum": v for k, v in caffe.items()}
    return {
        "own": {"model": arrays | buffers, "__author__": "Detectron2 Model Zoo"},
        "heuristics": {"model": bare | buffers, "__author__": "torchvision", "matching_heuristics": True},
        "caffe2": {"blobs": caffe | momentum | {"weight_order": b"1"}},
    }


@pytest.mark.parametrize("form", ["own", "heuristics", "caffe2"])
def test_files_of_the_model_zoo(form: str, tmp_path: Path) -> None:
    model = tiny()
    (tmp_path / "model.yaml").write_text(settings().dump())
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(zoo(model.state_dict())[form], protocol=2))
    opened = open_detector(str(tmp_path / "model.yaml"), CPU, weights=tmp_path / "w.pkl")
    state, own = opened.model.state_dict(), model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in own.items())


def test_weights_that_lack_or_have_too_much_are_refused(tmp_path: Path) -> None:
    state = tiny().state_dict()
    (tmp_path / "model.yaml").write_text(settings().dump())
    name = "roi_heads.box_predictor.cls_score.bias"
    torch.save({"model": {k: v for k, v in state.items() if k != name}}, tmp_path / "lacks.pth")
    torch.save({"model": state | {"roi_heads.mask_head.w": torch.zeros(1)}}, tmp_path / "more.pth")
    (tmp_path / "lacks.pkl").write_bytes(pickle.dumps({"model": {"a": np.zeros(1)}, "__author__": "x"}))
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    for file, message in (
        ("lacks.pth", "Missing: roi_heads.box_predictor.cls_score.bias"),
        ("more.pth", "Unexpected: roi_heads.mask_head.w"),
        ("lacks.pkl", "Missing: "),
        ("list.pkl", "do not fit"),
    ):
        with pytest.raises(FormatError, match=message):
            open_detector(str(tmp_path / "model.yaml"), CPU, weights=tmp_path / file)


LAZY = """
from detectron2.config import LazyCall as L
import detectron2.data.transforms as T
import made_up_project
from omegaconf import OmegaConf

model = L(made_up_project.build)(classes=CLASSES, head=dict(use_fed_loss=True))
dataloader = OmegaConf.create()
dataloader.test = dict(mapper=dict(augmentations=[L(T.ResizeShortestEdge)(short_edge_length=64, max_size=96)]))
"""
PROJECT = """
from detectron2.config import get_cfg
from tests.extract.test_detectron2 import settings, tiny

seen = []


def build(classes, head):
    assert head["use_fed_loss"] is False
    return tiny("MODEL.ROI_HEADS.NUM_CLASSES", classes)


def add_config(cfg):
    cfg.PROJECT_OPTION = 1
    seen.append(cfg)


def build_cfg():
    return settings("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True, "MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True)
"""


def test_configs_of_projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_up_project.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lazy.py").write_text(LAZY.replace("CLASSES", str(CLASSES)))
    (tmp_path / "openmm.py").write_text('model = dict(type="FasterRCNN", backbone=dict(type="ResNet"))')
    (tmp_path / "own.yaml").write_text(settings().dump() + "PROJECT_OPTION: 3\n")
    torch.save({"model": tiny().state_dict()}, tmp_path / "w.pth")
    fed = {"roi_heads.box_predictor.fed_loss_cls_weights": torch.ones(CLASSES)}
    sigmoid = tiny("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True).state_dict()
    torch.save({"model": sigmoid | fed}, tmp_path / "fed.pth")
    try:
        lazy = open_any(f"detectron2:{tmp_path / 'lazy.py'}", CPU, weights=tmp_path / "w.pth")
        assert lazy.detector.settings == {"min_size": 64, "max_size": 96, "format": "BGR"}
        other = json.dumps({"min_size": 50, "max_size": 70, "model.classes": CLASSES})
        changed = open_detector(str(tmp_path / "lazy.py"), CPU, weights=tmp_path / "w.pth", arguments=other)
        assert changed._sides == (50, 70)
        setup = '{"setup": "made_up_project:add_config"}'
        open_detector(str(tmp_path / "own.yaml"), CPU, weights=tmp_path / "w.pth", arguments=setup)
        assert sys.modules["made_up_project"].seen[0].PROJECT_OPTION == 3
        made = open_detector("made_up_project:build_cfg", CPU, weights=tmp_path / "fed.pth")
        assert made.detector.activation == "sigmoid" and made._sides == (64, 96)
        cases: list[tuple[str, str, type[Exception], str]] = [
            (str(tmp_path / "own.yaml"), "", FormatError, "PROJECT_OPTION"),
            (str(tmp_path / "own.yaml"), '{"setup": "made_up_project:absent"}', InputError, "setup .* cannot be used"),
            (str(tmp_path / "openmm.py"), "", FormatError, "its model is DictConfig"),
            (str(tmp_path / "lazy.py"), '{"model.absent": 1}', FormatError, r"no setting model\.absent"),
            ("made_up_project:add_config", "", InputError, "missing 1 required positional argument"),
        ]
        for spec, arguments, error, message in cases:
            with pytest.raises(error, match=message):
                open_detector(spec, CPU, weights=tmp_path / "w.pth", arguments=arguments)
    finally:
        sys.modules.pop("made_up_project", None)
