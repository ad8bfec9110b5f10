"""Adapter for mmdetection 3's two-stage detectors and cascades (StandardRoIHead, CascadeRoIHead, HTC), unmodified.

The detector's own parts are called one after the other: pipeline, backbone, RPN, RoI head; hooks on ``fc_cls`` note its
input (not that of ``bbox_head``, which is the pooled map), on ``bbox_head`` its output, on the RoI extractor the boxes.
mmdetection averages the logits of stages. Background is last there too; a Seesaw head has C + 2 outputs, object and
background last. mmdetection suppresses in original pixels where it has no masks; IoU does not change when an axis is
scaled, so that network pixels serve as well. Letters: N proposals of one image, D feature size, C foreground classes.
"""

from collections.abc import Iterator
from dataclasses import replace as changed
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calib.boxes import Boxes, clip, decode
from calib.cache import Classifier
from calib.cache.schema import Detector
from calib.checkpoint import Checkpoint
from calib.errors import FormatError, InputError, MissingExtraError, UnknownNameError, UnsupportedError
from calib.extract.adapter import MASKS_AT_ONCE, Adapter, ClassRule, Image, MaskBranch, Own, Replace, RoIs, Sampling
from calib.extract.modules import recording, stages
from calib.extract.staging import array
from calib.extract.weights import factory_arguments, load_weights
from calib.files import require

CASCADES = ("CascadeRoIHead", "HybridTaskCascadeRoIHead")
MASKS = ("StandardRoIHead", *CASCADES)
ORDERS = ("json", "names", "id")
_JSON = ClassRule("json")
_INSTALL = "pip install openmim && mim install 'mmcv>=2.0,<2.2' mmdet"


class MMDetAdapter(Adapter):
    """Records RoIs of a detector in eval mode. ``pipeline`` turns {img: BGR array} into the model's input.

    Classes go in the order of the TRAIN json's categories, unless ``classes`` says otherwise.

    Raises:
        UnsupportedError: another kind of model.
    """

    needs = ("rpn_head", "roi_head.bbox_roi_extractor")
    linear = ("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg")

    def __init__(
        self, model: Any, pipeline: Any, source: str, device: torch.device, classes: ClassRule = _JSON
    ) -> None:
        super().__init__(model, device)
        _check_roi_head(model.roi_head)
        self.pipeline, self.classes = pipeline, classes
        self._heads, self._extractors = stages(model.roi_head.bbox_head), stages(model.roi_head.bbox_roi_extractor)
        self._head = self._heads[-1]  # its boxes are those of the detections
        self.sampling = _sampling((model.train_cfg or {}).get("rcnn"), len(self._heads))
        test = model.roi_head.test_cfg
        self._agnostic = bool(self._head.reg_class_agnostic)
        self.detector = Detector(
            source=source,
            digest=self.classifier().digest(),
            num_classes=int(self._head.num_classes),
            feature_size=self._head.fc_cls.in_features,
            head_type="linear" if self.classifier().scale is None else "cosine",
            activation=_activation(self._head),
            class_agnostic=self._agnostic,
            box_weights=_weights(self._head),
            score_threshold=float(test.score_thr),
            nms_iou=float(test.nms.iou_threshold),
            max_detections=int(test.max_per_img),
            stages=len(self._heads),
            average="logits" if len(self._heads) > 1 else "probabilities",
            settings=_loss_weights(model.roi_head),
        )

    def classifier(self) -> Classifier:
        """fc_cls and fc_reg; of a NormedLinear with its temperature as ``scale``."""
        own, *later = (_classifier(head) for head in self._heads)
        return changed(own, next=tuple(later))

    def accepts(self, height: int, width: int) -> bool:
        """mmdetection's resizing keeps at least one pixel."""
        return height > 0 and width > 0

    def most_rows(self, mode: str) -> int:
        """From the RPN's cap on proposals and the box head's sample."""
        return self.sampling.rows_per_image if mode == "train" else int(self.model.test_cfg.rpn.max_per_img)

    @torch.no_grad()
    def rois(self, images: list[Image], replace: Replace | None = None, *, maps: bool = False) -> list[RoIs]:
        """Run the detector up to its classifier (see ``Adapter.launch``)."""
        levels, metas = self._levels(images)
        rpn = self.model.rpn_head
        train = (self.model.train_cfg or {}).get("rpn_proposal")
        own = train if replace is not None and train is not None else self.model.test_cfg.rpn
        found = rpn.predict_by_feat(*rpn(levels), batch_img_metas=metas, cfg=own, rescale=False)
        boxes, scores = [f.bboxes for f in found], [array(f.scores) for f in found]
        if replace is not None:
            for i, (meta, image) in enumerate(zip(metas, images, strict=True)):
                ratio = (meta["img_shape"][0] / image.shape[0], meta["img_shape"][1] / image.shape[1])
                new, scores[i] = replace(i, array(boxes[i]), scores[i], ratio)
                boxes[i] = torch.from_numpy(new).to(boxes[i])
        counts, sizes = [len(b) for b in boxes], [(int(m["img_shape"][0]), int(m["img_shape"][1])) for m in metas]
        seen = self._seen(levels, boxes, metas) if sum(counts) else self._nothing()
        objectness = np.concatenate(scores)
        first, *later = (
            RoIs(own, objectness, features, logits, self._refined(head, own, deltas, counts, sizes))
            for head, own, features, logits, deltas in zip(self._heads, *seen, strict=True)
        )
        return changed(first, next=tuple(later)).split(counts, sizes)

    @torch.no_grad()
    def detections(self, image: Image) -> Own:
        """The model's own, by ``test_step`` (see ``Adapter.detections``)."""
        (found,) = self.model.test_step(self._given([image]))
        own = found.pred_instances
        return Own(own.labels.cpu().numpy(), array(own.scores), array(own.bboxes))

    def _given(self, images: list[Image]) -> dict[str, list[Any]]:
        """Pictures as the pipeline gives them."""
        given = [self.pipeline({"img": np.ascontiguousarray(i[:, :, ::-1]), "img_id": 0}) for i in images]
        return {k: [g[k] for g in given] for k in ("inputs", "data_samples")}

    def _levels(self, images: list[Image]) -> tuple[Any, list[Any]]:
        """Feature maps, and what the pipeline did to every picture."""
        data = self.model.data_preprocessor(self._given(images), False)
        return self.model.extract_feat(data["inputs"]), [sample.metainfo for sample in data["data_samples"]]

    @property
    def mask_branch(self) -> MaskBranch | None:
        """``predict_mask`` of the RoI head, which merges the stages of a cascade (see ``Adapter.mask_branch``)."""
        roi_head, known = self.model.roi_head, import_module("mmdet.models.roi_heads")
        is_known = any(type(roi_head).predict_mask is getattr(known, n).predict_mask for n in MASKS)
        return self._masks if roi_head.with_mask and is_known else None

    @torch.no_grad()
    def _masks(self, image: Image, boxes: Boxes, category: NDArray[np.int64]) -> Iterator[NDArray[np.bool_]]:
        roi_head, instances = self.model.roi_head, import_module("mmengine.structures").InstanceData
        levels, (meta,) = self._levels([image])
        network = torch.from_numpy(boxes * np.tile(np.float32(meta["scale_factor"]), 2)).to(levels[0])
        label, semantic = torch.from_numpy(category).to(network.device), self._semantic(levels)
        for start in range(0, len(boxes), MASKS_AT_ONCE):
            part = slice(start, start + MASKS_AT_ONCE)
            given = [instances(bboxes=network[part], labels=label[part])]
            (found,) = roi_head.predict_mask(levels, *semantic.values(), [meta], given, rescale=True)
            yield from found.masks.cpu().numpy()

    def _semantic(self, levels: Any) -> dict[str, Any]:
        """What HTC's methods take beside feature maps; None where it has no semantic branch."""
        roi_head = self.model.roi_head
        if not hasattr(roi_head, "with_semantic"):
            return {}
        return {"semantic_feat": roi_head.semantic_head(levels)[1] if roi_head.with_semantic else None}

    def _refined(self, head: Any, boxes: Boxes, deltas: Any, counts: list[int], sizes: list[tuple[int, int]]) -> Any:
        """[N, 4] of all images after ``head``; None where they are class-specific."""
        if not head.reg_class_agnostic:
            return None
        moved = np.split(decode(deltas.reshape(-1, 1, 4), boxes, _weights(head))[:, 0], np.cumsum(counts)[:-1])
        return np.concatenate([clip(part, *size) for part, size in zip(moved, sizes, strict=True)])

    def _seen(self, levels: Any, boxes: list[Tensor], metas: list[Any]) -> list[list[Any]]:
        """Boxes [N, 4], features [N, D], logits [N, K] and deltas [N, 4 or 4 C] of all images, each stage by stage."""
        roi_head = self.model.roi_head
        seen: list[list[Any]] = [[], [], [], []]
        rois = torch.cat([torch.cat([b.new_full((len(b), 1), i), b], dim=1) for i, b in enumerate(boxes)])

        def leave(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
            for part, found in zip(seen[2:], output, strict=True):
                part.append(array(found))

        with recording(
            *(
                e.register_forward_pre_hook(lambda _, args: seen[0].append(array(args[1][:, 1:])))
                for e in self._extractors
            ),
            *(h.fc_cls.register_forward_pre_hook(lambda _, args: seen[1].append(array(args[0]))) for h in self._heads),
            *(h.register_forward_hook(leave) for h in self._heads),
        ):
            if isinstance(roi_head.bbox_head, nn.ModuleList):
                roi_head._refine_roi(levels, rois, metas, [len(b) for b in boxes], **self._semantic(levels))
            else:
                roi_head._bbox_forward(levels, rois)
        return seen

    def _nothing(self) -> list[list[Any]]:
        """As ``_seen``, of images without proposals."""
        widths = [(4, h.fc_cls.in_features, h.fc_cls.out_features, 4) for h in self._heads]
        return [[np.empty((0, n), np.float32) for n in part] for part in zip(*widths, strict=True)]


def _classifier(head: Any) -> Classifier:
    cls, reg = head.fc_cls, head.fc_reg
    temperature = getattr(cls, "tempearture", None)  # spelled so in mmdetection
    return Classifier(
        weight=array(cls.weight),
        bias=None if cls.bias is None else array(cls.bias),
        scale=None if temperature is None else np.asarray([temperature], np.float32),
        box_weight=array(reg.weight),
        box_bias=array(reg.bias),
    )


def _weights(head: Any) -> tuple[float, ...]:
    return tuple(round(1 / float(s), 6) for s in head.bbox_coder.stds)


def _sampling(rcnn: Any, stages: int) -> Sampling:
    """From ``train_cfg.rcnn``: of a cascade a list, one entry per stage."""
    given = [dict(r) for r in rcnn] if isinstance(rcnn, list) else [dict(rcnn or {})]
    assigners = [r.get("assigner", {}) for r in given]
    ious = [float(a.get("pos_iou_thr", 0.5)) for a in assigners]
    ious += ious[-1:] * (stages - len(ious))
    sampler = given[0].get("sampler", {})
    return Sampling(
        ious[0],
        float(assigners[0].get("neg_iou_thr", 0.5)),
        int(sampler.get("num", 512)),
        float(sampler.get("pos_fraction", 0.25)),
        next_ious=tuple(ious[1:stages]),
    )


def _loss_weights(roi_head: Any) -> dict[str, Any]:
    """Of the stages of a cascade."""
    weights = getattr(roi_head, "stage_loss_weights", None)
    return {} if weights is None else {"stage_loss_weights": [float(w) for w in weights]}


def _activation(head: Any) -> str:
    """What makes scores of ``fc_cls``, whatever the loss: mmdetection takes softmax unless the loss has its own."""
    if not head.custom_cls_channels:
        return "softmax"
    loss, outputs = type(head.loss_cls).__name__, head.fc_cls.out_features - head.num_classes
    found = {
        ("SeesawLoss", 2): "seesaw",
        ("CrossEntropyCustomLoss", 1): "softmax",
        ("CrossEntropyCustomLoss", 0): "sigmoid",
    }
    if (loss, outputs) not in found:
        raise UnsupportedError(
            f"{loss} makes scores of its own ({head.fc_cls.out_features} outputs), which calib does not know",
            hint="known are SeesawLoss and CrossEntropyCustomLoss; others as arrays: docs/raw.md",
        )
    return found[loss, outputs]


def _check_roi_head(roi_head: Any) -> None:
    if isinstance(roi_head.bbox_head, nn.ModuleList) and type(roi_head).__name__ not in CASCADES:
        raise UnsupportedError(f"{type(roi_head).__name__} is no cascade that calib knows: {', '.join(CASCADES)}")
    for head in stages(roi_head.bbox_head):
        _activation(head)
        coder = head.bbox_coder
        if getattr(head.fc_cls, "power", 1) != 1 or any(m != 0 for m in getattr(coder, "means", (1,))):
            raise UnsupportedError("a NormedLinear of power other than 1, or a box coder with means, is not supported")
    if roi_head.test_cfg.nms.get("type", "nms") != "nms":
        raise UnsupportedError(f"{roi_head.test_cfg.nms['type']} is not supported: expected nms")


def open_detector(spec: str, device: torch.device, *, weights: Path | None = None, arguments: str = "") -> MMDetAdapter:
    """Open a detector.

    Args:
        spec: a config (``.py``), which mmengine runs, as mmdetection's own tools do.
        device: where it runs.
        weights: ``.pth`` or ``.safetensors``; nothing in it is executed.
        arguments: JSON object of settings to change: ``{"model.roi_head.bbox_head.num_classes": 1203}``; beside them
            ``class_order``: json (mmdetection's rule), names (those of the checkpoint, else of the config) or id.

    Raises:
        MissingExtraError: mmdetection is not installed. MissingFileError, FormatError: see the messages.
        InputError: no weights. UnknownNameError: no such order. UnsupportedError: another kind of model.
    """
    try:
        import_module("mmcv.ops")
        registry, utils = import_module("mmdet.registry"), import_module("mmdet.utils")
    except ImportError:
        raise MissingExtraError("mmdetection 3 (with mmcv's operators)", "mmdet", hint=_INSTALL) from None
    changes = factory_arguments(arguments)
    order = str(changes.pop("class_order", ""))
    if order and order not in ORDERS:
        raise UnknownNameError("class order", order, ORDERS)
    if weights is None:
        raise InputError(f"mmdet:{spec} without weights is an untrained detector", hint="add --weights FILE")
    path = require(Path(spec), "mmdetection config")
    try:
        config = import_module("mmengine.config").Config.fromfile(str(path))
        config.merge_from_dict(changes)
        utils.register_all_modules(init_default_scope=True)
        config.model.pop("init_cfg", None)
        config.model.backbone.pop("init_cfg", None)  # it would download pretrained weights
        model = registry.MODELS.build(config.model)
        steps = utils.get_test_pipeline_cfg(config)
        steps[0].type = "mmdet.LoadImageFromNDArray"
        pipeline = import_module("mmcv.transforms").Compose(steps)
    except Exception as e:  # configs are programs and raise what they like
        raise FormatError(f"mmdetection config {path}: {str(e) or repr(e)}") from e
    classes = _class_rule(order, load_weights(model, weights), config)
    return MMDetAdapter(model, pipeline, f"mmdet:{path.name}", device, classes)


def _class_rule(order: str, weights: Checkpoint, config: Any) -> ClassRule:
    """That of mmdetection's data sets: label k is the k-th category of the TRAIN json, whatever the order of names.

    The names that checkpoint or config have are compared with the json's: they tell of another data set, and of a json
    whose categories stand in another order than in training. LVIS's sets take no note of names (one is misspelt).
    """
    datasets = [config.get(k, {}).get("dataset", {}) for k in ("train_dataloader", "test_dataloader")]
    names = _names_in(weights.document) or next((n for d in datasets if (n := _named(d))), ())
    hint = f"--detector-args '{{\"class_order\": ...}}' says which holds: {', '.join(ORDERS)}"
    if order == "names":
        if not names:
            raise InputError(f"neither {weights.path} nor the config names classes", hint="leave class_order out")
        return ClassRule(order, names, has_all=True, hint=hint)
    is_lvis = any("LVIS" in str(_innermost(d).get("type", "")) for d in datasets)
    return ClassRule(order) if order else ClassRule("json", names, has_all=bool(names) and not is_lvis, hint=hint)


def _names_in(document: Any) -> tuple[str, ...]:
    """Of the classes in the ``meta`` of a checkpoint."""
    meta = document.get("meta", {}) if isinstance(document, dict) else {}
    known = meta.get("dataset_meta", meta) if isinstance(meta, dict) else {}
    found = next((v for k, v in known.items() if str(k).lower() == "classes"), ()) if isinstance(known, dict) else ()
    return tuple(map(str, found)) if isinstance(found, list | tuple) else ()


def _named(dataset: Any) -> tuple[str, ...]:
    """Of the classes in the ``metainfo`` of a data set's config."""
    found = (_innermost(dataset).get("metainfo") or {}).get("classes", ())
    return tuple(map(str, found)) if isinstance(found, list | tuple) else ()


def _innermost(dataset: Any) -> Any:
    """The data set inside wrappers such as ClassBalancedDataset and ConcatDataset."""
    while inner := dataset.get("dataset") or next(iter(dataset.get("datasets") or ()), None):
        dataset = inner
    return dataset
