"""Heads of cascades: one fitted head per stage, averaged over stages as the detector averages its own scores.

Cascade R-CNN (Cai and Vasconcelos, CVPR 2018) classifies every RoI in each of S stages, with features of its own.
Detectron2's CascadeROIHeads averages probabilities, mmdetection's CascadeRoIHead and HTC average logits:

Eq. (probabilities): score = 1/S sum_s activate(z_s).
Eq. (logits): score = activate(1/S sum_s z_s); BAGS (group logits) and SimCal (each of its two heads) do so too.

Stages lie side by side: features [N, S*D], logits [N, S*K]. Letters: N proposals, S stages, D feature size, C classes.
"""

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from calib.errors import UnsupportedError
from calib.heads.base import Head, LogitHead, head_from
from calib.heads.combine import AverageHead, DualHead, SelectHead


class CascadeHead(Head):
    """One head of the same kind per stage; ``average``: probabilities or logits.

    Raises:
        UnsupportedError: logits are to be averaged, and the head's scores are no function of logits.
    """

    kind = "cascade"
    not_linear = "it is the average of one head per stage"

    def __init__(self, heads: Sequence[Head], average: str) -> None:
        first = heads[0]
        super().__init__(first.num_classes, len(heads) * first.feature_size)
        self.heads, self.average = nn.ModuleList(heads), average
        if average == "logits" and not isinstance(first, LogitHead):
            raise UnsupportedError(
                f"the detector averages the logits of its {len(heads)} stages; a head of kind '{first.kind}' has no "
                "logits that make its scores",
                hint="of the methods, those with a softmax, sigmoid or group softmax over their logits have",
            )

    def config(self) -> dict[str, Any]:
        """The heads, and what is averaged."""
        return {"heads": [h.description() for h in self.stages], "average": self.average}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        return cls([head_from(h) for h in config["heads"]], str(config["average"]))

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, S*D], [N, S*K] -> [N, C+1]."""
        heads = self.stages
        x = features.chunk(len(heads), dim=1)
        z = [None] * len(heads) if logits is None else logits.chunk(len(heads), dim=1)
        if self.average == "logits":  # mmdetection divides the sum, Detectron2 multiplies it
            same = [h for h in heads if isinstance(h, LogitHead)]
            raw = [h.raw(a, b) for h, a, b in zip(same, x, z, strict=True)]
            return same[0].activate(_sum(raw) / float(len(heads)))
        return _sum([h.full_scores(a, b) for h, a, b in zip(heads, x, z, strict=True)]) * (1.0 / len(heads))

    @property
    def stages(self) -> list[Head]:
        """The heads, first to last."""
        return [h for h in self.heads if isinstance(h, Head)]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def cascade(heads: Sequence[Head], average: str) -> Head:
    """One head of those of all stages. What is composed of two heads is composed again of the averages of both.

    Raises:
        UnsupportedError: as ``CascadeHead``.
    """
    first = heads[0]
    if isinstance(first, DualHead):
        tails, rests = zip(*[(h.tail, h.rest) for h in heads if isinstance(h, DualHead)], strict=True)
        return DualHead(cascade(tails, average), cascade(rests, average), first.is_tail)
    if isinstance(first, AverageHead | SelectHead):
        ones, others = zip(*[(h.one, h.other) for h in heads if isinstance(h, AverageHead | SelectHead)], strict=True)
        one, other = cascade(ones, average), cascade(others, average)
        return AverageHead(one, other) if isinstance(first, AverageHead) else SelectHead(one, other, first.eligible)
    return CascadeHead(heads, first.stage_average or average)
