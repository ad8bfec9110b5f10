"""Scores as confidences: every class's score through an increasing map, so that the order within a class stays.

Two forms: ``logistic``, sigmoid(a logit(s) + b) (temperature scaling: Guo et al., "On Calibration of Modern Neural
Networks", ICML 2017, with b = 0 and T = 1 / a; Platt scaling: Platt, "Probabilistic Outputs for Support Vector
Machines", 1999), and ``knots``, straight lines between points. Score 0 stays 0, so that what was cut stays cut.
"""

from abc import abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from calib.heads.base import Head, empty, head_from

FORMS = ("logistic", "knots")


class MappedHead(Head):
    """``inner`` and G maps: ``one`` and ``two`` are [G, 1] slopes a and shifts b, or [G, K] ascending abscissae and
    ordinates of knots. ``chooses`` is the buffer by which a score finds its map."""

    chooses: ClassVar[str]
    one: Tensor
    two: Tensor

    def __init__(self, inner: Head, form: str, chooses: Tensor, one: Tensor, two: Tensor) -> None:
        super().__init__(inner.num_classes, inner.feature_size, inner.inputs)
        self.inner, self.form = inner, form
        for name, tensor in ((self.chooses, chooses), ("one", one), ("two", two)):
            self.register_buffer(name, tensor)

    def config(self) -> dict[str, Any]:
        """The head inside, the form of the maps and their size."""
        return {"inner": self.inner.description(), "form": self.form, "size": list(self.one.shape)}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        if config["form"] not in FORMS:
            raise ValueError(f"form of the maps is {config['form']}")
        inner, size = head_from(config["inner"]), config["size"]
        return cls(inner, config["form"], cls.no_choice(inner, size[0]), empty(*size), empty(*size))

    @classmethod
    @abstractmethod
    def no_choice(cls, inner: Head, maps: int) -> Tensor:
        """An empty tensor of the shape of the buffer that chooses among so many maps."""


class CalibratedHead(MappedHead):
    """A map for every one of G groups of classes: ``group`` [C]; the background column stays as it is."""

    kind = "calibrated"
    not_linear = "scores go through maps (--part inner takes the head before them)"

    chooses = "group"

    group: Tensor

    @classmethod
    def no_choice(cls, inner: Head, maps: int) -> Tensor:
        """[C]"""
        return torch.zeros(inner.num_classes, dtype=torch.int64)

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1]."""
        scores = self.inner.full_scores(features, logits)
        mapped = apply(self.form, scores[:, :-1].T.contiguous(), self.one[self.group], self.two[self.group])
        return torch.cat([mapped.T, scores[:, -1:]], dim=1)


def apply(form: str, scores: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """[C, N] through a map per row -> [C, N]; ``one`` and ``two`` are [C, 1] or [C, K]."""
    if form == "logistic":
        # log s - log(1 - s) keeps the order of small scores; the largest float below 1 is the highest that has a logit.
        s = scores.clamp(max=1 - 2**-24)
        return torch.sigmoid(one * (s.log() - torch.log1p(-s)) + two)
    # ONNX has no search; the same number by comparing takes K times the memory.
    exporting = torch.compiler.is_exporting()
    at = (scores[:, :, None] >= one[:, None]).sum(2) if exporting else torch.searchsorted(one, scores, right=True)
    above = at.clamp(1, one.shape[1] - 1)
    x0, x1 = one.gather(1, above - 1), one.gather(1, above)
    y0, y1 = two.gather(1, above - 1), two.gather(1, above)
    return y0 + (scores - x0) / (x1 - x0) * (y1 - y0)
