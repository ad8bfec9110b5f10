"""Adapter for torchvision's one-stage detectors (RetinaNet, FCOS, SSD, SSDLite and subclasses), unmodified.

Hooks note the inputs of the classifying convolutions; what enters ``postprocess_detections`` has logits, boxes and
anchors, and the forward pass ends there. FCOS's scores are geometric means of class and centredness: the cache has the
logit of that, beside the input of the classifier, so that heads work on scores as they are; folding back has no such
place. Letters: M places of a level (anchors counted apart), K outputs of an anchor, C classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.errors import InputError, UnsupportedError
from calib.extract.adapter import ClassRule, Image, Own
from calib.extract.dense import PER_LEVEL, SAMPLING, DenseAdapter, Level, layers_of
from calib.extract.modules import Recorded, recording, replaced
from calib.extract.staging import array, to_device
from calib.heads.blocks import Blocks

FIRST_HINT = "--detector-args '{\"first_label\": 0}'"
# By the name of the class, or of one that it is derived from.
KINDS = ("RetinaNet", "FCOS", "SSD")


def kind_of(model: Any) -> str:
    """Which of ``KINDS`` the model is; empty where it is none."""
    names = [c.__name__ for c in type(model).__mro__ if c.__module__.startswith("torchvision.models.detection")]
    return next((n for n in names if n in KINDS), "")


class TorchvisionDenseAdapter(DenseAdapter):
    """A one-stage detector in eval mode.

    ``first_label``: the label of the first class. torchvision's own weights and references count from 1: then output 0
    is of no class. (SSD's output 0 is background.)

    Raises:
        UnsupportedError: another kind of model. InputError: another first label.
    """

    def __init__(self, model: nn.Module, source: str, device: torch.device, first_label: int = 1) -> None:
        super().__init__(model, device)
        self.kind = kind_of(model)
        if not self.kind:
            raise UnsupportedError(f"{type(model).__name__} is no one-stage detector of torchvision that calib knows")
        if first_label not in (0, 1) or (self.kind == "SSD" and first_label != 1):
            raise InputError(f"first_label is {first_label}: expected 0 or 1; 1 of an SSD", hint=FIRST_HINT)
        self.first_label, self.sampling = first_label, SAMPLING
        self.classes = ClassRule(hint=f"labels from 0: {FIRST_HINT}")
        head = self.model.head.classification_head
        outputs = int(head.num_columns if self.kind == "SSD" else head.num_classes)
        columns = [*range(1, outputs), 0] if self.kind == "SSD" else range(first_label, outputs)
        self._convs = dict(_classifiers(self.model, self.kind))
        anchors = [int(conv.out_channels) // outputs for conv in self._convs.values()]
        layers = layers_of([*self._convs.items()], anchors)
        self.blocks = Blocks.of(layers, outputs, columns, is_linear=self.kind != "FCOS")
        self.most = 2**31 if self.kind == "SSD" else int(self.model.topk_candidates)
        self._describe(
            source,
            "softmax" if self.kind == "SSD" else "sigmoid",
            "FCOS multiplies by centredness behind its classifier" if self.kind == "FCOS" else "",
            background_first=self.kind == "SSD",
            score_threshold=float(self.model.score_thresh),
            nms_iou=float(self.model.nms_thresh),
            max_detections=int(self.model.detections_per_img),
        )

    def accepts(self, height: int, width: int) -> bool:
        """No side may be resized to nothing; an SSD has one input size and takes every picture."""
        t = self.model.transform
        short, long = min(height, width), max(height, width)
        return bool(t.fixed_size or short * min(min(t.min_size) / short, t.max_size / long) >= 1)

    def _most_candidates(self) -> int:
        """Of an SSD all its places; else what a level gives at most, of as many levels as the anchors have."""
        if self.kind == "SSD":
            ((_, levels),) = self._run([np.zeros((8, 8, 3), np.uint8)])
            return sum(len(level.boxes) for level in levels)
        return len(self.model.anchor_generator.sizes) * max(PER_LEVEL, self.most)

    @torch.no_grad()
    def detections(self, image: Image) -> Own:
        """The model's own (see ``Adapter.detections``)."""
        with _hooked(self.model, [], is_last=False) as seen:
            (found,) = self.model([to_device(image, self.device)])
        labels = found["labels"].cpu().numpy() - self.first_label
        chosen, score = labels >= 0, array(found["scores"])
        cut = self._cut(*seen)
        if not chosen.all():  # detections of no class took places
            cut = max(cut, float(score.min()))
        return Own(labels[chosen], score[chosen], array(found["boxes"])[chosen], cut=cut)

    @torch.no_grad()
    def _run(self, images: list[Image]) -> list[tuple[tuple[int, int], list[Level]]]:
        with _hooked(self.model, [*self._convs.values()]) as seen:
            self.model([to_device(i, self.device) for i in images])
        outputs, anchors, sizes, *inputs = seen
        levels = [self._levels(outputs, anchors, tuple(sizes[i]), inputs, i) for i in range(len(images))]
        return [((int(s[0]), int(s[1])), own) for s, own in zip(sizes, levels, strict=True)]

    def _levels(self, outputs: Any, anchors: Any, size: tuple[int, ...], inputs: list[Any], i: int) -> list[Level]:
        from torchvision.ops import clip_boxes_to_image

        decode = self.model.box_coder.decode if self.kind == "FCOS" else self.model.box_coder.decode_single
        logits, deltas, places, levels = self._logits(outputs, i), outputs["bbox_regression"], anchors[i], []
        if self.kind == "SSD":  # all levels in one
            layers = zip(inputs, self.blocks.layers, strict=True)
            counts = [g.shape[2] * g.shape[3] * layer.anchors for (_, g), layer in layers]
            deltas, places = torch.split(deltas, counts, 1), torch.split(places, counts)
            logits = [*torch.split(logits[0], counts)]
        convs = list(self._convs.values())
        for (conv, given), z, delta, place in zip(inputs, logits, deltas, places, strict=True):
            boxes = clip_boxes_to_image(decode(delta[i], place), size)
            levels.append(Level(conv, convs.index(conv), given[i], z, boxes))
        return levels

    def _logits(self, outputs: Any, i: int) -> list[Tensor]:
        """[M, columns] of every level of picture ``i`` (of an SSD, of all in one), whose activation are scores."""
        z, columns = outputs["cls_logits"], list(self.blocks.columns)
        levels = [t[i][:, columns].float() for t in (z if isinstance(z, list) else [z])]
        if self.kind != "FCOS":
            return levels
        return [_mean_logit(t, c[i].float()) for t, c in zip(levels, outputs["bbox_ctrness"], strict=True)]

    def _cut(self, outputs: Any, *_: Any) -> float:
        """Below which score candidates of the picture were left out, of a level or (SSD) of a class; 0: nowhere."""
        scores = [self.scores(z) for z in self._logits(outputs, 0)]
        lists = scores[0].T if self.kind == "SSD" else [s.flatten() for s in scores]
        kept = [s[s > self.detector.score_threshold] for s in lists]
        most = int(self.model.topk_candidates)
        return max((float(s.topk(most).values[-1]) for s in kept if len(s) > most), default=0.0)


def _mean_logit(z: Tensor, other: Tensor) -> Tensor:
    """The logit of sqrt(sigmoid(z) sigmoid(other))."""
    log = 0.5 * (nn.functional.logsigmoid(z) + nn.functional.logsigmoid(other))
    return log - (-torch.expm1(log.clamp(max=-1e-7))).log()


def _classifiers(model: Any, kind: str) -> Iterator[tuple[str, Any]]:
    """Names and convolutions: one for all levels, or (SSD) one for each, of an SSDLite the last of a block."""
    place, head = "head.classification_head", model.head.classification_head
    if kind != "SSD":
        yield f"{place}.cls_logits", head.cls_logits
        return
    for k, part in enumerate(head.module_list):
        last = len(part) - 1 if isinstance(part, nn.Sequential) else None
        name = f"{place}.module_list.{k}"
        yield (name, part) if last is None else (f"{name}.{last}", part[last])


@contextmanager
def _hooked(model: Any, convs: list[nn.Module], *, is_last: bool = True) -> Iterator[list[Any]]:
    """What enters ``postprocess_detections`` (outputs, anchors, sizes), then (convolution, its input) in order of
    calls; with ``is_last`` the forward pass ends there. All undone on exit."""
    seen: list[Any] = []
    inputs: list[Any] = []
    original = model.postprocess_detections

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append((module, args[0]))

    def enter(outputs: Any, anchors: Any, sizes: Any) -> Any:
        seen.extend([outputs, anchors, sizes, *inputs])
        if is_last:
            raise Recorded
        return original(outputs, anchors, sizes)

    handles = [conv.register_forward_pre_hook(note) for conv in convs]
    with replaced(model, postprocess_detections=enter), recording(*handles):
        yield seen
