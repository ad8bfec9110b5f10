"""Heads that are one linear layer, written into the detector's own checkpoint: it then scores like the head.

The layer that is replaced must hold the classifier of the head's cache, row by row: so a checkpoint of another
detector is noticed, and where it keeps its background is seen, not assumed.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from calib.cache import Cache
from calib.checkpoint import Checkpoint
from calib.errors import FormatError, InputError, SettingError
from calib.heads.base import Head, not_foldable
from calib.heads.cascade import CascadeHead

# Framework -> how the name of its classification layer ends.
LAYERS = {
    "torchvision": "roi_heads.box_predictor.cls_score",
    "detectron2": "roi_heads.box_predictor.cls_score",
    "mmdet": "bbox_head.fc_cls",
}


@dataclass(frozen=True)
class Fold:
    """Where the head's rows go: ``layer`` of the checkpoint, background ``first`` or last, under which activation."""

    layer: str
    first: bool
    activation: str
    classes: int

    @classmethod
    def find(cls, checkpoint: Checkpoint, cache: Cache, framework: str, layer: str = "", stage: int = -1) -> Self:
        """The layer that holds the classifier of ``cache``; of the ``stage`` of a cascade where that is given.

        Raises:
            FormatError: no such layer, or several. InputError: its content is another one.
            UnsupportedError: the detector is no linear classifier.
        """
        own = cache.classifier
        if own.scale is not None:
            raise not_foldable("the detector's classifier divides features by their norm: it takes no linear layer")
        group, _, last = LAYERS[framework].rpartition(".")
        name = layer or _only_layer(checkpoint, f"{group}.{stage}.{last}" if stage >= 0 else LAYERS[framework])
        weight, bias = checkpoint.tensor(f"{name}.weight"), checkpoint.tensor(f"{name}.bias")
        if weight is None:
            raise FormatError(f"checkpoint {checkpoint.path} has no {name}.weight", hint=_candidates(checkpoint))
        for first in (
            (False,) if framework == "detectron2" else (framework == "torchvision", framework != "torchvision")
        ):
            found = cls(name, first, cache.manifest.detector.activation, cache.manifest.detector.num_classes)
            if _same(found.ours(weight), own.weight) and (bias is None or _same(found.ours(bias), own.bias)):
                return found
        raise InputError(
            f"{name} of checkpoint {checkpoint.path} [{', '.join(map(str, weight.shape))}] is not the classifier that "
            f"cache {cache.path} was extracted with {list(own.weight.shape)}",
            hint="give the checkpoint of the detector that wrote the cache",
        )

    def ours(self, rows: Tensor) -> Tensor:
        """Rows of the checkpoint, background last; a row that sigmoids have no use for (Detectron2's) is left out."""
        if self.activation == "sigmoid":
            return rows[: self.classes]
        return rows.roll(-1, dims=0) if self.first else rows

    def theirs(self, rows: Tensor, old: Tensor) -> Tensor:
        """The inverse of ``ours``."""
        if self.activation == "sigmoid":
            return torch.cat([rows, old[self.classes :]])
        return rows.roll(1, dims=0) if self.first else rows

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
        for part, rows in (("weight", weight), ("bias", bias)):
            old = checkpoint.tensor(f"{self.layer}.{part}")
            if old is not None:
                checkpoint.replace(f"{self.layer}.{part}", self.theirs(rows, old))
            elif bool((rows != 0).any()):
                raise not_foldable(f"the head has a bias, and {self.layer} of the checkpoint has none")

    def logits(self, checkpoint: Checkpoint, features: Tensor) -> Tensor:
        """[N, D] -> [N, K] of the layer of ``checkpoint``."""
        weight, bias = (checkpoint.tensor(f"{self.layer}.{part}") for part in ("weight", "bias"))
        assert weight is not None
        return functional.linear(features, weight, bias)

    def activate(self, z: Tensor) -> Tensor:
        """[N, K] -> [N, C] as the framework makes scores of them."""
        if self.activation == "sigmoid":
            return z[:, : self.classes].sigmoid()
        p = z.softmax(dim=1)
        return p[:, 1:] if self.first else p[:, :-1]


def folds_of(checkpoint: Checkpoint, cache: Cache, framework: str, layer: str) -> list[Fold]:
    """One per stage of the detector.

    Raises:
        SettingError: a ``layer`` was named, and a cascade has several. Others as ``Fold.find``.
    """
    if len(cache.stages) == 1:
        return [Fold.find(checkpoint, cache, framework, layer)]
    if layer:
        raise SettingError(f"--layer names one layer; the cascade has {len(cache.stages)}", hint="leave --layer out")
    return [Fold.find(checkpoint, stage, framework, stage=k) for k, stage in enumerate(cache.stages)]


def apply_all(folds: list[Fold], head: Head, checkpoint: Checkpoint, average: str) -> None:
    """Put the head of every stage into its layer.

    Raises:
        UnsupportedError: as ``Fold.apply``; a head of a cascade that is averaged otherwise than the detector's own.
    """
    heads = head.stages if isinstance(head, CascadeHead) else [head]
    if len(heads) != len(folds) or (isinstance(head, CascadeHead) and head.average != average):
        raise not_foldable(f"a head of kind '{head.kind}' is no linear layer per stage: {head.not_linear}")
    for fold, own in zip(folds, heads, strict=True):
        fold.apply(own, checkpoint)


def scores_of(folds: list[Fold], checkpoint: Checkpoint, features: Tensor, average: str) -> Tensor:
    """[N, S*D] -> [N, C] as the framework makes them from the layers of ``checkpoint``."""
    parts = zip(folds, features.chunk(len(folds), dim=1), strict=True)
    z = torch.stack([fold.logits(checkpoint, x) for fold, x in parts])
    if average == "logits":
        return folds[0].activate(z.mean(dim=0))
    return torch.stack([fold.activate(own) for fold, own in zip(folds, z, strict=True)]).mean(dim=0)


def _same(found: Tensor, wanted: object) -> bool:
    return torch.equal(found, torch.zeros(len(found)) if wanted is None else torch.as_tensor(wanted))


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
