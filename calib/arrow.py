"""Columns of numbers in Parquet and Arrow files, whoever wrote them: pandas, polars, datasets, pyarrow's tensors.

Letters: N rows.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import feather

from calib.errors import FormatError, ShapeError

_BATCH = 8192  # rows of Parquet at once
_PARQUET, _FILE, _OLD_FEATHER, _STREAM = b"PAR1", b"ARROW1", b"FEA1", b"\xff\xff\xff\xff"
_LARGEST_WHOLE = 2.0**53  # beyond it not every whole number is a float64


def is_table(path: Path) -> bool:
    """Whether the first bytes of a file are those of Parquet, Arrow or Feather."""
    with open(path, "rb") as file:
        return file.read(6).startswith((_PARQUET, _FILE, _OLD_FEATHER, _STREAM))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """
    Raises:
        FormatError: in place of what pyarrow raises for a damaged file.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as e:
        raise FormatError(f"{path} cannot be read: {e}", hint="damaged, or of another kind? write it again") from e


def record_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet, Arrow (file or stream) or Feather file, which its first bytes tell from each other,
    without the columns in which pandas keeps an index that has no name of its own. The last batch has no row."""
    with open(path, "rb") as file:
        first = file.read(6)
    if first.startswith(_PARQUET):
        with pq.ParquetFile(path) as parquet:
            yield from _named(parquet.iter_batches(_BATCH), parquet.schema_arrow)
        return
    with pa.memory_map(str(path)) as source:
        if first.startswith(_OLD_FEATHER):
            table = feather.read_table(source)
            yield from _named(table.to_batches(), table.schema)
        elif first.startswith(_FILE):
            reader = pa.ipc.open_file(source)
            yield from _named(map(reader.get_batch, range(reader.num_record_batches)), reader.schema)
        else:
            stream = pa.ipc.open_stream(source)
            yield from _named(stream, stream.schema)


def _named(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    index = _index_columns(schema)
    for batch in chain(batches, [pa.RecordBatch.from_arrays([pa.nulls(0, t) for t in schema.types], schema=schema)]):
        yield batch.drop_columns(index) if index else batch


def _index_columns(schema: pa.Schema) -> list[str]:
    listed = json.loads((schema.metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
    return [n for n in schema.names if re.fullmatch(r"__index_level_\d+__", n) and (not listed or n in listed)]


def numbers(column: pa.Array, name: str, path: Path) -> NDArray[Any]:
    """[N] or, of lists or tensors of one length, [N, width]; in whatever type of number they are.

    Raises:
        FormatError: nulls. ShapeError: lists of several lengths.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        column = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise FormatError(f"{path}: column {name} has {column.null_count} nulls, the first in row {row}")
    if isinstance(column, pa.FixedShapeTensorArray):  # whose axes may be stored in another order
        return np.asarray(column.to_numpy_ndarray()).reshape(len(column), -1)
    if isinstance(column, pa.ExtensionArray):
        return numbers(column.storage, name, path)
    if pa.types.is_dictionary(column.type):
        return numbers(column.dictionary_decode(), name, path)
    if pa.types.is_run_end_encoded(column.type):
        return numbers(pc.run_end_decode(column), name, path)
    if pa.types.is_decimal(column.type):
        return numbers(column.cast(pa.float64()), name, path)
    if not (pa.types.is_nested(column.type) and hasattr(column, "flatten") and not pa.types.is_struct(column.type)):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    if len(lengths) and (lengths != lengths[0]).any():
        raise ShapeError(f"{path}: lists of column {name} have {lengths.min()} to {lengths.max()} numbers")
    return numbers(column.flatten(), name, path).reshape(len(column), -1 if len(column) else 0)


def whole(values: NDArray[Any], name: str, path: Path, first: int = 0) -> NDArray[np.int64]:
    """[N] numbers as int64; floats that are whole, as pandas makes of ids, are taken. ``first``: row of ``values[0]``.

    Raises:
        FormatError: no whole numbers; names the row.
    """
    if values.dtype.kind not in "iuf":
        raise FormatError(f"{path}: {name} holds {values.dtype}, expected whole numbers")
    wrong = np.zeros(values.shape, np.bool_)
    if values.dtype.kind == "f":
        wrong = ~(np.abs(values) <= _LARGEST_WHOLE) | (values != np.floor(values))
    elif values.dtype == np.uint64:
        wrong = values >= np.uint64(2**63)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise FormatError(f"{path}: {name} of row {first + row} is {values[row]}, expected a whole number below 2^63")
    return values.astype(np.int64)
