"""Decisions that are made per class on a tune split: whose score a class takes, and from which score on it counts."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from calib.heads.base import Head, empty, head_from
from calib.heads.combine import shared_shape


class PerClassHead(Head):
    """Column c is that of head ``choice[c]``; the background column is the first head's.

    Nothing is renormalised: rows need not sum to 1.
    """

    kind = "per-class"
    not_linear = "each class is scored by one of several heads"

    choice: Tensor

    def __init__(self, heads: Sequence[Head], choice: Tensor) -> None:
        super().__init__(*shared_shape(heads))
        self.heads = nn.ModuleList(heads)
        self.register_buffer("choice", choice)

    def config(self) -> dict[str, Any]:
        """The heads."""
        return {"heads": [h.description() for h in self.heads if isinstance(h, Head)]}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        heads = [head_from(h) for h in config["heads"]]
        return cls(heads, torch.zeros(heads[0].num_classes, dtype=torch.int64))

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1]."""
        choice = torch.cat([self.choice, self.choice.new_zeros(1)])
        scores: Tensor | None = None
        for k, head in enumerate(self.heads):
            own: Tensor = head.full_scores(features, logits)  # type: ignore[operator]
            scores = own if scores is None else torch.where(choice == k, own, scores)
        assert scores is not None
        return scores


class ThresholdHead(Head):
    """The scores of ``inner`` where they are greater than their class's ``threshold``, else 0: nothing is detected.

    Since a detection needs a score above 0, whatever makes detections of scores honours the thresholds.
    """

    kind = "threshold"
    not_linear = "it cuts scores at thresholds (--part inner takes the head that it cuts)"

    threshold: Tensor

    def __init__(self, inner: Head, threshold: Tensor) -> None:
        super().__init__(inner.num_classes, inner.feature_size, inner.inputs)
        self.inner = inner
        self.register_buffer("threshold", threshold)

    def config(self) -> dict[str, Any]:
        """The head inside."""
        return {"inner": self.inner.description()}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        inner = head_from(config["inner"])
        return cls(inner, empty(inner.num_classes))

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1]; the background column as it is."""
        scores = self.inner.full_scores(features, logits)
        keep = scores[:, :-1] > self.threshold
        return torch.cat([scores[:, :-1] * keep, scores[:, -1:]], dim=1)
