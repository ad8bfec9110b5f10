"""Confidence maps by box size: detections' scores through a map of their own size.

Paper: Gilg et al., The Box Size Confidence Bias Harms Your Object Detector, WACV 2023 (arXiv 2112.01901).

What a head sees has no boxes, so the scores of proposals stay those of ``inner``; detections are mapped when they are
there, after suppression (``score/by_size.py``). Letters: K detections, S sizes.
"""

from typing import Any, Self

import torch
from torch import Tensor

from calib.heads.base import Head, empty, head_from
from calib.heads.calibrated import FORMS, apply


class BySizeHead(Head):
    """``inner`` and maps of S sizes: ``edges`` [S-1] ascending box areas between them; ``one`` and ``two`` as those of
    ``CalibratedHead``, by size."""

    kind = "by-size"
    not_linear = "its maps take boxes (--part inner takes the head before them)"

    edges: Tensor
    one: Tensor
    two: Tensor

    def __init__(self, inner: Head, form: str, edges: Tensor, one: Tensor, two: Tensor) -> None:
        super().__init__(inner.num_classes, inner.feature_size, inner.inputs)
        self.inner, self.form = inner, form
        self.register_buffer("edges", edges)
        self.register_buffer("one", one)
        self.register_buffer("two", two)

    def config(self) -> dict[str, Any]:
        """The head inside, the form of the maps and their size."""
        return {"inner": self.inner.description(), "form": self.form, "size": list(self.one.shape)}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        if config["form"] not in FORMS:
            raise ValueError(f"form of the maps is {config['form']}")
        size = config["size"]
        return cls(head_from(config["inner"]), config["form"], empty(size[0] - 1), empty(*size), empty(*size))

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1] of the head inside."""
        return self.inner.full_scores(features, logits)

    def mapped(self, scores: Tensor, areas: Tensor) -> Tensor:
        """[K], [K] box areas in pixels of the picture squared -> [K]."""
        size = torch.searchsorted(self.edges, areas.to(self.edges), right=True)
        return apply(self.form, scores[:, None], self.one[size], self.two[size])[:, 0]
