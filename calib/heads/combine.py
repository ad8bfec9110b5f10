"""Heads made of two heads."""

from typing import Any, Self

import torch
from torch import Tensor

from calib.heads.base import Head, head_from


class DualHead(Head):
    """Class-wise choice between two heads: column c of ``tail`` where ``is_tail[c]``, else of ``rest``.

    The background column is the one of ``rest``; nothing is renormalised, so rows need not sum to 1.
    """

    kind = "dual"

    is_tail: Tensor

    def __init__(self, tail: Head, rest: Head, is_tail: Tensor) -> None:
        super().__init__()
        self.tail, self.rest = tail, rest
        self.register_buffer("is_tail", is_tail)
        self.num_classes, self.feature_size = rest.num_classes, rest.feature_size

    def config(self) -> dict[str, Any]:
        """Both heads."""
        return {"tail": self.tail.description(), "rest": self.rest.description()}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        tail, rest = head_from(config["tail"]), head_from(config["rest"])
        return cls(tail, rest, torch.zeros(rest.num_classes, dtype=torch.bool))

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1]."""
        tail, rest = self.tail.full_scores(features, logits), self.rest.full_scores(features, logits)
        return choose_columns(tail, rest, self.is_tail)


def choose_columns(tail: Tensor, rest: Tensor, is_tail: Tensor) -> Tensor:
    """[N, C+1], [N, C+1], [C] of bool -> [N, C+1]; the background column comes from ``rest``."""
    mask = torch.cat([is_tail, is_tail.new_zeros(1)])
    return torch.where(mask, tail, rest)


class AverageHead(Head):
    """The mean of two heads' scores, background included."""

    kind = "average"

    def __init__(self, one: Head, other: Head) -> None:
        super().__init__()
        self.one, self.other = one, other
        self.num_classes, self.feature_size = one.num_classes, one.feature_size

    def config(self) -> dict[str, Any]:
        """Both heads."""
        return {"one": self.one.description(), "other": self.other.description()}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        return cls(head_from(config["one"]), head_from(config["other"]))

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1]."""
        return 0.5 * (self.one.full_scores(features, logits) + self.other.full_scores(features, logits))
