"""Proposals and detections as Arrow IPC streams.

In: batches with the columns ``features`` (fixed_size_list of float or halffloat [D]), ``boxes`` (of float [4] or
[4 C]), optionally ``logits`` and ``image`` (any integer, the same for all proposals of an image); the metadata of the
schema name the model and, optionally, its version and thresholds. All buffers are used as they lie in the body;
compressed ones are refused, since the stream itself would say how much memory they take.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from calib.errors import NonFiniteError, ShapeError

from ..errors import BadRequestError, TooLargeError

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
_FLOATS = (pa.float16(), pa.float32())
_MAX_BATCHES = 10_000
_MAX_COLUMNS = 64


@dataclass(frozen=True)
class Stream:
    """A stream whose batches are whole and small enough; columns are not looked at yet."""

    metadata: dict[str, str]
    schema: pa.Schema
    batches: Sequence[pa.RecordBatch]

    def has(self, name: str) -> bool:
        """Whether there is a column ``name``."""
        return name in self.schema.names

    def matrix(self, name: str, widths: Sequence[int], types: Sequence[Any] = _FLOATS) -> NDArray[Any]:
        """Column ``name`` as [N, width].

        Raises:
            BadRequestError: not there, or of another type. ShapeError: of another width. NonFiniteError: nulls in it.
        """
        kind = self._type(name)
        expected = f"fixed_size_list of {' or '.join(map(str, types))}"
        if not pa.types.is_fixed_size_list(kind) or kind.value_type not in types:
            raise BadRequestError(f"column '{name}' is {str(kind)[:64]}: expected {expected}")
        if kind.list_size not in widths:
            raise ShapeError(f"column '{name}' has width {kind.list_size}: expected {' or '.join(map(str, widths))}")
        parts = [np.zeros((0, kind.list_size), kind.value_type.to_pandas_dtype())]
        for batch in self.batches:
            values = self._whole(name, batch).flatten()
            self._no_nulls(name, values)
            parts.append(values.to_numpy(zero_copy_only=True).reshape(-1, kind.list_size))
        return np.concatenate(parts)

    def integers(self, name: str) -> NDArray[np.int64]:
        """Column ``name`` as [N].

        Raises:
            BadRequestError: not integers that int64 can hold. NonFiniteError: nulls in it.
        """
        kind = self._type(name)
        if not pa.types.is_integer(kind) or kind == pa.uint64():
            raise BadRequestError(f"column '{name}' is {str(kind)[:64]}: expected integers of up to 63 bits")
        parts = [self._whole(name, batch).to_numpy(zero_copy_only=False) for batch in self.batches]
        return np.concatenate([np.zeros(0, np.int64), *(part.astype(np.int64) for part in parts)])

    def _type(self, name: str) -> Any:
        if self.schema.names.count(name) != 1:
            raise BadRequestError(f"the stream needs one column '{name}': it has {str(self.schema.names[:8])[:200]}")
        return self.schema.field(name).type

    def _whole(self, name: str, batch: pa.RecordBatch) -> Any:
        column = batch.column(name)
        self._no_nulls(name, column)
        return column

    @staticmethod
    def _no_nulls(name: str, column: Any) -> None:
        if column.null_count:
            raise NonFiniteError(f"column '{name}' holds nulls")


def read_stream(body: bytearray, max_rows: int, max_metadata: int) -> Stream:
    """Read the batches of a stream.

    Raises:
        BadRequestError: not an IPC stream of plain batches. TooLargeError: too many rows, batches or metadata.
    """
    if body.startswith(b"ARROW1"):
        raise BadRequestError("the body is an Arrow IPC file", hint="write the stream format")
    try:
        messages = _messages(body, max_metadata)
        first = next(messages, None)
        if first is None or first.type != "schema":
            raise BadRequestError("the body is not an Arrow IPC stream: it does not begin with a schema")
        schema = pa.ipc.read_schema(first)
        _ = schema.names  # names that are no text are found here
        _check_columns(schema)
        batches: list[Any] = []
        rows = 0
        for message in islice(messages, _MAX_BATCHES + 1):
            if message.type != "record batch":
                raise BadRequestError(f"the stream holds a {message.type}: only record batches are expected")
            if _is_compressed(message.metadata):
                raise BadRequestError("the batches are compressed", hint="write the stream without compression")
            batch = pa.ipc.read_record_batch(message, schema)
            batch.validate(full=True)
            rows += batch.num_rows
            if rows > max_rows or len(batches) == _MAX_BATCHES:
                raise TooLargeError(f"at most {max_rows} rows in {_MAX_BATCHES} batches are accepted")
            batches.append(batch)
    except (pa.ArrowException, OSError, ValueError, struct.error) as e:
        raise BadRequestError(f"the body is not a sound Arrow IPC stream: {str(e).splitlines()[0][:200]}") from None
    metadata = {_text(key): _text(value) for key, value in (schema.metadata or {}).items()}
    return Stream(metadata, schema, batches)


def _check_columns(schema: pa.Schema) -> None:
    """Bound the columns, also those that nobody reads: 16 bytes of a batch make an object of some hundred in memory."""
    if len(schema.names) > _MAX_COLUMNS:
        raise BadRequestError(f"the stream has {len(schema.names)} columns: at most {_MAX_COLUMNS} are accepted")
    for field in schema:
        kind = field.type.value_type if pa.types.is_fixed_size_list(field.type) else field.type
        if pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType):
            raise BadRequestError(f"column '{field.name[:64]}' is {str(kind)[:64]}: expected values or fixed_size_list")


def _messages(body: bytearray, max_metadata: int) -> Iterator[Any]:
    reader = pa.ipc.MessageReader.open_stream(pa.py_buffer(body))
    while True:
        try:
            message = reader.read_next_message()
        except StopIteration:
            return
        if message.metadata.size > max_metadata:
            raise TooLargeError(f"a message has {message.metadata.size} bytes of metadata: at most {max_metadata}")
        yield message


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _is_compressed(metadata: Any) -> bool:
    """Whether a RecordBatch message (a FlatBuffer, verified by pyarrow) has its field ``compression``.

    pyarrow does not tell before it has decompressed. Source: Arrow's format/Message.fbs: Message.header is field 2, and
    RecordBatch.compression field 3; a field's place stands in the table's vtable, 0 where it is absent.
    """
    content = memoryview(metadata)

    def field(table: int, number: int) -> int:
        vtable = table - struct.unpack_from("<i", content, table)[0]
        size = struct.unpack_from("<H", content, vtable)[0]
        slot = 4 + 2 * number
        offset: int = struct.unpack_from("<H", content, vtable + slot)[0] if slot < size else 0
        return table + offset if offset else 0

    root = struct.unpack_from("<I", content, 0)[0]
    header = field(root, 2)
    return not header or field(header + struct.unpack_from("<I", content, header)[0], 3) != 0


def write_stream(columns: dict[str, Any], metadata: dict[str, str]) -> memoryview:
    """One batch of ``columns``; arrays of two dimensions become fixed_size_list."""
    arrays = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])
        if array.ndim == 2
        else pa.array(array)
        for name, array in columns.items()
    }
    fields = [pa.field(name, array.type, nullable=False) for name, array in arrays.items()]
    batch = pa.record_batch(list(arrays.values()), schema=pa.schema(fields, metadata=metadata))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue())
