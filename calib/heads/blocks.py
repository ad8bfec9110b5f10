"""Several linear classifiers as one: those of a dense detector, which has one per level, or per anchor of a place.

Heads know one linear layer. A candidate of classifier g, with the input x of that classifier and its logits
z = W_g x + b_g, has a feature in one of the ``LAYOUTS``, the first that is not too wide:

    blocks  x in block g of sum(D_g) numbers, and a 1 at the place of g, whose weight is b_g: the classifier's rows are
            those of all g, one behind the other, and what is trained on them trains each of them
    patch   x in a block that the anchors of a layer share, and z behind it: a head [A | B] on it is A x + B z
    logits  z alone: a head is B z

All three go back into the detector exactly: A x + B z = (A + B W_g) x + B b_g for whatever g (with A = 0 for logits).
Letters: N candidates, A anchors, K outputs of an anchor, C columns of them that the cache has, D input of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from calib.cache import Classifier

LAYOUTS = ("blocks", "patch", "logits")
WIDEST = 4096  # numbers of a feature: 8 KiB in float16, and what the discriminant head can solve for


@dataclass(frozen=True)
class Layer:
    """A convolution that classifies, its kernel unfolded: weight [A * K, D], bias [A * K]. ``name``: in the model."""

    name: str
    weight: Tensor
    bias: Tensor
    anchors: int = 1


@dataclass(frozen=True)
class Blocks:
    """``columns`` [C]: which of an anchor's ``outputs`` K the cache has, in its order."""

    layers: tuple[Layer, ...]
    outputs: int
    columns: tuple[int, ...]
    layout: str

    @classmethod
    def of(cls, layers: Sequence[Layer], outputs: int, columns: Sequence[int], *, is_linear: bool = True) -> "Blocks":
        """In the first layout that is not too wide; without ``is_linear``, where scores are no function of z alone,
        in the first that has z."""
        made = [cls(tuple(layers), outputs, tuple(columns), layout) for layout in LAYOUTS[not is_linear :]]
        return next((b for b in made if b.width <= WIDEST), made[-1])

    @property
    def width(self) -> int:
        """Numbers of a feature."""
        inputs = [layer.weight.shape[1] for layer in self.layers]
        if self.layout == "blocks":
            return sum(layer.anchors * (d + 1) for layer, d in zip(self.layers, inputs, strict=True))
        return len(self.columns) + (sum(inputs) if self.layout == "patch" else 0)

    def own(self, k: int, anchor: int) -> tuple[Tensor, Tensor]:
        """Weight [C, D] and bias [C] of the classifier of an anchor of layer ``k``."""
        rows = [anchor * self.outputs + c for c in self.columns]
        return self.layers[k].weight[rows], self.layers[k].bias[rows]

    def classifier(self) -> Classifier:
        """All of them as one, without a bias of its own (zeros); where it is the same for all detectors, with a hash of
        theirs."""
        zero = np.zeros(len(self.columns), np.float32)
        if self.layout != "blocks":
            weight = torch.zeros(len(self.columns), self.width)
            weight[:, -len(self.columns) :] = torch.eye(len(self.columns))
            return Classifier(weight.numpy(), zero, identity=self._hash())
        parts = [self.own(k, a) for k, layer in enumerate(self.layers) for a in range(layer.anchors)]
        return Classifier(torch.cat([torch.cat([w, b[:, None]], dim=1) for w, b in parts], dim=1).numpy(), zero)

    def features(self, k: int, anchor: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Anchors [N] of layer ``k``, inputs [N, D], logits [N, C] -> [N, width]."""
        out = x.new_zeros(len(x), self.width)
        if self.layout != "logits":
            places = self._starts(k)[anchor.cpu()].to(x.device)[:, None] + torch.arange(x.shape[1], device=x.device)
            out.scatter_(1, places, x)
        if self.layout == "blocks":
            out.scatter_(1, places[:, -1:] + 1, 1.0)
        else:
            out[:, -len(self.columns) :] = z
        return out

    def folded(self, weight: Tensor, bias: Tensor) -> "Blocks":
        """The layers that give the logits of a head [C, width], [C] on features; outputs of no column stay."""
        layers = []
        for k, layer in enumerate(self.layers):
            new, shift = layer.weight.clone(), layer.bias.clone()
            for a in range(layer.anchors):
                rows = [a * self.outputs + c for c in self.columns]
                new[rows], shift[rows] = self._back(k, a, weight, bias)
            layers.append(replace(layer, weight=new, bias=shift))
        return replace(self, layers=tuple(layers))

    def logits(self, features: Tensor, layers: "Blocks") -> Tensor:
        """[N, width] -> [N, C] of ``layers``, others of the same shapes, on inputs that the features tell."""
        groups = [(k, a) for k, layer in enumerate(self.layers) for a in range(layer.anchors)]
        found, error = features.new_zeros(len(features), len(self.columns)), features.new_full((len(features),), 1e30)
        for g, (k, a) in enumerate(groups):
            x, wrong = self._input(features, k, a)
            if self.layout == "logits":  # every classifier could be the one: each has its share of the rows
                wrong = torch.where(torch.arange(len(features)) % len(groups) == g, wrong.new_zeros(()), 1e29)
            weight, bias = layers.own(k, a)
            better = wrong < error
            found[better], error[better] = (x @ weight.T + bias)[better], wrong[better]
        return found

    def _hash(self) -> NDArray[np.float32]:
        """[8] numbers."""
        h = xxhash.xxh3_64(f"{self.layout}{self.columns}".encode())
        for layer in self.layers:
            h.update(layer.weight.contiguous().numpy().tobytes() + layer.bias.contiguous().numpy().tobytes())
        return np.frombuffer(h.digest(), np.uint8).astype(np.float32)

    def _starts(self, k: int) -> Tensor:
        """[A] where the blocks of layer ``k`` begin."""
        one = self.layout == "blocks"
        sizes = [(layer.anchors if one else 1) * (layer.weight.shape[1] + one) for layer in self.layers]
        start, anchors = list(accumulate(sizes, initial=0))[k], torch.arange(self.layers[k].anchors)
        return start + anchors * one * (self.layers[k].weight.shape[1] + one)

    def _back(self, k: int, anchor: int, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """What a head is for one classifier: weight [C, D] and bias [C]."""
        start, d, c = int(self._starts(k)[anchor]), self.layers[k].weight.shape[1], len(self.columns)
        block = weight[:, start : start + d]
        if self.layout == "blocks":
            return block, weight[:, start + d] + bias
        own_weight, own_bias = (t.double() for t in self.own(k, anchor))
        mix = weight[:, -c:].double()
        new = mix @ own_weight + (block if self.layout == "patch" else 0)
        return new.float(), (mix @ own_bias + bias).float()

    def _input(self, features: Tensor, k: int, anchor: int) -> tuple[Tensor, Tensor]:
        """[N, D] inputs of a classifier, if rows are its own, and [N] how little they seem to be."""
        start, (weight, bias) = int(self._starts(k)[anchor]), self.own(k, anchor)
        x, z = features[:, start : start + weight.shape[1]], features[:, -len(self.columns) :]
        if self.layout == "blocks":
            return x, 1 - features[:, start + weight.shape[1]]
        if self.layout == "logits":
            x = ((z - bias).double() @ torch.linalg.pinv(weight.double()).T).float()
        return x, (x @ weight.T + bias - z).abs().amax(dim=1)
