"""A matrix over all shards of a cache, converted to float32 and checked as its rows are handed out."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.cache.convert import all_finite, to_float32
from calib.cache.matrix import MatrixFile
from calib.cache.mirrored import MirroredMatrix
from calib.errors import NonFiniteError, ShapeError

Rows = NDArray[np.int64]
PIECE_BYTES = 1 << 18
SHORT_RUN = 4  # runs shorter than this on average are gathered in one call instead of copied one by one


class RowMatrix:
    """A [N, D] matrix over the shards of a cache, read by ranges or by row numbers."""

    def __init__(self, files: Sequence[MatrixFile | MirroredMatrix], width: int) -> None:
        self._files = files
        self._starts = [0, *accumulate(f.shape[0] for f in files)]
        self.shape = (self._starts[-1], width)

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""
        return self._files[0].dtype if self._files else np.dtype(np.float32)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start:stop`` as float32 [stop - start, D].

        Raises:
            NonFiniteError: NaN or infinity in the file.
        """
        out = np.empty((max(0, stop - start), self.shape[1]), np.float32)
        # In pieces that stay in the processor's own cache between copying, checking and converting.
        size = max(1, PIECE_BYTES // max(1, self.shape[1] * self.dtype.itemsize))
        for low in range(0, len(out), size):
            part = out[low : low + size]
            stored = part if self.dtype == part.dtype else np.empty(part.shape, self.dtype)
            self.fill(start + low, start + low + len(part), stored)
            self._check_finite(stored)
            to_float32(stored, out=part)
        return out

    def take(self, rows: Rows) -> NDArray[np.float32]:
        """The given rows as float32 [len(rows), D], in any order.

        Raises:
            NonFiniteError: NaN or infinity in the file. ShapeError: there is no such row.
        """
        return to_float32(self.checked(rows))

    def checked(self, rows: Rows, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """As ``stored``, when all numbers are finite.

        Raises:
            NonFiniteError: NaN or infinity in the file. ShapeError: there is no such row.
        """
        stored = self.stored(rows, out)
        self._check_finite(stored)
        return stored

    def stored(self, rows: Rows, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """The given rows [len(rows), D] bit for bit, in the dtype they are stored in; into ``out`` if given.

        Raises:
            ShapeError: there is no such row.
        """
        out = np.empty((len(rows), self.shape[1]), self.dtype) if out is None else out
        if len(rows) == 0:
            return out
        if rows.min() < 0 or rows.max() >= self.shape[0]:
            raise ShapeError(f"rows {rows.min()} to {rows.max()} asked of a matrix of {self.shape[0]} rows")
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        if len(breaks) * SHORT_RUN > len(rows) and self._gather(rows, out):
            return out
        edges = [0, *breaks.tolist(), len(rows)]
        for (low, high), first in zip(pairwise(edges), rows[edges[:-1]].tolist(), strict=True):
            self.fill(first, first + high - low, out[low:high])
        return out

    def _gather(self, rows: Rows, out: NDArray[Any]) -> bool:
        """Copy rows from anywhere into ``out``; False if that cannot be done at once."""
        file = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(file, kind="stable")
        content = out.view(np.uint8)
        for low, high in pairwise([0, *(np.flatnonzero(np.diff(file[order])) + 1).tolist(), len(rows)]):
            at = order[low:high]
            k = int(file[at[0]])
            if not self._files[k].gather(rows[at] - self._starts[k], content, at):
                return False
        return True

    def fill(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Copy rows ``start:stop`` into ``out`` [stop - start, D] bit for bit, without a look at the numbers."""
        shard = bisect_right(self._starts, start) - 1
        done = 0
        while done < stop - start:
            first = start + done - self._starts[shard]
            count = min(stop - start - done, self._files[shard].shape[0] - first)
            self._files[shard].read(first, first + count, out[done : done + count])
            done += count
            shard += 1

    def _check_finite(self, stored: NDArray[Any]) -> None:
        if not all_finite(stored):
            folder = self._files[0].path.parents[2]
            raise NonFiniteError(
                f"cache {folder} holds NaN or infinite numbers in {self._files[0].path.name}",
                hint="extract it again",
            )
