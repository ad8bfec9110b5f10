"""Heads that are built on one base, judged on a labelled cache: the base's logits are computed once for all of them.

Letters: N proposals of one image, K logits of the base.
"""

from copy import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calib.cache import Cache
from calib.decide.assess import Assessment
from calib.evaluate import Detections, Rescored
from calib.heads.base import Head, LogitHead
from calib.heads.linear import ClassifierHead, Logits
from calib.score.inputs import as_tensor, exact_logits, scored_rows
from calib.settings import Nms
from calib.training.bases import base_logits
from calib.training.context import FitContext

LIMIT = 1 << 30  # bytes of logits that are kept; those of further images are computed again for every head


class OnBase:
    """What ``Assessment.found`` gives, to the bit, for heads that were fitted on ``base``."""

    def __init__(self, assessment: Assessment, base: Head, limit: int = LIMIT) -> None:
        """
        Raises:
            UnsupportedError: ``base`` is none.
        """
        self._assessment, cache = assessment, assessment.cache
        self._logits = None if len(cache.stages) > 1 else _Kept(cache, base, limit)  # a cascade's heads compute theirs

    def found(self, head: Head, nms: Nms) -> Detections | Rescored:
        """What ``head`` detects."""
        known = self._logits
        if known is None or not isinstance(head, ClassifierHead) or not _equal(head.classifier, known.below):
            return self._assessment.found(head, nms)
        given = copy(head)
        given.logits = _as_given  # type: ignore[method-assign]
        return self._assessment.found(given, nms, logits=known)


def _as_given(features: Tensor, logits: Tensor | None = None) -> Tensor:
    assert logits is not None
    return logits


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules compute the same."""
    if type(one) is not type(other) or one.config() != other.config():  # type: ignore[operator]
        return False
    a, b = one.state_dict(), other.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


class _Kept:
    """The base's logits of the rows of a cache, computed as they are first asked for."""

    def __init__(self, cache: Cache, base: Head, limit: int) -> None:
        self.below: Logits = base_logits(cache, FitContext(base=base)).eval().requires_grad_(False)
        self._rows, self._stored, self._left = scored_rows(cache, base), exact_logits(cache), limit
        self._known: dict[tuple[int, int], NDArray[np.float32]] = {}

    @torch.inference_mode()
    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """[N, K] of rows ``start:stop``."""
        if (start, stop) in self._known:
            return self._known[start, stop]
        x = torch.from_numpy(self._rows.read(start, stop))
        with_stored = (as_tensor(self._stored, start, stop),) if isinstance(self.below, LogitHead) else ()
        z: NDArray[np.float32] = self.below(x, *with_stored).numpy()
        if z.nbytes <= self._left:
            self._known[start, stop] = z
            self._left -= z.nbytes
        return z
