"""Heads that are one linear layer, written into the detector's own checkpoint: it then scores like the head.

The layer that is replaced must hold the classifier of the head's cache, row by row: so a checkpoint of another
detector is noticed, and where it keeps its background is seen, not assumed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from calib.cache import Cache
from calib.cache.schema import Detector
from calib.checkpoint import Checkpoint
from calib.errors import FormatError, InputError, SettingError
from calib.export.dense import DenseFold
from calib.heads.base import Head, not_foldable
from calib.heads.cascade import CascadeHead

# Framework -> how the name of its classification layer ends.
LAYERS = {
    "torchvision": "roi_heads.box_predictor.cls_score",
    "detectron2": "roi_heads.box_predictor.cls_score",
    "mmdet": "bbox_head.fc_cls",
    "transformers": "",  # named otherwise in every model: known by its content
    "ultralytics": "",  # several, which the cache names
}
OFF = -1e4  # the bias of an output that no score shall come from


@dataclass(frozen=True)
class Fold:
    """Where the head's rows go: ``columns`` are the outputs of ``layer`` for classes and background, in our order.

    ``others_off``: other outputs compete with them in the detector, and shall have scores of 0. ``copies``: layers that
    hold the same.
    """

    layer: str
    columns: tuple[int, ...]
    activation: str
    classes: int
    others_off: bool = False
    copies: tuple[str, ...] = ()

    @classmethod
    def find(cls, checkpoint: Checkpoint, cache: Cache, framework: str, layer: str = "", stage: int = -1) -> Self:
        """The layer that holds the classifier of ``cache``; of the ``stage`` of a cascade where that is given.

        Raises:
            FormatError: no such layer, or several. InputError: its content is another one.
            UnsupportedError: the detector is no linear classifier.
        """
        if cache.classifier.scale is not None:
            raise not_foldable("the detector's classifier divides features by their norm: it takes no linear layer")
        if framework == "transformers" and not layer:
            if cache.manifest.detector.settings.get("prompts"):
                raise not_foldable("the detector's classes are prompts, compared with queries: it has no class layer")
            layers = [n.removesuffix(".weight") for n in checkpoint.state if n.endswith(".weight") and "class" in n]
            # An encoder's may hold the same before training; it chooses the queries and stays as it is.
            names = [n for n in layers if "enc_out" not in n]
            found = [fold for n in names if (fold := cls._at(checkpoint, cache, framework, n)) is not None]
            if found:
                return replace(found[-1], copies=tuple(f.layer for f in found[:-1]))
            raise InputError(
                f"no layer of checkpoint {checkpoint.path} is the classifier of the detector that wrote cache "
                f"{cache.path}",
                hint="give that detector's checkpoint",
            )
        group, _, last = LAYERS[framework].rpartition(".")
        name = layer or _only_layer(checkpoint, f"{group}.{stage}.{last}" if stage >= 0 else LAYERS[framework])
        weight = checkpoint.tensor(f"{name}.weight")
        if weight is None:
            raise FormatError(f"checkpoint {checkpoint.path} has no {name}.weight", hint=_candidates(checkpoint))
        if (fold := cls._at(checkpoint, cache, framework, name)) is not None:
            return fold
        raise InputError(
            f"{name} of checkpoint {checkpoint.path} [{', '.join(map(str, weight.shape))}] is not the classifier that "
            f"cache {cache.path} was extracted with {list(cache.classifier.weight.shape)}",
            hint="give the checkpoint of the detector that wrote the cache",
        )

    @classmethod
    def _at(cls, checkpoint: Checkpoint, cache: Cache, framework: str, name: str) -> Self | None:
        """At the layer ``name``, if that holds the classifier of ``cache`` in an order that the framework has."""
        own, detector = cache.classifier, cache.manifest.detector
        weight, bias = (checkpoint.tensor(f"{name}.{part}") for part in ("weight", "bias"))
        for columns in _orders(framework, detector):
            if weight is None or weight.ndim != 2 or len(weight) <= max(columns):
                continue
            rows = list(columns)
            if _same(weight[rows], own.weight) and (bias is None or _same(bias[rows], own.bias)):
                off = framework == "transformers" and len(columns) < len(weight)
                return cls(name, columns, detector.activation, detector.num_classes, off)
        return None

    def apply(self, head: Head, checkpoint: Checkpoint) -> None:
        """Put the head's layer into ``checkpoint``.

        Raises:
            UnsupportedError: the head is no linear layer, or the detector's activation is another one.
        """
        weight, bias, activation = head.folded()
        if activation != self.activation:
            raise not_foldable(
                f"the head's scores are a {activation} of a linear layer; the detector has a {self.activation}"
            )
        for layer in (self.layer, *self.copies):
            for part, rows, off in (("weight", weight, 0.0), ("bias", bias, OFF)):
                old = checkpoint.tensor(f"{layer}.{part}")
                if old is not None:
                    new = torch.full_like(old, off) if self.others_off else old.clone()
                    new[list(self.columns)] = rows.to(new)
                    checkpoint.replace(f"{layer}.{part}", new)
                elif self.others_off or bool((rows != 0).any()):
                    raise not_foldable(f"the head has a bias, and {layer} of the checkpoint has none")

    def logits(self, checkpoint: Checkpoint, features: Tensor) -> Tensor:
        """[N, D] -> [N, K] of the layer of ``checkpoint``."""
        weight, bias = (checkpoint.tensor(f"{self.layer}.{part}") for part in ("weight", "bias"))
        assert weight is not None
        return functional.linear(features, weight, bias)

    def activate(self, z: Tensor) -> Tensor:
        """[N, K] -> [N, C] as the framework makes scores of them."""
        p = z.sigmoid() if self.activation == "sigmoid" else z.softmax(dim=1)
        return p[:, list(self.columns[: self.classes])]


def folds_of(checkpoint: Checkpoint, cache: Cache, framework: str, layer: str) -> Sequence[Fold | DenseFold]:
    """One per stage of the detector.

    Raises:
        SettingError: a ``layer`` was named, and a cascade has several. Others as ``Fold.find``.
    """
    if cache.manifest.detector.settings.get("dense"):
        return [DenseFold.find(checkpoint, cache)]
    if len(cache.stages) == 1:
        return [Fold.find(checkpoint, cache, framework, layer)]
    if layer:
        raise SettingError(f"--layer names one layer; the cascade has {len(cache.stages)}", hint="leave --layer out")
    return [Fold.find(checkpoint, stage, framework, stage=k) for k, stage in enumerate(cache.stages)]


def apply_all(folds: Sequence[Fold | DenseFold], head: Head, checkpoint: Checkpoint, average: str) -> None:
    """Put the head of every stage into its layer.

    Raises:
        UnsupportedError: as ``Fold.apply``; a head of a cascade that is averaged otherwise than the detector's own.
    """
    heads = head.stages if isinstance(head, CascadeHead) else [head]
    if len(heads) != len(folds) or (isinstance(head, CascadeHead) and head.average != average):
        raise not_foldable(f"a head of kind '{head.kind}' is no linear layer per stage: {head.not_linear}")
    for fold, own in zip(folds, heads, strict=True):
        fold.apply(own, checkpoint)


def scores_of(folds: Sequence[Fold | DenseFold], checkpoint: Checkpoint, features: Tensor, average: str) -> Tensor:
    """[N, S*D] -> [N, C] as the framework makes them from the layers of ``checkpoint``."""
    parts = zip(folds, features.chunk(len(folds), dim=1), strict=True)
    z = torch.stack([fold.logits(checkpoint, x) for fold, x in parts])
    if average == "logits":
        return folds[0].activate(z.mean(dim=0))
    return torch.stack([fold.activate(own) for fold, own in zip(folds, z, strict=True)]).mean(dim=0)


def _orders(framework: str, detector: Detector) -> list[tuple[int, ...]]:
    """Where the framework may have our columns, the likelier first."""
    classes = range(detector.num_classes)
    if framework == "transformers" and detector.settings.get("labels") is not None:
        labels = tuple(int(k) for k in detector.settings["labels"])
        return [labels] if detector.activation == "sigmoid" else [(*labels, -1)]
    last = tuple(range(detector.outputs))  # of sigmoids Detectron2 has one more row, which nothing uses
    if detector.activation == "sigmoid" or framework in ("detectron2", "transformers"):
        return [last]
    first = (*(k + 1 for k in classes), 0)
    return [first, last] if framework == "torchvision" else [last, first]


def _same(found: Tensor, wanted: object) -> bool:
    other = torch.zeros(len(found)) if wanted is None else torch.as_tensor(wanted)
    return torch.equal(found, other)


def _only_layer(checkpoint: Checkpoint, ending: str) -> str:
    names = [n.removesuffix(".weight") for n in checkpoint.state if f".{n}".endswith(f".{ending}.weight")]
    if len(names) != 1:
        raise FormatError(
            f"checkpoint {checkpoint.path} has {len(names) or 'no'} layers named {ending}: expected one",
            hint=_candidates(checkpoint),
        )
    return names[0]


def _candidates(checkpoint: Checkpoint) -> str:
    """What the user can give instead."""
    ends = ("cls_score.weight", "fc_cls.weight")
    names = [n.removesuffix(".weight") for n in checkpoint.state if n.endswith(ends)]
    return f"--layer names it: {', '.join(names)}" if names else "--layer names the classification layer"
