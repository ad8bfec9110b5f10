"""A matrix of numbers as one Parquet column that can be memory-mapped.

A required FixedSizeBinary column, uncompressed, PLAIN, without dictionary and with ONE page per row group has its
body as raw bytes at the end of the column chunk: valid Parquet for every reader, and as fast as np.memmap for ours.
The reader checks this layout and falls back to pyarrow when another tool rewrote the file.
"""

import os
from bisect import bisect_right
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from calib.cache.schema import DTYPES
from calib.errors import FormatError, ShapeError
from calib.files import require

ROWS_PER_GROUP = 4096
_ONE_PAGE = 1 << 30


class MatrixWriter:
    """A matrix [N, width] written as its rows come: no more than one row group of it is held in memory.

    Every full group is made durable at once, so that the disk works while rows are computed and not when they end.
    """

    def __init__(self, path: Path, name: str, dtype: np.dtype[Any], width: int) -> None:
        """Column ``name`` of float16 or float32; dtype and width stand in the field's metadata."""
        description = {"calib.dtype": dtype.name, "calib.width": str(width)}
        self._row = pa.binary(width * dtype.itemsize)
        self._schema = pa.schema([pa.field(name, self._row, nullable=False, metadata=description)])
        self._path, self._held, self._n = path, np.empty((0, width), dtype), 0
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
            data_page_size=_ONE_PAGE,
            max_rows_per_page=_ONE_PAGE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None and self._n:
            self._write(self._held[: self._n])
        self._writer.close()

    def add(self, rows: NDArray[Any]) -> None:
        """Write ``rows`` [n, width] behind those that are there."""
        while len(rows):
            part = rows[: ROWS_PER_GROUP - self._n]
            rows = rows[len(part) :]
            if len(part) == ROWS_PER_GROUP:
                self._write_group(part)
                continue
            if len(self._held) == 0:
                self._held = np.empty((ROWS_PER_GROUP, self._held.shape[1]), self._held.dtype)
            self._held[self._n : self._n + len(part)] = part
            self._n += len(part)
            if self._n == ROWS_PER_GROUP:
                self._write_group(self._held)
                self._n = 0

    def _write_group(self, block: NDArray[Any]) -> None:
        self._write(block)
        with open(self._path, "rb") as f:
            os.fsync(f.fileno())

    def _write(self, block: NDArray[Any]) -> None:
        content = pa.py_buffer(np.ascontiguousarray(block))
        column = pa.FixedSizeBinaryArray.from_buffers(self._row, len(block), [None, content])
        self._writer.write_table(pa.table([column], schema=self._schema), row_group_size=ROWS_PER_GROUP)


def write_matrix(path: Path, name: str, rows: NDArray[Any]) -> None:
    """Write ``rows`` [N, D] (float16 or float32) as column ``name``."""
    write_blocks(path, name, rows.dtype, rows.shape[1], [rows])


def write_blocks(path: Path, name: str, dtype: np.dtype[Any], width: int, blocks: Iterable[NDArray[Any]]) -> None:
    """Write a matrix too large for memory: ``blocks`` [any, width], one behind the other."""
    with MatrixWriter(path, name, dtype, width) as writer:
        for block in blocks:
            writer.add(block)


class MatrixFile:
    """One Parquet matrix, read by row ranges. ``shape`` [N, D], ``dtype`` float16 or float32.

    ``bodies``: offset and bytes of every mapped block in the file; empty where the layout is not ours.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path`` and map it.

        Raises:
            MissingFileError: not there. FormatError: damaged, or not such a matrix.
        """
        try:
            file = pq.ParquetFile(require(path, "matrix file"))
        except (pa.ArrowException, OSError) as e:
            raise FormatError(f"{path} is not a readable Parquet file: {e}", hint="extract the cache again") from e
        field = file.schema_arrow.field(0)
        description = {k.decode(): v.decode() for k, v in (field.metadata or {}).items()}
        dtype = description.get("calib.dtype")
        if dtype not in DTYPES or not pa.types.is_fixed_size_binary(field.type):
            raise FormatError(f"{path} has no matrix column: expected FixedSizeBinary with dtype {' or '.join(DTYPES)}")
        self.path = path
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.shape = (file.metadata.num_rows, field.type.byte_width // self.dtype.itemsize)
        self.bodies = self._find_bodies(file.metadata)
        self._bytes = np.asarray(np.memmap(path, np.uint8, mode="r"))
        self._blocks = self._map() or self._load(file)
        counts = [len(b) for b in self._blocks]
        self._starts: list[int] = [0, *np.cumsum(counts).tolist()]

    def _find_bodies(self, metadata: Any) -> list[tuple[int, int]]:
        row_bytes = self.shape[1] * self.dtype.itemsize
        size = self.path.stat().st_size
        bodies = []
        for g in range(metadata.num_row_groups):
            chunk = metadata.row_group(g).column(0)
            body = chunk.num_values * row_bytes
            header = chunk.total_compressed_size - body
            plain = chunk.compression == "UNCOMPRESSED" and set(chunk.encodings) <= {"PLAIN", "RLE"}
            # One page has one header; a page header with a checksum takes a few dozen bytes.
            if not plain or chunk.dictionary_page_offset is not None or not 0 < header < 200:
                return []
            start = chunk.data_page_offset + header
            if start + body > size:
                raise FormatError(f"{self.path} is truncated", hint="extract the damaged shard again")
            bodies.append((start, body))
        return bodies

    def _map(self) -> list[NDArray[Any]]:
        return [
            self._bytes[start : start + size].view(self.dtype).reshape(-1, self.shape[1]) for start, size in self.bodies
        ]

    def _load(self, file: Any) -> list[NDArray[Any]]:
        column = file.read().column(0)
        return [
            np.frombuffer(c.buffers()[1], np.uint8)[c.offset * c.type.byte_width :][: len(c) * c.type.byte_width]
            .view(self.dtype)
            .reshape(-1, self.shape[1])
            for c in column.chunks
        ]

    def read(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Copy rows ``start:stop`` into ``out`` [stop - start, D]; converts where ``out`` has another dtype.

        Raises:
            ShapeError: the range is not inside the file.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise ShapeError(f"rows {start}:{stop} asked of {self.path}, which has {self.shape[0]}")
        done = 0
        block = bisect_right(self._starts, start) - 1
        while done < stop - start:
            low = start + done - self._starts[block]
            part = self._blocks[block][low : low + stop - start - done]
            target = out[done : done + len(part)]
            if target.dtype == part.dtype:  # bytes: a block may begin at an odd place of the file
                target.view(np.uint8)[...] = part.view(np.uint8)
            else:
                target[...] = part
            done += len(part)
            block += 1

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of every block its first row, and where row 0 would lie in the file if the block reached back to it."""
        width = self.shape[1] * self.dtype.itemsize
        place, size = np.asarray(self.bodies, np.int64).reshape(-1, 2).T
        start = np.cumsum(size // width) - size // width
        return start, place - start * width

    def gather(self, rows: NDArray[np.int64], out: NDArray[np.uint8], places: NDArray[np.int64]) -> bool:
        """Copy ``rows`` as bytes to ``out[places]``; False if the file is not mapped."""
        if not self.bodies:
            return False
        start, place = self._places
        block = np.searchsorted(start, rows, side="right") - 1
        out[places] = self._windows[place[block] + rows * (self.shape[1] * self.dtype.itemsize)]
        return True

    @cached_property
    def _windows(self) -> NDArray[np.uint8]:
        """A row's bytes at every place of a mapped file: rows anywhere are one index away, although the blocks of
        ``bodies`` lie at uneven distances."""
        width = self.shape[1] * self.dtype.itemsize
        return as_strided(self._bytes, (max(0, len(self._bytes) - width + 1), width), (1, 1), writeable=False)
