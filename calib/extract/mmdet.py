"""Adapter for mmdetection 3's two-stage detectors with StandardRoIHead (Faster and Mask R-CNN), unmodified.

The detector's own parts are called one after the other: pipeline, backbone, RPN, RoI head; a hook on ``fc_cls`` notes
its input (not that of ``bbox_head``, which is the pooled map). Background is last there too. mmdetection suppresses in
original pixels where it has no masks; IoU does not change when an axis is scaled, so that network pixels serve as well.
Letters: N proposals of one image, D feature size, C foreground classes.
"""

from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.boxes import clip, decode
from calib.cache import Classifier
from calib.cache.schema import Detector
from calib.errors import FormatError, InputError, MissingExtraError, UnsupportedError
from calib.extract.adapter import Image, Immediate, Replace, RoIs, Sampling
from calib.extract.weights import factory_arguments, load_weights
from calib.files import require

_INSTALL = "pip install openmim && mim install 'mmcv>=2.0,<2.2' mmdet"


class MMDetAdapter(Immediate):
    """Records RoIs of a detector in eval mode. ``pipeline`` turns {img: BGR array} into the model's input.

    Raises:
        UnsupportedError: another kind of model.
    """

    takes_proposals = True

    def __init__(self, model: Any, pipeline: Any, source: str, device: torch.device) -> None:
        self.model, self.pipeline = model.eval().to(device), pipeline
        _check_model(model)
        self._head = model.roi_head.bbox_head
        rcnn = (model.train_cfg or {}).get("rcnn") or {}
        assigner, sampler = rcnn.get("assigner", {}), rcnn.get("sampler", {})
        self.sampling = Sampling(
            float(assigner.get("pos_iou_thr", 0.5)),
            float(assigner.get("neg_iou_thr", 0.5)),
            int(sampler.get("num", 512)),
            float(sampler.get("pos_fraction", 0.25)),
        )
        test = model.roi_head.test_cfg
        self._agnostic = bool(self._head.reg_class_agnostic)
        self.detector = Detector(
            source=source,
            digest=self.classifier().digest(),
            num_classes=int(self._head.num_classes),
            feature_size=self._head.fc_cls.in_features,
            head_type="linear" if self.classifier().scale is None else "cosine",
            class_agnostic=self._agnostic,
            box_weights=tuple(round(1 / float(s), 6) for s in self._head.bbox_coder.stds),
            score_threshold=float(test.score_thr),
            nms_iou=float(test.nms.iou_threshold),
            max_detections=int(test.max_per_img),
        )

    def classifier(self, *, with_hidden: bool = False) -> Classifier:
        """fc_cls and fc_reg; of a NormedLinear with its temperature as ``scale``."""
        if with_hidden:
            self.map_shape()
        cls, reg = self._head.fc_cls, self._head.fc_reg
        temperature = getattr(cls, "tempearture", None)  # spelled so in mmdetection
        return Classifier(
            weight=_array(cls.weight),
            bias=None if cls.bias is None else _array(cls.bias),
            scale=None if temperature is None else np.asarray([temperature], np.float32),
            box_weight=_array(reg.weight),
            box_bias=_array(reg.bias),
        )

    def accepts(self, height: int, width: int) -> bool:
        """mmdetection's resizing keeps at least one pixel."""
        return height > 0 and width > 0

    def map_shape(self) -> tuple[int, int, int]:
        """
        Raises:
            UnsupportedError: always; RoI maps of mmdetection are not kept.
        """
        raise UnsupportedError("RoI maps are not kept for mmdetection", hint="extract without --roi-maps")

    def most_rows(self, mode: str) -> int:
        """From the RPN's cap on proposals and the box head's sample."""
        return self.sampling.rows_per_image if mode == "train" else int(self.model.test_cfg.rpn.max_per_img)

    @torch.no_grad()
    def rois(self, images: list[Image], replace: Replace | None = None, *, maps: bool = False) -> list[RoIs]:
        """Run the detector up to its classifier (see ``Adapter.launch``)."""
        if maps:
            self.map_shape()
        given = [self.pipeline({"img": np.ascontiguousarray(i[:, :, ::-1]), "img_id": 0}) for i in images]
        batch = {k: [g[k] for g in given] for k in ("inputs", "data_samples")}
        data = self.model.data_preprocessor(batch, False)
        levels = self.model.extract_feat(data["inputs"])
        metas = [sample.metainfo for sample in data["data_samples"]]
        rpn = self.model.rpn_head
        train = (self.model.train_cfg or {}).get("rpn_proposal")
        own = train if replace is not None and train is not None else self.model.test_cfg.rpn
        found = rpn.predict_by_feat(*rpn(levels), batch_img_metas=metas, cfg=own, rescale=False)
        boxes, scores = [f.bboxes for f in found], [_array(f.scores) for f in found]
        if replace is not None:
            for i, (meta, image) in enumerate(zip(metas, images, strict=True)):
                ratio = (meta["img_shape"][0] / image.shape[0], meta["img_shape"][1] / image.shape[1])
                new, scores[i] = replace(i, _array(boxes[i]), scores[i], ratio)
                boxes[i] = torch.from_numpy(new).to(boxes[i])
        features, logits, deltas = self._classified(levels, boxes)
        out, start = [], 0
        for own_boxes, objectness, meta in zip(boxes, scores, metas, strict=True):
            part = slice(start, start + len(own_boxes))
            proposals, size = _array(own_boxes), (int(meta["img_shape"][0]), int(meta["img_shape"][1]))
            refined = None
            if self._agnostic:
                moved = decode(deltas[part].reshape(-1, 1, 4), proposals, self.detector.box_weights)
                refined = clip(moved[:, 0], *size)
            out.append(RoIs(proposals, objectness, features[part], logits[part], refined, size))
            start = part.stop
        return out

    def _classified(self, levels: Any, boxes: list[Tensor]) -> tuple[Any, Any, Any]:
        """Features [N, D], logits [N, C+1] and deltas of the proposals of all images."""
        head = self._head
        if not sum(map(len, boxes)):
            return (np.empty((0, k), np.float32) for k in (head.fc_cls.in_features, head.num_classes + 1, 4))  # type: ignore[return-value]
        rois = torch.cat([torch.cat([b.new_full((len(b), 1), i), b], dim=1) for i, b in enumerate(boxes)])
        with _inputs(head.fc_cls) as seen:
            results = self.model.roi_head._bbox_forward(levels, rois)
        return _array(seen[0]), _array(results["cls_score"]), _array(results["bbox_pred"])


@contextmanager
def _inputs(layer: nn.Module) -> Any:
    """What ``layer`` is given, call by call."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _array(tensor: Tensor) -> Any:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def _check_model(model: Any) -> None:
    head = getattr(getattr(model, "roi_head", None), "bbox_head", None)
    kind = type(getattr(model, "roi_head", model)).__name__
    if isinstance(head, nn.ModuleList):
        raise UnsupportedError(
            f"{kind} averages the scores of {len(head)} stages with features of their own; a cache holds those of one",
            hint="a detector with StandardRoIHead, or rows of one stage as arrays: docs/raw.md",
        )
    if head is None or not all(isinstance(getattr(head, n, None), nn.Linear) for n in ("fc_cls", "fc_reg")):
        raise UnsupportedError(f"{kind} has no bbox_head with fc_cls and fc_reg", hint="as arrays: docs/raw.md")
    if head.custom_cls_channels or head.loss_cls.use_sigmoid:
        raise UnsupportedError(
            f"{type(head.loss_cls).__name__} makes scores of its own ({head.fc_cls.out_features} outputs); the cache "
            "knows softmax with background last",
            hint="sigmoid outputs can come as arrays: docs/raw.md",
        )
    coder = head.bbox_coder
    if getattr(head.fc_cls, "power", 1) != 1 or any(m != 0 for m in getattr(coder, "means", (1,))):
        raise UnsupportedError("a NormedLinear of power other than 1, or a box coder with means, is not supported")
    if model.roi_head.test_cfg.nms.get("type", "nms") != "nms":
        raise UnsupportedError(f"{model.roi_head.test_cfg.nms['type']} is not supported: expected nms")


def open_detector(spec: str, device: torch.device, *, weights: Path | None = None, arguments: str = "") -> MMDetAdapter:
    """Open a detector.

    Args:
        spec: a config (``.py``), which mmengine runs, as mmdetection's own tools do.
        device: where it runs.
        weights: ``.pth`` or ``.safetensors``; nothing in it is executed.
        arguments: JSON object of settings to change: ``{"model.roi_head.bbox_head.num_classes": 1203}``.

    Raises:
        MissingExtraError: mmdetection is not installed. MissingFileError, FormatError: see the messages.
        InputError: no weights. UnsupportedError: another kind of model.
    """
    try:
        import_module("mmcv.ops")
        registry, utils = import_module("mmdet.registry"), import_module("mmdet.utils")
    except ImportError:
        raise MissingExtraError("mmdetection 3 (with mmcv's operators)", "mmdet", hint=_INSTALL) from None
    changes = factory_arguments(arguments)
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
        raise FormatError(f"mmdetection config {path}: {e}") from e
    load_weights(model, weights)
    return MMDetAdapter(model, pipeline, f"mmdet:{path.name}", device)
