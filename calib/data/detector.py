"""A small Faster R-CNN for the procedural set, and the file format that holds it.

It is torchvision's own ``FasterRCNN`` class with a 1.4 M-parameter residual FPN (strides 4, 8, 16), RoIAlign
6x6 and two fully connected layers, built to train in minutes on a CPU. Boxes are class-agnostic. Background
is class 0, as torchvision has it. Pictures of any size are taken: the longer side is scaled to
``image_size`` pixels; a picture that has that size already is not resampled.

A detector file is safetensors: float16 weights (BatchNorm statistics float32, since their ratio of mean to
spread can exceed what float16 resolves), and as metadata ``format``, ``version``, the ``factory`` that builds
the model and its ``kwargs`` as JSON (anchors and backbone among them, where they are not the default ones), and
the names of its ``classes``, if it was trained on a json with names. Only factories known here or to torchvision
are called: a file cannot run code.
"""

import importlib
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from calib.data.lite import LEVELS as LITE_LEVELS
from calib.data.lite import MEAN, STD, LiteBackbone
from calib.errors import (
    FormatError,
    MissingExtraError,
    NonFiniteError,
    SettingError,
    ShapeError,
    UnsupportedError,
    VersionError,
)
from calib.files import replacing, require

SHAPES_FACTORY = "calib.data.detector:shapes_detector"
_TORCHVISION = "torchvision.models.detection"
_FORMAT, _VERSION = "calib-detector", "1"
_WIDTHS = (24, 48, 96, 160)


def _convolution(inputs: int, outputs: int, stride: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions at half the resolution, beside a strided 1x1 shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, 2)
        self.second = _convolution(outputs, outputs, 1)
        self.shortcut = _convolution(inputs, outputs, 2, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H/2, W/2]"""
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


class Backbone(nn.Module):
    """Stem and three residual blocks under a feature pyramid: levels "0", "1", "2" at strides 4, 8, 16."""

    def __init__(self, pyramid: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.stem = _convolution(3, _WIDTHS[0], 2)
        self.blocks = nn.ModuleList(ResidualBlock(i, o) for i, o in pairwise(_WIDTHS))
        self.pyramid = pyramid
        self.out_channels = out_channels  # torchvision reads it

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] -> level name -> [B, out_channels, H/stride, W/stride]"""
        x = torch.relu(self.stem(x))
        levels = OrderedDict[str, Tensor]()
        for i, block in enumerate(self.blocks):
            x = block(x)
            levels[str(i)] = x
        out: dict[str, Tensor] = self.pyramid(levels)
        return out


SMALL, LITE = "small", "efficientnet-lite0"
# What builds it, widths of its three levels, mean and deviation of pixels in [0, 1].
BACKBONES: dict[str, tuple[type[Backbone | LiteBackbone], tuple[int, ...], float, float]] = {
    SMALL: (Backbone, _WIDTHS[1:], 0.5, 0.25),
    LITE: (LiteBackbone, tuple(LITE_LEVELS.values()), MEAN, STD),
}


class BoxHead(nn.Module):
    """Pooled RoI -> feature: two fully connected layers with ReLU."""

    def __init__(self, inputs: int, features: int) -> None:
        super().__init__()
        self.fc6 = nn.Linear(inputs, features)
        self.fc7 = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, 6, 6] -> [N, D]"""
        return torch.relu(self.fc7(torch.relu(self.fc6(x.flatten(1)))))


class AgnosticPredictor(nn.Module):
    """Linear classifier, and one box per RoI, repeated for every class as torchvision expects."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.cls_score = nn.Linear(features, num_classes)
        self.bbox_pred = nn.Linear(features, 4)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D] -> logits [N, 1+C] with background first, box deltas [N, 4 * (1+C)]"""
        return self.cls_score(x), self.bbox_pred(x).repeat(1, self.num_classes)


def shapes_detector(
    num_classes: int,
    *,
    image_size: int = 144,
    channels: int = 64,
    features: int = 256,
    proposals: int = 150,
    detections: int = 300,
    score_threshold: float = 1e-4,
    rois_per_image: int = 64,
    train_proposals: int = 120,
    anchors_per_image: int = 128,
    anchor_sizes: Sequence[Sequence[float]] = ((14,), (26,), (44,)),
    anchor_ratios: Sequence[float] = (0.6, 1.0, 1.6),
    roi_levels: int = 2,
    backbone: str = SMALL,
) -> nn.Module:
    """A torchvision ``FasterRCNN``, untrained. Defaults are for the procedural set, whose objects are 10 to 60 pixels.

    Args:
        num_classes: classes including background, as torchvision counts them.
        image_size: pixels; both the shorter and the longer side are scaled to fit.
        channels: of the feature pyramid.
        features: D, size of the classifier's input.
        proposals: kept per picture when detecting.
        detections, score_threshold: what detecting keeps after NMS at IoU 0.5.
        rois_per_image: sampled in training, at most half of them positive.
        train_proposals: kept per picture in training, of 2.5 times as many before NMS.
        anchors_per_image: sampled in training, at most half of them positive.
        anchor_sizes: square roots of the areas, in pixels, for each of the three levels, the finest first.
        anchor_ratios: height over width, for all levels.
        roi_levels: features of RoIs come from so many of the finer levels: the second for those of 64 pixels and more,
            the third from 128 pixels on.
        backbone: ``small``, or ``efficientnet-lite0`` (``calib.data.lite``), whose pictures are normalised as it wants.

    Raises:
        MissingExtraError: torchvision is not installed. SettingError: no such backbone, or not three levels.
    """
    try:
        from torchvision.models.detection import FasterRCNN
        from torchvision.models.detection.rpn import AnchorGenerator
        from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
    except ImportError as e:
        raise MissingExtraError("torchvision", "torchvision") from e
    if backbone not in BACKBONES:
        raise SettingError(f"backbone is '{backbone}': expected one of {', '.join(BACKBONES)}")
    if len(anchor_sizes) != 3 or roi_levels not in (1, 2, 3):
        raise SettingError(f"{len(anchor_sizes)} levels of anchors and {roi_levels} of RoIs: expected 3, and 1 to 3")
    pooled = 6
    kind, widths, mean, std = BACKBONES[backbone]
    ratios = (tuple(anchor_ratios),) * 3
    levels = [str(k) for k in range(roi_levels)]
    model: nn.Module = FasterRCNN(
        kind(FeaturePyramidNetwork(list(widths), channels), channels),
        num_classes=None,
        rpn_anchor_generator=AnchorGenerator(tuple(map(tuple, anchor_sizes)), ratios),
        box_roi_pool=MultiScaleRoIAlign(levels, pooled, 1, canonical_scale=32, canonical_level=2),
        box_head=BoxHead(channels * pooled**2, features),
        box_predictor=AgnosticPredictor(features, num_classes),
        min_size=image_size,
        max_size=image_size,
        image_mean=[mean] * 3,
        image_std=[std] * 3,
        rpn_pre_nms_top_n_train=5 * train_proposals // 2,
        rpn_post_nms_top_n_train=train_proposals,
        rpn_pre_nms_top_n_test=2 * proposals,
        rpn_post_nms_top_n_test=proposals,
        rpn_batch_size_per_image=anchors_per_image,
        box_batch_size_per_image=rois_per_image,
        box_positive_fraction=0.5,
        box_score_thresh=score_threshold,
        box_nms_thresh=0.5,
        box_detections_per_img=detections,
    )
    return model


def save_detector(
    model: nn.Module,
    path: Path,
    kwargs: dict[str, Any],
    *,
    factory: str = SHAPES_FACTORY,
    classes: Sequence[str] = (),
) -> None:
    """Write the weights of ``model`` with the factory and arguments that rebuild it, and the names of its foreground
    classes, if they are given, in their order.

    Raises:
        UnsupportedError: a factory that :func:`load_detector` would refuse.
        NonFiniteError: a weight is NaN, infinite, or beyond float16.
    """
    _factory(factory, path)
    tensors = {}
    for name, tensor in model.state_dict().items():
        is_half = tensor.is_floating_point() and not name.endswith(("running_mean", "running_var"))
        stored = tensor.detach().cpu().to(torch.float16 if is_half else tensor.dtype).contiguous()
        _require_finite(stored, name, path)
        tensors[name] = stored
    metadata = {"format": _FORMAT, "version": _VERSION, "factory": factory, "kwargs": json.dumps(kwargs)}
    if classes:
        metadata["classes"] = json.dumps(list(classes))
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))  # save_file would make it readable to its owner only


def load_detector(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the detector of ``path``: float32, in eval mode, with the arguments it was built from.

    Raises:
        MissingFileError: no such file.
        FormatError: truncated, not safetensors, or not a detector.
        VersionError: written by another version of the format.
        UnsupportedError: the file names a factory that is not allowed.
        ShapeError: the weights do not fit the model that the factory builds.
        NonFiniteError: a weight is NaN or infinite.
        MissingExtraError: torchvision is not installed.
    """
    metadata, tensors = _read(path)
    if metadata.get("format") != _FORMAT:
        raise FormatError(
            f"{path} is not a detector file: format is {metadata.get('format')!r}, expected '{_FORMAT}'",
            hint="give a file written by save_detector, such as the shipped shapes_detector.safetensors",
        )
    if metadata.get("version") != _VERSION:
        raise VersionError(
            f"{path} has version {metadata.get('version')!r} of the detector format, expected '{_VERSION}'",
            hint="write it again with this version of calib, or install the version that wrote it",
        )
    kwargs = _kwargs(metadata.get("kwargs", ""), path)
    model = _build(metadata.get("factory", ""), kwargs, path)
    for name, tensor in tensors.items():
        _require_finite(tensor, name, path)
    try:
        model.load_state_dict({k: t.float() if t.is_floating_point() else t for k, t in tensors.items()})
    except RuntimeError as e:
        raise ShapeError(
            f"the weights in {path} do not fit the model of {metadata['factory']}: {str(e).splitlines()[-1].strip()}",
            hint="the file was altered, or the factory has changed since: train or fetch the detector again",
        ) from e
    return model.eval(), kwargs


def class_names(path: Path) -> tuple[str, ...]:
    """The names of the foreground classes of a detector file, in their order; empty where it has none.

    Raises:
        MissingFileError, FormatError: not there, or damaged.
    """
    require(path, "detector")
    with _opening(path), safe_open(path, framework="pt") as f:
        metadata = f.metadata() or {}
    try:
        names = json.loads(metadata.get("classes", "[]"))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"{path}: 'classes' of the metadata must be a list of names")
    return tuple(names)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    require(path, "detector")
    with _opening(path), safe_open(path, framework="pt") as f:
        return f.metadata() or {}, load_file(path)


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as e:
        raise FormatError(
            f"{path} is truncated or not a safetensors file: {e}", hint="copy or download the file again"
        ) from e


def _kwargs(text: str, path: Path) -> dict[str, Any]:
    try:
        kwargs = json.loads(text)
    except ValueError:
        kwargs = None
    if not isinstance(kwargs, dict):
        raise FormatError(f"{path}: 'kwargs' of the metadata must be a JSON object, got {text[:80]!r}")
    return kwargs


def _factory(name: str, path: Path) -> Callable[..., nn.Module]:
    """The function that ``name`` ("module:function") means, if it is one of those that a file may call."""
    if name == SHAPES_FACTORY:
        return shapes_detector
    module, _, function = name.partition(":")
    if module == _TORCHVISION:
        try:
            detection = importlib.import_module(_TORCHVISION)
            models = importlib.import_module("torchvision.models")
        except ImportError as e:
            raise MissingExtraError("torchvision", "torchvision") from e
        if function in models.list_models(module=detection):
            builder: Callable[..., nn.Module] = getattr(detection, function)
            return builder
    raise UnsupportedError(
        f"{path} names the factory {name!r}, which a detector file may not call",
        hint=f"allowed: {SHAPES_FACTORY}, and the model functions of {_TORCHVISION}",
    )


def _build(name: str, kwargs: dict[str, Any], path: Path) -> nn.Module:
    builder = _factory(name, path)
    if name != SHAPES_FACTORY:
        # The file's own weights follow: nothing may be fetched from the network for them.
        fetching = {k: None for k in ("weights", "weights_backbone") if k in inspect.signature(builder).parameters}
        kwargs = {**kwargs, **fetching}
    try:
        return builder(**kwargs)
    except (TypeError, ValueError) as e:
        raise FormatError(f"{path}: {name} does not take the arguments {json.dumps(kwargs)}: {e}") from e


def _require_finite(tensor: Tensor, name: str, path: Path) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(
            f"{path}: weight '{name}' holds NaN or infinity",
            hint="the training diverged, or the file is damaged: lower the learning rate, or copy it again",
        )
