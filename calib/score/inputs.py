"""What heads are given when a cache is scored: features (of all stages) or RoI maps, and the detector's logits."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.cache import Cache
from calib.cache.rows import RowMatrix, Rows
from calib.errors import UnsupportedError
from calib.heads.base import Head
from calib.heads.box_head import input_rows


class SideBySide:
    """Rows of several matrices with as many rows, one behind the other: [N, sum of widths]."""

    def __init__(self, parts: Sequence[RowMatrix]) -> None:
        self._parts = parts
        self.shape = (parts[0].shape[0], sum(p.shape[1] for p in parts))

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start:stop``; raises as ``RowMatrix.read``."""
        return _joined([p.read(start, stop) for p in self._parts])

    def take(self, rows: Rows) -> NDArray[np.float32]:
        """The given rows; raises as ``RowMatrix.take``."""
        return _joined([p.take(rows) for p in self._parts])


def _joined(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def scored_rows(cache: Cache, head: Head) -> SideBySide:
    """What ``head`` takes of ``cache`` to score it: features (of all stages) or RoI maps.

    Raises:
        UnsupportedError: the cache has no RoI maps, or is of another number of stages than the head.
    """
    rows = SideBySide([input_rows(stage, head) for stage in cache.stages])
    if rows.shape[1] != head.feature_size:
        raise UnsupportedError(
            f"cache {cache.path} has {len(cache.stages)} stages of {cache.manifest.detector.feature_size} features "
            f"({rows.shape[1]} in all); the head takes {head.feature_size}",
            hint="train the head on a cache of the same detector",
        )
    return rows


def exact_logits(cache: Cache) -> SideBySide | None:
    """The detector's own logits (of all stages) where every row has them in float32."""
    parts = [stage.logits for stage in cache.stages]
    exact = [p for p in parts if p is not None and p.dtype == np.float32]
    return SideBySide(exact) if len(exact) == len(parts) else None


class LogitRows(Protocol):
    """Logits of every row of a cache."""

    def read(self, start: int, stop: int) -> NDArray[np.float32]: ...


def as_tensor(rows: LogitRows | None, start: int, stop: int) -> Tensor | None:
    """Rows ``start:stop``, where there are any."""
    return None if rows is None else torch.from_numpy(rows.read(start, stop))
