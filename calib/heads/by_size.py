"""Confidence maps by box size: detections' scores through a map of their own size.

Paper: Gilg et al., The Box Size Confidence Bias Harms Your Object Detector, WACV 2023 (arXiv 2112.01901).

What a head sees has no boxes, so the scores of proposals stay those of ``inner``; detections are mapped when they are
there, after suppression (``score/by_size.py``). Letters: K detections, S sizes.
"""

import torch
from torch import Tensor

from calib.heads.base import Head, empty
from calib.heads.calibrated import MappedHead, apply


class BySizeHead(MappedHead):
    """A map for every one of S sizes: ``edges`` [S-1] ascending box areas between them."""

    kind = "by-size"
    not_linear = "its maps take boxes (--part inner takes the head before them)"

    chooses = "edges"

    edges: Tensor

    @classmethod
    def no_choice(cls, inner: Head, maps: int) -> Tensor:
        """[S-1]"""
        return empty(maps - 1)

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1] of the head inside."""
        return self.inner.full_scores(features, logits)

    def mapped(self, scores: Tensor, areas: Tensor) -> Tensor:
        """[K], [K] box areas in pixels of the picture squared -> [K]."""
        size = torch.searchsorted(self.edges, areas.to(self.edges), right=True)
        return apply(self.form, scores[:, None], self.one[size], self.two[size])[:, 0]
