"""A matrix over all shards of a cache, converted to float32 and checked as its rows are handed out."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.cache.matrix import MatrixFile
from calib.errors import NonFiniteError

Rows = NDArray[np.int64]


class RowMatrix:
    """A [N, D] matrix over the shards of a cache, read by ranges or by row numbers."""

    def __init__(self, files: Sequence[MatrixFile], width: int) -> None:
        self._files = files
        self._starts = np.concatenate([[0], np.cumsum([f.shape[0] for f in files])]).astype(np.int64)
        self.shape = (int(self._starts[-1]), width)

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""
        return self._files[0].dtype if self._files else np.dtype(np.float32)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start:stop`` as float32 [stop - start, D].

        Raises:
            NonFiniteError: NaN or infinity in the file.
        """
        out = np.empty((stop - start, self.shape[1]), np.float32)
        self._fill(start, stop, out)
        self._check_finite(out)
        return out

    def take(self, rows: Rows) -> NDArray[np.float32]:
        """The given rows as float32 [len(rows), D]; runs of consecutive rows cost one copy each.

        Raises:
            NonFiniteError: NaN or infinity in the file.
        """
        out = np.empty((len(rows), self.shape[1]), np.float32)
        self._gather(rows, out)
        self._check_finite(out)
        return out

    def stored(self, rows: Rows) -> NDArray[Any]:
        """The given rows bit for bit, in the dtype they are stored in."""
        out = np.empty((len(rows), self.shape[1]), self.dtype)
        self._gather(rows, out)
        return out

    def _gather(self, rows: Rows, out: NDArray[Any]) -> None:
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        edges = [0, *breaks.tolist(), len(rows)] if len(rows) else [0]
        for low, high in pairwise(edges):
            self._fill(int(rows[low]), int(rows[low]) + high - low, out[low:high])

    def _fill(self, start: int, stop: int, out: NDArray[Any]) -> None:
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < stop - start:
            first = start + done - int(self._starts[shard])
            count = min(stop - start - done, self._files[shard].shape[0] - first)
            self._files[shard].read(first, first + count, out[done : done + count])
            done += count
            shard += 1

    def _check_finite(self, out: NDArray[np.float32]) -> None:
        # A sum is finite only if every term is; it costs a fraction of an element-wise test.
        with np.errstate(invalid="ignore", over="ignore"):
            suspicious = not np.isfinite(out.sum(dtype=np.float64))
        if suspicious and not np.isfinite(out).all():
            folder = self._files[0].path.parents[2]
            raise NonFiniteError(
                f"cache {folder} holds NaN or infinite numbers in {self._files[0].path.name}",
                hint="extract it again",
            )
