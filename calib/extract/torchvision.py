"""Adapter for torchvision's two-stage detectors (FasterRCNN, MaskRCNN and subclasses), unmodified.

Hooks record what passes: the proposals entering ``roi_heads``, the objectness from ``rpn.filter_proposals``, the input
of ``roi_heads.box_predictor``; the forward pass ends there. Under autocast the predictor still runs in float32, so that
cached features times the cached classifier are the cached logits. torchvision keeps background first; everything
leaving this file has it last. Letters: N proposals of one image, D feature size, C foreground classes.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calib.boxes import Boxes, rescale
from calib.cache import Classifier
from calib.cache.schema import Detector
from calib.errors import InputError, MissingExtraError, UnknownNameError, UnsupportedError
from calib.extract.adapter import (
    MASKS_AT_ONCE,
    Adapter,
    ClassRule,
    Image,
    MaskBranch,
    Own,
    Replace,
    RoIMap,
    RoIs,
    Sampling,
)
from calib.extract.modules import Recorded, recording, replaced
from calib.extract.staging import Staged, array, to_device
from calib.extract.torchvision_dense import TorchvisionDenseAdapter, kind_of
from calib.extract.weights import built, factory_arguments, imported, load_weights, names_in

MASK_THRESHOLD = 0.5  # of the probability; He et al., Mask R-CNN, ICCV 2017, Sec. 3.1
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchvisionAdapter(Adapter):
    """Records RoIs of a torchvision detector in eval mode.

    Raises:
        UnsupportedError: the model is no two-stage detector with a linear classifier.
    """

    needs = ("rpn", "roi_heads.box_head")
    linear = ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred")
    precisions = ("fp32", *AUTOCAST)

    def __init__(self, model: nn.Module, source: str, device: torch.device) -> None:
        super().__init__(model, device)
        heads: Any = self.model.roi_heads
        matcher, sampler = heads.proposal_matcher, heads.fg_bg_sampler
        self.sampling = Sampling(
            float(matcher.high_threshold),
            float(matcher.low_threshold),
            int(sampler.batch_size_per_image),
            float(sampler.positive_fraction),
        )
        self._agnostic = heads.box_predictor.bbox_pred.out_features <= 4
        self.detector = self._describe(source)

    def _describe(self, source: str) -> Detector:
        heads, transform = self.model.roi_heads, self.model.transform
        outputs, feature_size = heads.box_predictor.cls_score.weight.shape
        return Detector(
            source=source,
            digest=self.classifier().digest(),
            num_classes=outputs - 1,
            feature_size=feature_size,
            background_first=True,
            class_agnostic=self._agnostic,
            box_weights=tuple(float(w) for w in heads.box_coder.weights),
            score_threshold=float(heads.score_thresh),
            nms_iou=float(heads.nms_thresh),
            max_detections=int(heads.detections_per_img),
            min_box_side=1e-2,  # torchvision's postprocess_detections removes smaller boxes
            settings={"min_size": list(transform.min_size), "max_size": transform.max_size},
        )

    def classifier(self) -> Classifier:
        """cls_score and bbox_pred with the background row moved last (and left out of class-specific boxes)."""
        score, box = self.model.roi_heads.box_predictor.cls_score, self.model.roi_heads.box_predictor.bbox_pred
        own = slice(None) if self._agnostic else slice(4, None)
        weight, bias = (array(rows.roll(-1, dims=0)) for rows in (score.weight, score.bias))
        return Classifier(weight, bias, None, array(box.weight)[own], array(box.bias)[own])

    def accepts(self, height: int, width: int) -> bool:
        """No side may be resized to nothing, as it is for 3 x 6000 pixels and a longest side of 1333."""
        transform = self.model.transform
        short, long = min(height, width), max(height, width)
        return bool(short * min(min(transform.min_size) / short, transform.max_size / long) >= 1)

    @property
    def roi_map(self) -> RoIMap | None:
        """Of a TwoMLPHead (fc6, fc7)."""
        heads = self.model.roi_heads
        fc6, fc7 = (getattr(heads.box_head, name, None) for name in ("fc6", "fc7"))
        is_known = isinstance(fc6, nn.Linear) and isinstance(fc7, nn.Linear)
        return RoIMap.of(heads.box_roi_pool.output_size, (fc6, fc7)) if is_known else None

    def most_rows(self, mode: str) -> int:
        """From the RPN's cap on proposals and the box head's sample."""
        if mode == "train":
            return self.sampling.rows_per_image
        return int(self.model.rpn._post_nms_top_n["testing"])

    @torch.no_grad()
    def launch(
        self, images: list[Image], replace: Replace | None = None, *, maps: bool = False
    ) -> Callable[[], list[RoIs]]:
        """Run the detector up to its classifier (see ``Adapter.launch``)."""
        seen = _Record([i.shape[:2] for i in images], replace)
        with _hooked(self.model, seen), self._autocast():
            self.model([to_device(i, self.device) for i in images])
        features = seen.features.float()
        logits, deltas = self.model.roi_heads.box_predictor(features)
        flat = {"features": features, "logits": logits.roll(-1, dims=1)}
        flat |= {"proposals": torch.cat(seen.proposals), "objectness": torch.cat(seen.objectness)}
        if self._agnostic:
            flat["refined"] = self._refined(deltas, seen)
        if maps:
            flat["maps"] = seen.maps.flatten(1)
        staged, counts = Staged(flat), [len(p) for p in seen.proposals]
        return lambda: RoIs(**dict[str, Any](staged.arrays())).split(counts, seen.net_sizes)

    @torch.no_grad()
    def detections(self, image: Image) -> Own:
        """The model's own (see ``Adapter.detections``)."""
        with self._autocast():
            (found,) = self.model([to_device(image, self.device)])
        labels = found["labels"].cpu().numpy() - 1  # background is 0
        return Own(labels, array(found["scores"]), array(found["boxes"]))

    @property
    def mask_branch(self) -> MaskBranch | None:
        """Mask R-CNN's, class-specific or, with one output channel, class-agnostic (see ``Adapter.mask_branch``)."""
        heads = self.model.roi_heads
        return self._masks if hasattr(heads, "has_mask") and heads.has_mask() else None

    @torch.no_grad()
    def _masks(self, image: Image, boxes: Boxes, category: NDArray[np.int64]) -> Iterator[NDArray[np.bool_]]:
        from torchvision.models.detection.roi_heads import maskrcnn_inference, paste_masks_in_image

        heads, size = self.model.roi_heads, (image.shape[0], image.shape[1])
        images, _ = self.model.transform([to_device(image, self.device)])
        network = torch.from_numpy(rescale(boxes, size, images.image_sizes[0])).to(self.device)
        levels = self.model.backbone(images.tensors)
        levels = {"0": levels} if isinstance(levels, Tensor) else levels
        logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(levels, [network], images.image_sizes)))
        outputs = self.detector.num_classes + 1
        if logits.shape[1] not in (1, outputs):
            raise UnsupportedError(
                f"the mask branch has {logits.shape[1]} outputs: expected 1, or {outputs} with background"
            )
        label = torch.from_numpy(category).to(self.device) + 1  # class 0 of torchvision is background
        (found,) = maskrcnn_inference(logits, [label if logits.shape[1] > 1 else torch.zeros_like(label)])
        for start in range(0, len(boxes), MASKS_AT_ONCE):
            part = slice(start, start + MASKS_AT_ONCE)
            pasted = paste_masks_in_image(found[part].cpu(), torch.from_numpy(boxes[part].copy()), size)
            yield from (pasted[:, 0] > MASK_THRESHOLD).numpy()

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST.get(self.precision, torch.bfloat16)
        return torch.autocast(self.device.type, dtype, enabled=self.precision in AUTOCAST)

    def _refined(self, deltas: Tensor, seen: "_Record") -> Tensor:
        """[N, 4] of all images: the boxes of the last class, clipped to the image."""
        from torchvision.ops import clip_boxes_to_image

        decoded = self.model.roi_heads.box_coder.decode(deltas, seen.proposals)[:, -1]  # [N, K, 4] -> [N, 4]
        parts = decoded.split([len(p) for p in seen.proposals])
        return torch.cat([clip_boxes_to_image(p, s) for p, s in zip(parts, seen.net_sizes, strict=True)])


class _Record:
    """What the hooks saw in one forward pass."""

    def __init__(self, original_sizes: list[Any], replace: Replace | None) -> None:
        self.original_sizes, self.replace = original_sizes, replace
        self.proposals: list[Tensor] = []
        self.objectness: list[Tensor] = []
        self.net_sizes: list[tuple[int, int]] = []
        self.features = self.maps = torch.empty(0)

    def enter_heads(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before ``roi_heads``: note the proposals, exchange them when asked to."""
        features, proposals, sizes, *rest = args
        self.net_sizes = [(int(height), int(width)) for height, width in sizes]
        self.proposals = list(proposals)
        if self.replace is not None:
            for i, (boxes, scores) in enumerate(zip(proposals, self.objectness, strict=True)):
                ratio = tuple(n / o for n, o in zip(sizes[i], self.original_sizes[i], strict=True))
                new, objectness = self.replace(i, array(boxes), array(scores), ratio)
                self.proposals[i] = torch.from_numpy(new).to(boxes)
                self.objectness[i] = torch.from_numpy(objectness).to(boxes)
        return (features, self.proposals, sizes, *rest)

    def enter_box_head(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Before ``box_head``: note the pooled RoI maps."""
        self.maps = args[0]

    def enter_predictor(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Before ``box_predictor``: note its input, and stop."""
        self.features = args[0].flatten(1)
        raise Recorded


def _in_float32(module: nn.Module, args: Any, outputs: tuple[list[Tensor], ...]) -> tuple[list[Tensor], ...]:
    """After ``rpn.head``: under autocast torchvision would decode its boxes in half precision, pixels beside them."""
    return tuple([t.float() for t in part] for part in outputs)


@contextmanager
def _hooked(model: Any, seen: _Record) -> Iterator[None]:
    """Hook the model; with ``seen.replace`` let the RPN keep as many proposals as in training. All undone on exit."""
    filter_proposals = model.rpn.filter_proposals

    def noting(*args: Any, **kwargs: Any) -> Any:
        boxes, scores = filter_proposals(*args, **kwargs)
        seen.objectness = list(scores)
        return boxes, scores

    patches: dict[str, Any] = {"filter_proposals": noting}
    if seen.replace is not None:
        patches["pre_nms_top_n"] = lambda: model.rpn._pre_nms_top_n["training"]
        patches["post_nms_top_n"] = lambda: model.rpn._post_nms_top_n["training"]
    handles = (
        model.rpn.head.register_forward_hook(_in_float32),
        model.roi_heads.register_forward_pre_hook(seen.enter_heads),
        model.roi_heads.box_head.register_forward_pre_hook(seen.enter_box_head),
        model.roi_heads.box_predictor.register_forward_pre_hook(seen.enter_predictor),
    )
    with replaced(model.rpn, **patches), recording(*handles):
        yield


def open_detector(
    spec: str, device: torch.device, *, weights: Path | None = None, arguments: str = ""
) -> TorchvisionAdapter | TorchvisionDenseAdapter:
    """Open a detector, of two stages or one.

    Args:
        spec: a ``.safetensors`` checkpoint that carries its own factory, the name of a function of
            ``torchvision.models.detection``, or ``package.module:factory``.
        device: where it runs.
        weights: state dict for a factory, ``.safetensors`` (or ``.pth``, read without executing its content).
        arguments: JSON object of keyword arguments for a factory.

    Raises:
        MissingExtraError: torchvision is not installed. MissingFileError, FormatError: see the messages.
        UnknownNameError: no such factory. InputError: arguments or weights that do not fit.
    """
    try:
        import_module("torchvision")
    except ImportError:
        raise MissingExtraError("torchvision", "torchvision") from None
    if spec.endswith(".safetensors") or Path(spec).is_file():
        if weights is not None or arguments:
            raise InputError(
                f"{spec} is a checkpoint with its own weights and settings",
                hint="--weights and --detector-args go with a factory: torchvision:package.module:function",
            )
        from calib.data.detector import class_names, load_detector

        model, _ = load_detector(Path(spec))
        own = TorchvisionAdapter(model, f"torchvision:{Path(spec).name}", device)
        own.classes = ClassRule(hints=class_names(Path(spec)))
        return own
    keywords = factory_arguments(arguments)
    first_label = keywords.pop("first_label", 1)
    model = _build(spec, keywords, has_weights=weights is not None)
    names = () if weights is None else names_in(load_weights(model, weights).document)
    adapter: TorchvisionAdapter | TorchvisionDenseAdapter
    if kind_of(model):
        adapter = TorchvisionDenseAdapter(model, f"torchvision:{spec}", device, first_label)
    else:
        adapter = TorchvisionAdapter(model, f"torchvision:{spec}", device)
    hints = names or _names_of(spec, adapter.detector.num_classes + 1)
    adapter.classes = replace(adapter.classes, hints=hints)
    return adapter


def _names_of(spec: str, outputs: int) -> tuple[str, ...]:
    """What torchvision calls the outputs of its own weights for ``spec``, if they are as many."""
    from torchvision.models import get_model_weights

    try:
        names = tuple(get_model_weights(spec).DEFAULT.meta["categories"])
    except (ValueError, KeyError, AttributeError):
        return ()
    return names if len(names) == outputs else ()


def _build(spec: str, keywords: dict[str, Any], *, has_weights: bool) -> nn.Module:
    from torchvision.models import detection

    if ":" not in spec:
        known = [n for n in dir(detection) if re.match(r"[a-z]+rcnn_|retinanet_|fcos_|ssd\d|ssdlite\d", n)]
        if spec not in known:
            raise UnknownNameError("torchvision detector", spec, known)
        if not has_weights and keywords.get("weights") is None:
            raise InputError(
                f"torchvision:{spec} without weights is an untrained detector",
                hint="add --weights FILE of your training",
            )
        # Without weights torchvision would try to download those of the backbone.
        keywords = {"weights": None, "weights_backbone": None} | keywords
    return built(spec, getattr(detection, spec) if ":" not in spec else imported(spec), keywords)
