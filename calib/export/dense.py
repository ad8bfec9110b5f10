"""Heads of dense detectors, folded into every classifying convolution of a checkpoint (see ``calib.heads.blocks``)."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from calib.cache import Cache
from calib.checkpoint import Checkpoint
from calib.errors import FormatError, InputError
from calib.heads.base import Head, not_foldable
from calib.heads.blocks import Blocks, Layer


@dataclass(frozen=True)
class DenseFold:
    """As ``fold.Fold``: ``names`` of the layers in the checkpoint, and what they hold there."""

    names: tuple[str, ...]
    blocks: Blocks
    activation: str
    classes: int
    copies: tuple[str, ...] = ()

    @property
    def layer(self) -> str:
        """All of them."""
        return ", ".join(self.names)

    @property
    def columns(self) -> tuple[int, ...]:
        """Which of an anchor's outputs are classes and background, in our order."""
        return self.blocks.columns

    @classmethod
    def find(cls, checkpoint: Checkpoint, cache: Cache) -> Self:
        """The layers that the detector of ``cache`` classifies with.

        Raises:
            FormatError: not there. InputError: they hold something else. UnsupportedError: no head fits into it.
        """
        detector = cache.manifest.detector
        dense = detector.settings["dense"]
        if dense["not_foldable"]:
            raise not_foldable(f"no head goes into {detector.source}: {dense['not_foldable']}")
        names = [_named(checkpoint, name) for name in dense["layers"]]
        layers = [_layer(checkpoint, n, a) for n, a in zip(names, dense["anchors"], strict=True)]
        blocks = Blocks(tuple(layers), int(dense["outputs"]), tuple(dense["columns"]), dense["layout"])
        if any(len(x.weight) != x.anchors * blocks.outputs for x in layers) or (
            blocks.classifier().digest() != detector.digest
        ):
            raise InputError(
                f"{', '.join(names)} of checkpoint {checkpoint.path} is not the classifier that cache {cache.path} was "
                "extracted with",
                hint="give the checkpoint of the detector that wrote the cache",
            )
        return cls(tuple(names), blocks, detector.activation, detector.num_classes)

    def apply(self, head: Head, checkpoint: Checkpoint) -> None:
        """Put the head into all layers of ``checkpoint``.

        Raises:
            UnsupportedError: the head is no linear layer, the detector's activation is another one, or its layers have
                no bias.
        """
        weight, bias, activation = head.folded()
        if activation != self.activation:
            raise not_foldable(
                f"the head's scores are a {activation} of a linear layer; the detector has a {self.activation}"
            )
        for name, new in zip(self.names, self.blocks.folded(weight, bias).layers, strict=True):
            old = checkpoint.tensor(f"{name}.weight")
            assert old is not None
            checkpoint.replace(f"{name}.weight", new.weight.reshape(old.shape))
            if checkpoint.tensor(f"{name}.bias") is not None:
                checkpoint.replace(f"{name}.bias", new.bias)
            elif bool((new.bias != 0).any()):
                raise not_foldable(f"the head has a bias, and {name} of the checkpoint has none")

    def logits(self, checkpoint: Checkpoint, features: Tensor) -> Tensor:
        """[N, width] -> [N, columns] of the layers of ``checkpoint``."""
        layers = [_layer(checkpoint, n, x.anchors) for n, x in zip(self.names, self.blocks.layers, strict=True)]
        return self.blocks.logits(features, Blocks(tuple(layers), self.blocks.outputs, self.columns, "blocks"))

    def activate(self, z: Tensor) -> Tensor:
        """[N, columns] -> [N, C]."""
        return z.sigmoid() if self.activation == "sigmoid" else z.softmax(dim=1)[:, : self.classes]


def _named(checkpoint: Checkpoint, name: str) -> str:
    """The layer in the checkpoint, behind whatever wrappers put before its name."""
    found = [n.removesuffix(".weight") for n in checkpoint.state if f".{n}".endswith(f".{name}.weight")]
    if len(found) != 1:
        raise FormatError(
            f"checkpoint {checkpoint.path} has {len(found) or 'no'} layers named {name}: expected one",
            hint="give the checkpoint of the detector that wrote the cache",
        )
    return found[0]


def _layer(checkpoint: Checkpoint, name: str, anchors: Any) -> Layer:
    weight, bias = (checkpoint.tensor(f"{name}.{part}") for part in ("weight", "bias"))
    assert weight is not None
    return Layer(name, weight.flatten(1), torch.zeros(len(weight)) if bias is None else bias, int(anchors))
