"""A head inside a live detector: modules that give the detector's own activation what brings the head's scores out.

Detectors put class logits through a softmax (or sigmoids). Eq. (softmax): z_c = log(score_c / S) for foreground c,
z_bg = log(1 - sum_c score_c / S); then softmax(z)_c = score_c / S. S (``scale``) is 1 unless the foreground of some row
sums to more than 1, as the scores of sigmoids, groups and of two heads may: no softmax can give these, but it can give
all of them divided by one number, which changes neither ranks nor AP; thresholds on scores are then divided by S, too.
A row that sums to more than S is divided by its own sum. Eq. (sigmoid): z_c = log(score_c / (1 - score_c)), exact.

Letters: N proposals, D feature size, C foreground classes.
"""

from collections.abc import Callable
from math import ceil, log2
from typing import Any

import torch
from torch import Tensor, nn

from calib.artifact import Artifact
from calib.cache import Classifier
from calib.errors import UnsupportedError
from calib.heads.base import Head


class CalibratedLogits(nn.Module):
    """In place of a classification layer (``cls_score``, ``fc_cls``): what its activation turns into scores."""

    scale: Tensor  # S, in the state of the module and of programs made of it

    def __init__(self, artifact: Artifact, scale: float = 1.0) -> None:
        super().__init__()
        self.head: Head = artifact.head
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.sigmoid = artifact.info.detector.get("activation") == "sigmoid"
        # Detectron2 has a background column beside sigmoids, too, and cuts off the last one.
        self.padding = int(self.sigmoid and str(artifact.info.detector.get("source", "")).startswith("detectron2:"))
        self.background_first = bool(artifact.info.detector.get("background_first"))

    def forward(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, C+1] with background where the detector has it; of a sigmoid detector of mmdetection [N, C]."""
        scores = self.head.full_scores(features.flatten(1).float())[:, :-1]
        if self.sigmoid:
            s = scores.clamp(torch.finfo(scores.dtype).tiny, 1 - torch.finfo(scores.dtype).eps)
            return nn.functional.pad(s.log() - (-s).log1p(), (0, self.padding))
        scores = scores / self.scale
        background = 1 - scores.sum(dim=1, keepdim=True)
        parts = [background, scores] if self.background_first else [scores, background]
        return torch.cat(parts, dim=1).clamp_min(torch.finfo(scores.dtype).tiny).log()

    def scores(self, logits: Tensor) -> Tensor:
        """[N, C+1] what this module gave -> [N, C] what the detector makes of it, times S."""
        if self.sigmoid:
            return logits.sigmoid()[:, : logits.shape[1] - self.padding]
        p = logits.softmax(dim=1)
        return self.scale * (p[:, 1:] if self.background_first else p[:, :-1])


def check_proved(proof: dict[str, Any], what: str) -> None:
    """Whether a head may go into the detector of ``what``, a cache with this ``proof``; empty: there was no detector.

    Raises:
        UnsupportedError: a detector was there, and none of its own detections was looked at.
    """
    if proof and not proof.get("detections"):
        raise UnsupportedError(
            f"{what} was not compared with detections of the detector itself (--check-images 0, or there were none): "
            "one that makes scores in a way of its own would not give those of the head",
            hint="extract a few images with --check-images 4 and use that cache; without the detector: --to onnx, "
            "torch, torchscript, triton",
        )


def scale_for(scores: Tensor) -> float:
    """[N, C] -> S: 1, or the power of two at or above the largest sum of a row."""
    largest = float(scores.sum(dim=1).max())
    return 1.0 if largest <= 1 + 1e-4 else float(2 ** ceil(log2(largest)))


class Predictor(nn.Module):
    """In place of ``roi_heads.box_predictor``, with nothing of calib once it is exported: class logits and box deltas.

    For a head on RoI maps it takes the pooled maps, flattened: ``box_head`` is then ``torch.nn.Flatten()``.
    """

    def __init__(self, logits: CalibratedLogits, classifier: Classifier, *, class_agnostic: bool) -> None:
        """
        Raises:
            UnsupportedError: the cache does not know how the detector regresses boxes.
        """
        super().__init__()
        if classifier.box_weight is None or classifier.box_bias is None:
            raise UnsupportedError(
                "the cache has no box regression, which a box predictor needs",
                hint="calib.export.predictor.calibrate works in the live model",
            )
        self.logits = logits
        self.box = _linear(classifier.box_weight, classifier.box_bias)
        self.hidden = nn.ModuleList()
        if logits.head.inputs == "maps":
            c = classifier
            self.hidden.extend([_linear(c.fc1_weight, c.fc1_bias), _linear(c.fc2_weight, c.fc2_bias)])
        # torchvision has deltas for background as well, first, and repeats those of class-agnostic boxes.
        torchvision = logits.background_first
        self.repeats = logits.head.num_classes + 1 if torchvision and class_agnostic else 1
        self.padding = 4 if torchvision and not class_agnostic else 0

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D] -> logits [N, C+1], deltas [N, 4 * (C+1)] (background last: [N, 4] or [N, 4 * C])."""
        x = features.flatten(1)
        logits = self.logits(x)
        for layer in self.hidden:
            x = layer(x).relu()
        deltas = self.box(x).repeat(1, self.repeats)
        return logits, nn.functional.pad(deltas, (self.padding, 0))


def _linear(weight: Any, bias: Any) -> nn.Linear:
    layer = nn.Linear(*weight.shape[::-1])
    layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    return layer


class LivePredictor(nn.Module):
    """A live ``box_predictor`` with calibrated logits; all else, such as Detectron2's ``inference``, stays its own."""

    def __init__(self, predictor: nn.Module, logits: CalibratedLogits) -> None:
        super().__init__()
        self.predictor, self.logits = predictor, logits
        self.maps: Tensor | None = None  # the pooled maps of this pass, for heads that take them

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("predictor"), name)

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """[N, D] -> logits [N, C+1] and whatever else the predictor gives, box deltas first."""
        z, *rest = self.predictor(features)
        logits = self.logits(features if self.maps is None else self.maps).to(z.dtype)
        return nn.functional.pad(logits, (0, z.shape[1] - logits.shape[1])), *rest  # Detectron2's, beside sigmoids


def calibrate(model: Any, artifact: Artifact) -> Callable[[], None]:
    """Let a live torchvision or Detectron2 model score with a head, in place; the result undoes it.

    Scores that sum to more than 1 go through the model's softmax divided by a bound of all sums, as its threshold then
    is; the model's detections have the head's scores again.

    Args:
        model: with ``roi_heads.box_head`` and ``roi_heads.box_predictor``, the detector that the head was fitted for.
        artifact: the head.

    Raises:
        UnsupportedError: no such parts, a cascade of predictors, or a head whose cache has no proof.
    """
    check_proved(artifact.info.detector.get("proof", {}), "the cache that this head was trained on")
    heads = getattr(model, "roi_heads", None)
    predictor = getattr(heads, "box_predictor", None)
    if heads is None or not isinstance(predictor, nn.Module) or isinstance(predictor, nn.ModuleList):
        raise UnsupportedError(f"{type(model).__name__} has no roi_heads.box_predictor of one stage")
    is_sigmoid = artifact.info.detector.get("activation") == "sigmoid"
    scale = 1.0 if is_sigmoid else float(2 ** ceil(log2(artifact.head.num_classes)))
    logits = CalibratedLogits(artifact, scale).to(next(predictor.parameters()).device).eval()
    live = LivePredictor(predictor, logits)

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        live.maps = args[0]

    def restore(module: nn.Module, args: Any, output: tuple[Any, Any]) -> None:
        for found in () if module.training else output[0]:
            if isinstance(found, dict):
                found["scores"] = found["scores"] * scale
            else:
                found.scores = found.scores * scale

    hooks = [heads.register_forward_hook(restore)]
    if artifact.head.inputs == "maps":
        hooks.append(heads.box_head.register_forward_pre_hook(note))
    owner, name = (heads, "score_thresh") if hasattr(heads, "score_thresh") else (predictor, "test_score_thresh")
    threshold = getattr(owner, name, None)
    heads.box_predictor = live
    if threshold is not None:
        setattr(owner, name, threshold / scale)

    def undo() -> None:
        heads.box_predictor = predictor
        for hook in hooks:
            hook.remove()
        if threshold is not None:
            setattr(owner, name, threshold)

    return undo
