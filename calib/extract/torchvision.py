"""Adapter for torchvision's two-stage detectors (FasterRCNN, MaskRCNN and subclasses), unmodified.

Hooks record what passes: the proposals entering ``roi_heads``, the objectness from ``rpn.filter_proposals``, the input
and output of ``roi_heads.box_predictor``; the forward pass ends there. torchvision keeps background first; everything
leaving this file has it last. Letters: N proposals of one image, D feature size, C foreground classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.boxes import Boxes
from calib.cache import Classifier
from calib.cache.schema import Detector
from calib.errors import InputError, MissingExtraError, UnknownNameError, UnsupportedError
from calib.extract.adapter import Image, Replace, RoIs, Sampling
from calib.extract.weights import factory_arguments, load_weights
from calib.registry import load as load_target


class _Done(Exception):  # noqa: N818
    """Raised by the last hook: nothing after the classifier is needed."""


class TorchvisionAdapter:
    """Records RoIs of a torchvision detector in eval mode.

    Raises:
        UnsupportedError: the model is no two-stage detector with a linear classifier.
    """

    takes_proposals = True

    def __init__(self, model: nn.Module, source: str, device: torch.device) -> None:
        self.model: Any = model.eval().to(device)
        self.device = device
        _check_model(model)
        heads: Any = self.model.roi_heads
        matcher, sampler = heads.proposal_matcher, heads.fg_bg_sampler
        self.sampling = Sampling(
            float(matcher.high_threshold),
            float(matcher.low_threshold),
            int(sampler.batch_size_per_image),
            float(sampler.positive_fraction),
        )
        self._agnostic = _regression(heads.box_predictor).out_features <= 4
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

    def classifier(self, *, with_hidden: bool = False) -> Classifier:
        """cls_score and bbox_pred with the background row moved last (and left out of class-specific boxes)."""
        predictor = self.model.roi_heads.box_predictor
        regression = _regression(predictor)
        box_weight, box_bias = _array(regression.weight), _array(regression.bias)
        if not self._agnostic:
            box_weight, box_bias = box_weight[4:], box_bias[4:]
        score = predictor.cls_score
        hidden = self._hidden() if with_hidden else {}
        bias = _background_last(score.bias)
        return Classifier(_background_last(score.weight), bias, None, box_weight, box_bias, **hidden)

    def _hidden(self) -> dict[str, Any]:
        """fc6 and fc7 of a TwoMLPHead."""
        layers = [getattr(self.model.roi_heads.box_head, name, None) for name in ("fc6", "fc7")]
        if not all(isinstance(layer, nn.Linear) for layer in layers):
            raise UnsupportedError(
                "RoI maps are kept for detectors with a two-layer box head (fc6, fc7); this one has "
                f"{type(self.model.roi_heads.box_head).__name__}"
            )
        parts = {"weight", "bias"}
        return {f"fc{i}_{p}": _array(getattr(layer, p)) for i, layer in enumerate(layers, start=1) for p in parts}

    def accepts(self, height: int, width: int) -> bool:
        """No side may be resized to nothing, as it is for 3 x 6000 pixels and a longest side of 1333."""
        transform = self.model.transform
        short, long = min(height, width), max(height, width)
        return bool(short * min(min(transform.min_size) / short, transform.max_size / long) >= 1)

    def map_shape(self) -> tuple[int, int, int]:
        """From the RoI pooler's size and the width of fc6."""
        height, width = self.model.roi_heads.box_roi_pool.output_size
        fc6_width = self._hidden()["fc1_weight"].shape[1]
        return fc6_width // (height * width), height, width

    @torch.no_grad()
    def rois(self, images: list[Image], replace: Replace | None = None, *, maps: bool = False) -> list[RoIs]:
        """Run the detector up to its classifier (see ``Adapter.rois``)."""
        tensors = [torch.from_numpy(i).to(self.device).permute(2, 0, 1).float().div_(255) for i in images]
        seen = _Record([i.shape[:2] for i in images], replace)
        with _recording(self.model, seen), suppress(_Done):
            self.model(tensors)
        return self._split(seen, maps=maps)

    def _split(self, seen: "_Record", *, maps: bool) -> list[RoIs]:
        coder = self.model.roi_heads.box_coder
        counts = [len(p) for p in seen.proposals]
        refined = coder.decode(seen.deltas, seen.proposals) if self._agnostic else None  # [N, K, 4]
        out = []
        start = 0
        for i, n in enumerate(counts):
            part = slice(start, start + n)
            size = (int(seen.net_sizes[i][0]), int(seen.net_sizes[i][1]))
            boxes = None if refined is None else _clipped(refined[part, -1], size)
            logits = _background_last(seen.logits[part].T).T
            features = _array(seen.features[part])
            kept = _array(seen.maps[part].flatten(1)) if maps else None
            proposals, objectness = _array(seen.proposals[i]), _array(seen.objectness[i])
            out.append(RoIs(proposals, objectness, features, logits, boxes, size, kept))
            start += n
        return out


class _Record:
    """What the hooks saw in one forward pass."""

    def __init__(self, original_sizes: list[Any], replace: Replace | None) -> None:
        self.original_sizes, self.replace = original_sizes, replace
        self.proposals: list[Tensor] = []
        self.objectness: list[Tensor] = []
        self.net_sizes: list[tuple[int, int]] = []
        self.features = self.logits = self.deltas = self.maps = torch.empty(0)

    def enter_heads(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before ``roi_heads``: note the proposals, exchange them when asked to."""
        features, proposals, sizes, *rest = args
        self.net_sizes = list(sizes)
        self.proposals = list(proposals)
        if self.replace is not None:
            for i, (boxes, scores) in enumerate(zip(proposals, self.objectness, strict=True)):
                ratio = tuple(n / o for n, o in zip(sizes[i], self.original_sizes[i], strict=True))
                new, objectness = self.replace(i, _array(boxes), _array(scores), ratio)
                self.proposals[i] = torch.from_numpy(new).to(boxes)
                self.objectness[i] = torch.from_numpy(objectness).to(boxes)
        return (features, self.proposals, sizes, *rest)

    def enter_box_head(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Before ``box_head``: note the pooled RoI maps."""
        self.maps = args[0]

    def leave_predictor(self, module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        """After ``box_predictor``: note its input and output, and stop."""
        self.features = args[0].flatten(1)
        self.logits, self.deltas = output
        raise _Done


@contextmanager
def _recording(model: Any, seen: _Record) -> Iterator[None]:
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
    handles = [
        model.roi_heads.register_forward_pre_hook(seen.enter_heads),
        model.roi_heads.box_head.register_forward_pre_hook(seen.enter_box_head),
        model.roi_heads.box_predictor.register_forward_hook(seen.leave_predictor),
    ]
    vars(model.rpn).update(patches)
    try:
        yield
    finally:
        for name in patches:
            vars(model.rpn).pop(name)
        for handle in handles:
            handle.remove()


def _array(tensor: Tensor) -> Any:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def _background_last(rows: Tensor) -> Any:
    """[C+1, ...] with background first -> background last."""
    return _array(rows.roll(-1, dims=0))


def _clipped(boxes: Tensor, size: tuple[int, int]) -> Boxes:
    from torchvision.ops import clip_boxes_to_image

    clipped: Boxes = _array(clip_boxes_to_image(boxes, size))
    return clipped


def _regression(predictor: Any) -> Any:
    return predictor.bbox_pred


def _check_model(model: Any) -> None:
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    layers = [getattr(predictor, name, None) for name in ("cls_score", "bbox_pred")]
    has_parts = hasattr(model, "rpn") and hasattr(getattr(model, "roi_heads", None), "box_head")
    if not has_parts or not all(isinstance(x, nn.Linear) for x in layers):
        raise UnsupportedError(
            f"{type(model).__name__} is no two-stage torchvision detector: expected rpn and roi_heads.box_predictor "
            "with linear cls_score and bbox_pred"
        )


def open_detector(
    spec: str, device: torch.device, *, weights: Path | None = None, arguments: str = ""
) -> TorchvisionAdapter:
    """Open a detector.

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
        from calib.data.detector import load_detector

        model, _ = load_detector(Path(spec))
        return TorchvisionAdapter(model, f"torchvision:{Path(spec).name}", device)
    model = _build(spec, arguments, has_weights=weights is not None)
    if weights is not None:
        load_weights(model, weights)
    return TorchvisionAdapter(model, f"torchvision:{spec}", device)


def _build(spec: str, arguments: str, *, has_weights: bool) -> nn.Module:
    from torchvision.models import detection

    keywords = factory_arguments(arguments)
    if ":" not in spec:
        known = [n for n in dir(detection) if "rcnn_" in n]
        if spec not in known:
            raise UnknownNameError("torchvision detector", spec, known)
        if not has_weights and keywords.get("weights") is None:
            raise InputError(
                f"torchvision:{spec} without weights is an untrained detector",
                hint="add --weights FILE of your training",
            )
        # Without weights torchvision would try to download those of the backbone.
        keywords = {"weights": None, "weights_backbone": None} | keywords
    try:
        factory = getattr(detection, spec) if ":" not in spec else load_target(spec)
        model = factory(**keywords)
    except (ImportError, AttributeError) as e:
        raise InputError(
            f"detector factory '{spec}' cannot be imported: {e}", hint="torchvision:package.module:function"
        ) from e
    except (TypeError, ValueError) as e:
        raise InputError(f"detector factory '{spec}' refused {keywords}: {e}", hint="--detector-args") from e
    if not isinstance(model, nn.Module):
        raise InputError(f"detector factory '{spec}' returned {type(model).__name__}: expected a torch module")
    return model
