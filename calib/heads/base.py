"""What a method and a head are.

A *method* is a frozen dataclass of hyper-parameters whose ``fit`` turns a cache into a *head*. A head maps
``[N, D] features (, [N, C+1] logits) -> [N, C] scores`` and is a torch module, so that its tensors, its device and
its export come for free. Letters: N proposals, D feature size, C foreground classes; background is the last column.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from calib.errors import ShapeError, UnsupportedError
from calib.registry import HEADS, load


class Folded(NamedTuple):
    """A linear layer whose ``activation`` gives a head's scores: softmax [C+1, D], background last; sigmoid [C, D]."""

    weight: Tensor
    bias: Tensor
    activation: str = "softmax"


class Head(nn.Module, ABC):
    """A fitted head. Tensors are buffers or parameters; everything else that it needs stands in ``config``."""

    kind: ClassVar[str]
    not_linear: ClassVar[str] = "its scores are no softmax of an affine function of the features"

    stage_average: ClassVar[str] = ""  # over the stages of a cascade; empty: what its detector averages

    def __init__(self, num_classes: int, feature_size: int, inputs: str = "features") -> None:
        """``inputs``: features, or maps (RoI maps, flattened; ``feature_size`` is then their width)."""
        super().__init__()
        self.num_classes, self.feature_size, self.inputs = num_classes, feature_size, inputs

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON that ``build`` turns into a module of the same shape."""

    @classmethod
    @abstractmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """An instance whose tensors have the right shapes and no content yet."""

    @abstractmethod
    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D], [N, C+1] -> [N, C+1] scores with the background's last; they need not sum to 1.

        ``logits`` are the detector's own, where they are at hand: heads that only transform them take them as they
        are instead of computing them again.
        """

    def folded(self) -> Folded:
        """The one linear layer on features that gives the same scores, for heads that have one.

        Raises:
            UnsupportedError: there is none; the message says why.
        """
        raise not_foldable(f"a head of kind '{self.kind}' is no linear layer: {self.not_linear}")

    def scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D], [N, K] -> [N, C] foreground scores in [0, 1].

        Raises:
            ShapeError: features of another width, logits of another number of rows or, where the head uses them, of
                another width.
        """
        if features.ndim != 2 or features.shape[1] != self.feature_size:
            raise ShapeError(f"features have shape {list(features.shape)}: expected [N, {self.feature_size}]")
        if logits is not None and (logits.ndim != 2 or len(logits) != len(features)):
            raise ShapeError(f"logits have shape {list(logits.shape)}: expected {len(features)} rows")
        return self.full_scores(features, logits)[:, :-1]

    def description(self) -> dict[str, Any]:
        """``kind`` and ``config``: what ``head_from`` needs."""
        return {"kind": self.kind, "config": self.config()}


class LogitHead(Head):
    """A head whose scores are a function of logits of its own, which a cascade can average over its stages and another
    head can be built on. Called, it gives logits whose softmax or sigmoid are its scores."""

    @property
    def distribution(self) -> str:
        """softmax: the C + 1 scores of a row sum to 1; sigmoid: each of C stands alone; empty: neither."""
        return "softmax"

    def forward(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D], [N, C+1] -> [N, C+1] logits whose softmax are the scores ([N, C], whose sigmoid)."""
        return self.raw(features, logits)

    @abstractmethod
    def raw(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D], [N, C+1] -> [N, K] what ``activate`` makes scores of."""

    @abstractmethod
    def activate(self, raw: Tensor) -> Tensor:
        """[N, K] -> [N, C+1]."""

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """As ``Head.full_scores``."""
        return self.activate(self.raw(features, logits))


def head_from(description: dict[str, Any]) -> Head:
    """Build the empty head that ``Head.description`` described. Only kinds of ``registry.HEADS`` are known."""
    head: Head = load(HEADS[description["kind"]]).build(description["config"])
    return head


def not_foldable(why: str) -> UnsupportedError:
    """What ``Head.folded`` raises."""
    return UnsupportedError(why, hint="every head can be exported with --to module, torch, onnx or triton")


def log_scores(scores: Tensor) -> Tensor:
    """Logarithms, finite ones of 0: of rows of scores that sum to 1 logits whose softmax they are."""
    return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()


def empty(*shape: int) -> Tensor:
    """A tensor waiting to be loaded."""
    return torch.zeros(shape)
