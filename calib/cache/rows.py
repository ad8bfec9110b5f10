"""A matrix over all shards of a cache, converted to float32 and checked as its rows are handed out."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from calib.cache.convert import all_finite, to_float32
from calib.cache.matrix import MatrixFile
from calib.cache.mirrored import MirroredMatrix
from calib.errors import NonFiniteError, ShapeError

if TYPE_CHECKING:
    from torch import Tensor

Rows = NDArray[np.int64]
PIECE_BYTES = 1 << 18
SHORT_RUN = 4  # runs shorter than this on average are gathered in one call instead of copied one by one


class _Mapping:
    """All mapped blocks of some files as one array of rows, so that rows from anywhere are one indexing away.

    The blocks lie at uneven distances: ``rows`` has an element for every byte of memory from the first file's map to
    the last one's, of which only those at ``places`` may be looked at.
    """

    def __init__(self, files: Sequence[MatrixFile]) -> None:
        maps = [f.mapped for f in files]
        self._maps = maps  # stay mapped as long as this is
        first = min(maps, key=_address)
        width = files[0].row_bytes
        span = max(_address(m) + len(m) for m in maps) - _address(first)
        self.rows = as_strided(first[:width].view(f"V{width}"), (span - width + 1,), (1,), writeable=False)
        blocks = [(_address(f.mapped) - _address(first) + at, size) for f in files for at, size in f.bodies]
        place, size = np.asarray(blocks, np.int64).T
        self._start, self._width = np.cumsum(size // width) - size // width, width
        self._origin = place - self._start * width  # where row 0 would lie, were it in the block

    def places(self, rows: Rows) -> Rows:
        """Where the given rows, which must exist, are in ``rows``."""
        block = np.searchsorted(self._start, rows, side="right") - 1
        return np.asarray(self._origin[block] + rows * self._width)


def _address(mapped: NDArray[np.uint8]) -> int:
    return mapped.ctypes.data


class RowMatrix:
    """A [N, D] matrix over the shards of a cache, read by ranges or by row numbers."""

    def __init__(self, files: Sequence[MatrixFile | MirroredMatrix], width: int) -> None:
        self._files = files
        self._starts = [0, *accumulate(f.shape[0] for f in files)]
        self.shape = (self._starts[-1], width)
        self.preloaded: Tensor | None = None  # all of it in a device's memory (``training/preload.py``)

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
        if len(rows) and (rows.min() < 0 or rows.max() >= self.shape[0]):
            raise ShapeError(f"rows {rows.min()} to {rows.max()} asked of a matrix of {self.shape[0]} rows")
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        if len(breaks) * SHORT_RUN > len(rows) and self._mapping is not None:
            return self._gather(self._mapping, rows, out)
        out = np.empty((len(rows), self.shape[1]), self.dtype) if out is None else out
        if len(rows) == 0:
            return out
        edges = [0, *breaks.tolist(), len(rows)]
        for (low, high), first in zip(pairwise(edges), rows[edges[:-1]].tolist(), strict=True):
            self.fill(first, first + high - low, out[low:high])
        return out

    @cached_property
    def _mapping(self) -> _Mapping | None:
        """None if some files are not mapped, or may come and go."""
        files = [f for f in self._files if f.shape[0]]
        lasting = [f for f in files if isinstance(f, MatrixFile) and f.bodies]
        return _Mapping(lasting) if files and len(lasting) == len(files) else None

    def _gather(self, mapping: _Mapping, rows: Rows, out: NDArray[Any] | None) -> NDArray[Any]:
        found = mapping.rows[mapping.places(rows)]
        if out is None:
            return found.view(self.dtype).reshape(len(rows), -1)
        out.view(found.dtype)[:, 0] = found
        return out

    def ask(self, rows: Rows) -> None:
        """Have the disk bring the given rows meanwhile; worth its small cost where they may not be in memory."""
        first = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        for low, count in zip(rows[first].tolist(), np.diff(first, append=len(rows)).tolist(), strict=True):
            for file, start, stop, _ in self._parts(low, low + count):
                file.ask(start, stop)

    def fill(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Copy rows ``start:stop`` into ``out`` [stop - start, D] bit for bit, without a look at the numbers."""
        for file, low, high, done in self._parts(start, stop):
            file.read(low, high, out[done : done + high - low])

    def _parts(self, start: int, stop: int) -> Iterator[tuple[MatrixFile | MirroredMatrix, int, int, int]]:
        """Rows ``start:stop`` file by file: from and to in the file, and how many rows came before."""
        shard = bisect_right(self._starts, start) - 1
        done = 0
        while done < stop - start:
            first = start + done - self._starts[shard]
            count = min(stop - start - done, self._files[shard].shape[0] - first)
            yield self._files[shard], first, first + count, done
            done += count
            shard += 1

    def _check_finite(self, stored: NDArray[Any]) -> None:
        if not all_finite(stored):
            folder = self._files[0].path.parents[2]
            raise NonFiniteError(
                f"cache {folder} holds NaN or infinite numbers in {self._files[0].path.name}",
                hint="extract it again",
            )
