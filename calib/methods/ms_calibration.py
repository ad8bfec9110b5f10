"""MS calibration: scores divided by how much of everything lands in a class.

Paper: He et al., Relieving Long-tailed Instance Segmentation via Pairwise Class Balance, CVPR 2022, supplement A.
M: mean foreground softmax of the labelled rows of every class (rows: ground truth, sum 1).
Eq. (original): p_i / M_ii. Modification 1: p_i / s_i with s_i = sum_k M_ki, the column sum (mean 1). Modification 2:
class i is not predicted where s_i is below ``dead_below``.
Differs: there is no code; the threshold is ours, and so is bringing the foreground back to 1 - p_bg (``renormalise``),
which the supplement leaves open. The matrix may come from a training cache or from a labelled tune cache.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import InputError
from calib.heads.affine import AffineHead
from calib.heads.base import Head
from calib.settings import at_least, one_of
from calib.training.bases import affine_head
from calib.training.context import FitContext

_CHUNK = 8192


@dataclass(frozen=True)
class MSCalibration:
    """``by``: column (modification 1) or diagonal (original)."""

    by: str = "column"
    dead_below: float = 1e-3
    renormalise: bool = True

    space: ClassVar[dict[str, Any]] = {
        "by": {"choice": ["column", "diagonal"]},
        "dead_below": {"log": [0.0001, 0.1]},
    }

    def __post_init__(self) -> None:
        one_of(self, "by", ("column", "diagonal"))
        at_least(self, 0, "dead_below")

    def fit(self, cache: Cache, context: FitContext) -> Head:
        """Estimate the matrix from ``cache``; nothing is trained."""
        head = affine_head(cache, context, "foreground" if self.renormalise else "none")
        head = self.apply(head, confusion(cache, head))
        if not self.renormalise:
            # One factor for all classes leaves their order alone and brings p / s back into [0, 1].
            head.factor /= head.factor.max()
        return head

    def apply(self, head: AffineHead, matrix: Tensor) -> AffineHead:
        """Fill ``head`` for a [C, C] matrix; a class that the matrix never saw keeps its scores."""
        s = matrix.sum(dim=0) if self.by == "column" else matrix.diagonal()
        seen = matrix.sum(dim=1) > 0
        dead = (s < self.dead_below) & seen
        factor = torch.where(dead, 0.0, 1 / s.where((s >= self.dead_below) & (s > 0), 1.0))
        return head.set(factor=factor)


def confusion(cache: Cache, head: AffineHead) -> Tensor:
    """[C, C] of double, of the logits that ``head`` is built on; rows of classes without labelled rows are 0.

    Raises:
        InputError: the cache has no foreground row.
    """
    c = cache.background
    rows = np.flatnonzero((cache.labels >= 0) & (cache.labels < c))
    if len(rows) == 0:
        raise InputError(f"cache {cache.path} has no foreground row to estimate confusion from")
    labels = torch.from_numpy(cache.labels[rows].astype(np.int64))
    total = torch.zeros(c, c, dtype=torch.float64)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        z = head.logits(torch.from_numpy(cache.features.take(rows[part])))
        total.index_add_(0, labels[part], z[:, :-1].double().softmax(dim=1))
    return total / torch.bincount(labels, minlength=c).clamp_min(1)[:, None]
