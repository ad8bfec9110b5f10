"""Whether an export computes what its head computes, on rows of a cache. Letters: N rows, D width, C classes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import ExportError, InputError, SettingError
from calib.heads.base import Head
from calib.score.inputs import scored_rows

# What is run beside all rows at once: an export with a fixed number of rows shows here.
SIZES = (1, 3)


@dataclass(frozen=True)
class Sample:
    """Rows and the scores that ``head`` gives them; ``tolerance``: how far those of an export may be from them."""

    rows: Tensor  # [N, D]
    scores: Tensor  # [N, C]
    tolerance: float

    @classmethod
    def of(cls, cache: Cache, head: Head, count: int, tolerance: float) -> Self:
        """``count`` rows evenly spaced over ``cache``.

        Raises:
            SettingError: no rows, or a tolerance that is no positive number. InputError: the cache is empty.
            UnsupportedError: it has no RoI maps, which the head takes, or other stages.
        """
        if count < 1 or not tolerance > 0:
            raise SettingError(f"rows is {count} and tolerance {tolerance}: expected at least 1, and above 0")
        if cache.n_rows == 0:
            raise InputError(f"cache {cache.path} has no row to compare on", hint="give another --cache")
        positions = np.unique(np.linspace(0, cache.n_rows - 1, min(count, cache.n_rows)).astype(np.int64))
        rows = torch.from_numpy(scored_rows(cache, head).take(positions))
        with torch.inference_mode():
            return cls(rows, head.scores(rows), tolerance)

    def compare(self, run: Callable[[Tensor], Tensor], what: str) -> float:
        """The largest difference between ``run(rows)`` [N, C] and the head's scores; also of a few rows alone.

        Raises:
            ExportError: it is above the tolerance, or not a number.
        """
        with torch.inference_mode():
            differences = [float((run(self.rows[:n]) - self.scores[:n]).abs().max()) for n in (len(self.rows), *SIZES)]
        largest = max(differences, key=lambda d: float("inf") if d != d else d)
        if not largest <= self.tolerance:
            raise ExportError(
                f"{what} differs from its head by up to {largest:.3g} on {len(self.rows)} cached rows, more than "
                f"{self.tolerance:g}: it was not written",
                hint="a greater --tolerance accepts it",
            )
        return largest
