"""The adapter for Detectron2, where it is installed: the detector's own detections, and the model left as it was."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.artifact import Artifact, HeadInfo, load, save
from calib.cache import Cache
from calib.errors import CalibError, FormatError, InputError, MissingExtraError
from calib.export.export import Export, export
from calib.export.graph import read_program
from calib.export.predictor import calibrate
from calib.extract.dataset import Dataset
from calib.extract.detectron2 import Detectron2Adapter
from calib.extract.detectron2_open import open_detector
from calib.extract.extraction import extract
from calib.extract.options import Extraction
from calib.extract.staging import with_hidden
from calib.heads.detector import detector_head
from calib.heads.linear import LinearClassifier
from calib.heads.sigmoid import SigmoidHead
from calib.score import detector_nms, score
from calib.training import train

CPU = torch.device("cpu")
CLASSES = 4
SIZES = [(60, 90), (60, 90), (41, 57), (7, 9), (90, 31)]
Document = Callable[..., dict[str, Any]]
Read = Callable[[dict[str, Any]], Dataset]

SETTINGS: list[Any] = [
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", 18),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
    *("MODEL.RESNETS.NORM", "GN", "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.FPN.NORM", "GN"),
    *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.PROPOSAL_GENERATOR.NAME", "RPN"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [24], [32], [48]]),
    *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"], "MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", 40, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 60, "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 400),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"], "MODEL.ROI_HEADS.NUM_CLASSES", CLASSES),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 2),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 64, "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.02),
    *("MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96),
]
FORMS: dict[str, list[Any]] = {
    "softmax": [],
    "agnostic": ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
    "sigmoid": ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True],
}
CASCADE: list[Any] = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", *FORMS["agnostic"]]
FORMS |= {"cascade": CASCADE, "cascade of sigmoids": [*CASCADE, *FORMS["sigmoid"]]}


def settings(*changes: Any) -> Any:
    config = pytest.importorskip("detectron2.config")
    cfg = config.get_cfg()
    cfg.merge_from_list([*SETTINGS, *changes])
    return cfg


def tiny(*changes: Any) -> Any:
    pytest.importorskip("detectron2")
    from detectron2.modeling import build_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = build_model(settings(*changes)).eval()
    predictor = model.roi_heads.box_predictor
    predictors = list(predictor) if isinstance(predictor, torch.nn.ModuleList) else [predictor]
    with torch.no_grad():
        for layer in (model.proposal_generator.rpn_head.objectness_logits, *(p.cls_score for p in predictors)):
            layer.weight.normal_(std=0.5)
        for p in predictors:
            p.bbox_pred.weight.normal_(std=0.1)
    return model


def adapted(model: Any) -> Detectron2Adapter:
    return Detectron2Adapter(model, "tiny", CPU, min_size=64, max_size=96)


def own_detections(model: Any, pixels: list[Any]) -> list[Any]:
    """As Detectron2's DefaultPredictor: resized, BGR, scaled back."""
    from detectron2.data.transforms import ResizeShortestEdge

    inputs = []
    for p in pixels:
        image = p[:, :, ::-1]
        resized = ResizeShortestEdge([64, 64], 96).get_transform(image).apply_image(image)
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        inputs.append({"image": tensor, "height": p.shape[0], "width": p.shape[1]})
    with torch.no_grad():
        return [d["instances"] for d in model(inputs)]


@pytest.mark.parametrize("form", FORMS)
def test_replaying_the_cache_gives_the_detectors_own_detections(
    form: str, document: Document, read: Read, draw: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny(*FORMS.get(form, []))
    pixels = [draw(h, w, i) for i, (h, w) in enumerate(SIZES)]
    batches = [[0, 1], [2], [3], [4]]
    own = [d for b in batches for d in own_detections(model, [pixels[i] for i in b])]
    adapter = adapted(model)
    d = adapter.detector
    is_sigmoid, is_cascade = "sigmoid" in form, "cascade" in form
    assert d.activation == ("sigmoid" if is_sigmoid else "softmax") and not d.background_first
    assert d.class_agnostic == (is_cascade or form == "agnostic") and d.outputs == CLASSES + (not is_sigmoid)
    assert (d.stages, d.average) == (3 if is_cascade else 1, "probabilities")
    extract(adapter, read(document(SIZES)), tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    cache = Cache(tmp_path / "c")
    found = list(score(cache, detector_head(cache), detector_nms(cache)))
    assert sum(len(o) for o in own) > 100
    for ours, theirs in zip(found, own, strict=True):
        f = ours.detections
        assert f.category.tolist() == theirs.pred_classes.tolist()
        # A vectorised sigmoid rounds by the place of a number in memory, which the column left out here moves.
        ulp = 2e-7 if form == "cascade of sigmoids" else 0
        assert np.allclose(f.score, theirs.scores.numpy(), rtol=ulp, atol=0)
        assert np.allclose(f.box, theirs.pred_boxes.tensor.numpy(), rtol=0, atol=1e-3)
    again = [d for b in batches for d in own_detections(model, [pixels[i] for i in b])]
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(own, again, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_training_mode_offers_as_many_proposals_as_training_does(draw: Callable[..., Any]) -> None:
    model = tiny()
    offered = []

    def note(i: int, boxes: Any, scores: Any, ratio: Any) -> Any:
        offered.append((i, len(boxes), ratio))
        return boxes[[4, 2]], np.asarray([scores[4], 1], np.float32)

    (rois,) = adapted(model).rois([draw(60, 90)], note)
    assert offered == [(0, 60, (64 / 60, 96 / 90))]
    assert len(rois.features) == 2 and rois.objectness[1] == 1
    assert model.proposal_generator.post_nms_topk == {True: 60, False: 40}
    sampling = adapted(model).sampling
    assert (sampling.foreground_iou, sampling.background_iou, sampling.rows_per_image) == (0.5, 0.5, 32)


def test_training_rows_are_labelled_with_ground_truth_appended(document: Document, read: Read, tmp_path: Path) -> None:
    dataset = read(document(SIZES[:2], [(1, 30, 5, 5, 40, 30), (2, 10, 10, 10, 30, 30)]))
    extract(adapted(tiny()), dataset, tmp_path / "images", tmp_path / "c", Extraction("train", dtype="float32"))
    cache = Cache(tmp_path / "c")
    label, is_gt, objectness = cache.meta("label", "is_gt", "objectness")
    assert is_gt.sum() == 2 and sorted(label[is_gt]) == [0, 2] and (objectness[is_gt] == 1).all()
    assert cache.n_rows == 64


def test_an_image_without_proposals_and_maps(draw: Callable[..., Any]) -> None:
    model = tiny()
    adapter = adapted(model)
    (rois,) = adapter.rois([draw(60, 90)], maps=True)
    assert adapter.roi_map is not None and adapter.roi_map.shape == (32, 7, 7)
    assert rois.maps is not None and rois.maps.shape == (40, 32 * 49)
    c = with_hidden(adapter.classifier(), adapter.roi_map)
    assert c.fc1_weight is not None and c.fc2_weight is not None and c.fc1_bias is not None and c.fc2_bias is not None
    hidden = np.maximum(rois.maps @ c.fc1_weight.T + c.fc1_bias, 0)
    assert np.allclose(np.maximum(hidden @ c.fc2_weight.T + c.fc2_bias, 0), rois.features, atol=1e-4)
    model.proposal_generator.post_nms_topk[False] = 0
    (empty,) = adapter.rois([draw(60, 90)])
    assert empty.features.shape == (0, 64) and empty.logits.shape == (0, CLASSES + 1)


def test_rows_of_a_cascade_are_those_of_every_stage(document: Document, read: Read, tmp_path: Path) -> None:
    model = tiny(*CASCADE)
    objects = [(1, 30, 5, 5, 40, 30), (2, 10, 10, 10, 30, 30)]
    dataset = read(document(SIZES[:2], objects))
    adapter = adapted(model)
    assert (adapter.sampling.foreground_iou, adapter.sampling.next_ious) == (0.5, (0.6, 0.7))
    for mode in ("test", "train"):
        extract(adapter, dataset, tmp_path / "images", tmp_path / mode, Extraction(mode, dtype="float32"))
    cache = Cache(tmp_path / "test")
    refined, proposal = ("refined_x1", "refined_y2"), ("proposal_x1", "proposal_y2")
    for k, stage in enumerate(cache.stages):
        x, z = stage.features.read(0, 80), stage.logits
        assert z is not None and np.allclose(stage.classifier.logits(x), z.read(0, 80), atol=1e-4)
        if k:  # each begins where the one before ended
            assert np.allclose(cache.stages[k - 1].meta(*refined), stage.meta(*proposal), atol=1e-4)
    trained = Cache(tmp_path / "train")
    assert trained.n_rows == 64
    for iou, stage in zip((0.5, 0.6, 0.7), trained.stages, strict=True):
        label, found, is_gt, roi = stage.meta("label", "max_iou", "is_gt", "roi_id")
        assert is_gt.sum() == (2 if stage is trained.stages[0] else 0)
        assert ((label < CLASSES) & (label >= 0))[label >= 0].tolist() == (found >= iou)[label >= 0].tolist()
        assert np.array_equal(roi, trained.stages[0].meta("roi_id")[0])


def test_a_head_trained_on_a_cascade_scores_like_the_detector_it_is_folded_into(
    document: Document, read: Read, draw: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny(*CASCADE)
    adapter, objects = adapted(model), [(1, 30, 5, 5, 40, 30), (2, 10, 10, 10, 30, 30)]
    for mode in ("test", "train"):
        dataset = read(document(SIZES[:2], objects))
        extract(adapter, dataset, tmp_path / "images", tmp_path / mode, Extraction(mode, dtype="float32"))
    settings = {"steps": 5, "lr": 0.5, "rows_per_step": 16}
    head = train("crt", tmp_path / "train", tmp_path / "crt" / "1", settings).head
    torch.save({"model": model.state_dict()}, tmp_path / "d.pth")
    wanted = Export("detectron2", checkpoint=tmp_path / "d.pth")
    export(tmp_path / "crt" / "1", tmp_path / "test", tmp_path / "new.pth", wanted)
    before = own_detections(model, [draw(60, 90)])[0].scores
    model.load_state_dict(torch.load(tmp_path / "new.pth", weights_only=True)["model"])
    own = own_detections(model, [draw(*SIZES[0]), draw(*SIZES[1], 1)])
    assert not torch.equal(before, own[0].scores)
    cache = Cache(tmp_path / "test")
    for ours, theirs in zip(score(cache, head, detector_nms(cache)), own, strict=True):
        assert ours.detections.category.tolist() == theirs.pred_classes.tolist()
        assert np.allclose(ours.detections.score, theirs.scores.numpy(), atol=1e-6)


def test_a_cascade_without_proposals_and_with_maps(draw: Callable[..., Any]) -> None:
    model = tiny(*CASCADE)
    adapter = adapted(model)
    assert adapter.roi_map is None
    model.proposal_generator.post_nms_topk[False] = 0
    both = adapter.rois([draw(60, 90), draw(60, 90, 1)])
    assert [[s.features.shape for s in (r, *r.next)] for r in both] == [[(0, 64)] * 3] * 2


def test_a_config_and_its_weights_are_opened_by_the_command_line(
    document: Document, calib: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny()
    (tmp_path / "model.yaml").write_text(settings().dump())
    state = model.state_dict()
    torch.save({"model": state, "iteration": 3}, tmp_path / "w.pth")
    arrays = {"model": {k: v.numpy() for k, v in state.items()}, "__author__": "calib"}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(arrays))
    (tmp_path / "a.json").write_text(json.dumps(document(SIZES[:1])))
    digests = set()
    for name in ("w.pth", "w.pkl"):
        done = calib(
            *("extract", "--detector", f"detectron2:{tmp_path / 'model.yaml'}", "--weights", tmp_path / name),
            *("--annotations", tmp_path / "a.json", "--images", tmp_path / "images", "--out", tmp_path / f"c-{name}"),
        )
        assert done.exit_code == 0, (done.stderr, done.exception)
        digests.add(Cache(tmp_path / f"c-{name}").digest)
    assert len(digests) == 1


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    cfg = settings()
    (tmp_path / "model.yaml").write_text(cfg.dump())
    (tmp_path / "w.pth").write_bytes(b"no")
    cases: list[tuple[str, str, Path | None, type[CalibError], str]] = [
        ("model.yaml", "", None, InputError, "untrained"),
        ("model.yaml", "", tmp_path / "w.pth", FormatError, r"w\.pth cannot be read"),
        ("model.yaml", '{"MODEL.ABSENT": 1}', tmp_path / "w.pth", FormatError, "ABSENT"),
        ("absent.yaml", "", tmp_path / "w.pth", InputError, "absent"),
    ]
    for name, arguments, weights, error, message in cases:
        with pytest.raises(error, match=message):
            open_detector(str(tmp_path / name), CPU, weights=weights, arguments=arguments)


def test_without_detectron2_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(MissingExtraError, match="detectron2 is not installed") as e:
        open_detector("model.yaml", CPU)
    assert e.value.hint.startswith("python -m pip install 'git+https://")


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_a_head_inside_the_live_model_gives_the_detections_of_calib_score(
    form: str, document: Document, read: Read, draw: Callable[..., Any], tmp_path: Path
) -> None:
    """By ``calibrate``, and by programs in the place of ``cls_score`` and of the predictor's ``forward``."""
    model = tiny(*FORMS[form])
    pixels = [draw(h, w, i) for i, (h, w) in enumerate(SIZES[:3])]
    adapter = Detectron2Adapter(model, "detectron2:tiny", CPU, min_size=64, max_size=96)
    extract(adapter, read(document(SIZES[:3])), tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    cache = Cache(tmp_path / "c")
    weight = torch.randn(CLASSES, 64, generator=torch.Generator().manual_seed(1)) * 0.2
    made = SigmoidHead(LinearClassifier(weight, torch.zeros(CLASSES)))  # scores whose sums are above 1
    save(tmp_path / "m" / "1", Artifact(made, HeadInfo.of(cache, "eql", {}, 0, [])))
    artifact = load(tmp_path / "m" / "1")
    wanted = [r.detections for r in score(cache, artifact.head, detector_nms(cache))]
    predictor = model.roi_heads.box_predictor

    def check(scale: float) -> None:
        for ours, theirs in zip(wanted, (own_detections(model, [p])[0] for p in pixels), strict=True):
            assert len(ours.category) > 20 and ours.category.tolist() == theirs.pred_classes.tolist()
            assert np.allclose(ours.score, scale * theirs.scores.numpy(), rtol=1e-5, atol=0)
            assert np.allclose(ours.box, theirs.pred_boxes.tensor.numpy(), atol=1e-3)

    undo = calibrate(model, artifact)
    check(1.0)
    undo()
    assert model.roi_heads.box_predictor is predictor and predictor.test_score_thresh == 0.02
    own = predictor.cls_score
    for target in ("layer", "module"):
        metrics = export(tmp_path / "m" / "1", tmp_path / "c", tmp_path / f"{target}.pt2", Export(target))
        assert metrics["scale"] == (4 if form == "softmax" else 1)
        program = read_program(tmp_path / f"{target}.pt2")
        predictor.test_score_thresh = 0.02 / metrics["scale"]
        if target == "layer":
            assert metrics["replaces"] == "roi_heads.box_predictor.cls_score"
            predictor.cls_score = program
            check(metrics["scale"])
            predictor.cls_score = own
        else:
            assert metrics["replaces"] == "roi_heads.box_predictor.forward"
            predictor.forward = program.forward
            check(metrics["scale"])
