"""Heads made of two heads."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from calib.errors import UnsupportedError
from calib.heads.base import Head, head_from


class DualHead(Head):
    """Class-wise choice between two heads: column c of ``tail`` where ``is_tail[c]``, else of ``rest``.

    The background column is the one of ``rest``; nothing is renormalised, so rows need not sum to 1.
    """

    kind = "dual"
    not_linear = "columns come from two heads; one of them alone can be folded with --part tail or --part rest"

    is_tail: Tensor

    def __init__(self, tail: Head, rest: Head, is_tail: Tensor) -> None:
        super().__init__(*shared_shape([tail, rest]))
        self.tail, self.rest = tail, rest
        self.register_buffer("is_tail", is_tail)

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
    not_linear = "it is the mean of two heads; one of them alone can be folded with --part one or --part other"

    def __init__(self, one: Head, other: Head) -> None:
        super().__init__(*shared_shape([one, other]))
        self.one, self.other = one, other

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


class SelectHead(Head):
    """Row-wise choice: the whole row of ``other`` where ``one`` sees foreground, and, if ``eligible`` [C] is given,
    where the arg-max of ``other`` is an eligible class; else the row of ``one``."""

    kind = "select"
    not_linear = "rows come from two heads; one of them alone can be folded with --part one or --part other"

    eligible: Tensor | None

    def __init__(self, one: Head, other: Head, eligible: Tensor | None) -> None:
        super().__init__(*shared_shape([one, other]))
        self.one, self.other = one, other
        self.register_buffer("eligible", eligible)

    def config(self) -> dict[str, Any]:
        """Both heads, and whether a class mask exists."""
        heads = {"one": self.one.description(), "other": self.other.description()}
        return {**heads, "masked": self.eligible is not None}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        one, other = head_from(config["one"]), head_from(config["other"])
        return cls(one, other, torch.zeros(one.num_classes, dtype=torch.bool) if config["masked"] else None)

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1]."""
        one, other = self.one.full_scores(features, logits), self.other.full_scores(features, logits)
        return select_rows(one, other, self.eligible)


def select_rows(original: Tensor, other: Tensor, eligible: Tensor | None) -> Tensor:
    """Row-wise choice between two score matrices, both [N, C+1] with background last (see ``SelectHead``)."""
    background = original.shape[1] - 1
    take = original.argmax(dim=1) != background
    if eligible is not None:
        chosen = other.argmax(dim=1)
        mask = torch.cat([eligible, eligible.new_zeros(1)])
        take &= mask[chosen]
    return torch.where(take[:, None], other, original)


def shared_shape(heads: Sequence[Head]) -> tuple[int, int, str]:
    """Classes, feature size and inputs that all ``heads`` have in common.

    Raises:
        UnsupportedError: one works on features and another on RoI maps, or on other numbers of classes.
    """
    one = heads[0]
    for other in heads:
        if (one.inputs, one.feature_size, one.num_classes) != (other.inputs, other.feature_size, other.num_classes):
            raise UnsupportedError(
                f"heads of {one.num_classes} classes on {one.inputs} of {one.feature_size} and of {other.num_classes} "
                f"classes on {other.inputs} of {other.feature_size} cannot be combined",
                hint="train both on caches of one detector, both with RoI maps or both without",
            )
    return one.num_classes, one.feature_size, one.inputs
