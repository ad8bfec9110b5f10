"""Bytes of an inference request and its reply: a JSON header, then tensors as they lie in memory.

Source: Open Inference Protocol V2 (kserve, inference_rest.md) and Triton's binary tensor data extension. Pure
functions on bytes, without the web framework. Letters: N proposals, D feature size, C foreground classes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import BadRequestError, TooLargeError, shown
from .limits import check_containers, decimal

FLOATS = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}
DATATYPES = FLOATS | {"INT32": torch.int32}
_NAMES = {"float32": "FP32", "float16": "FP16", "int32": "INT32"}

# Spaces after the JSON header put the first tensor on a cache line, relative to the start of the body.
_ALIGNMENT = 64
# Upper bound of one float32 as JSON text with its comma, "-1.17549435e-38,".
_JSON_NUMBER_BYTES = 16


@dataclass(frozen=True)
class Expected:
    """An input that a model knows: ``[N, width]`` for one of ``widths``, or ``[N]`` without any."""

    widths: tuple[int, ...]
    datatypes: tuple[str, ...] = tuple(FLOATS)

    def shape_text(self) -> str:
        """For errors."""
        return " or ".join(f"[N, {w}]" for w in self.widths) or "[N]"


@dataclass(frozen=True)
class Bounds:
    """Largest number of rows, and sizes in bytes."""

    max_rows: int
    max_json_header_bytes: int
    max_reply_bytes: int


@dataclass(frozen=True)
class InferRequest:
    """A parsed request. ``tensors`` keep the datatype they were sent in and may point into the body.

    ``outputs`` are the names asked for, in order, and whether each goes out as bytes; empty when none was named, and
    ``binary`` says then how the default goes out. ``parameters`` are those of the request, unchecked.
    """

    request_id: str | None
    tensors: dict[str, Tensor]  # name -> [N, width] or [N]
    outputs: dict[str, bool]
    binary: bool
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """Bytes to send; ``header_length`` is that of the JSON in front of tensors, None when all is JSON.

    ``record`` is what the access log says of it.
    """

    body: bytearray | bytes | memoryview
    header_length: int | None = None
    media_type: str = "application/json"
    record: dict[str, Any] = field(default_factory=dict)


def parse_infer(
    body: bytearray, header_length: str | None, inputs: Mapping[str, Expected], bounds: Bounds
) -> InferRequest:
    """Read a request.

    Args:
        body: JSON, directly followed by the binary inputs in the order of "inputs".
        header_length: value of Inference-Header-Content-Length; None says that the whole body is JSON.
        inputs: those that the model knows.

    Raises:
        BadRequestError: anything that does not follow the protocol or does not fit the model.
        TooLargeError: a JSON header beyond its bound.
    """
    header_bytes = _header_bytes(body, header_length, bounds)
    header = _json_object(memoryview(body)[:header_bytes])
    request_id = header.get("id")
    if not isinstance(request_id, str | None):
        raise BadRequestError("'id' must be a string")
    blobs = _Blobs(body, header_bytes, header_length is not None)
    tensors: dict[str, Tensor] = {}
    for entry in _entries(header, "inputs"):
        name = entry["name"]
        if name not in inputs or name in tensors:
            problem = "appears twice" if name in tensors else "is not known"
            raise BadRequestError(f"input '{name[:64]}' {problem}: expected {', '.join(inputs)}")
        tensors[name] = _tensor(entry, inputs[name], bounds.max_rows, blobs)
    blobs.finish()
    parameters = parameters_of(header)
    binary = _flag(parameters, "binary_data_output", False)
    return InferRequest(request_id, tensors, _outputs(header, binary), binary, parameters)


def _header_bytes(body: bytearray, header_length: str | None, bounds: Bounds) -> int:
    if header_length is None:
        return len(body)
    length = decimal(header_length, "Inference-Header-Content-Length")
    if length > len(body):
        raise BadRequestError(f"Inference-Header-Content-Length is {length}, but the body has {len(body)} bytes")
    if length == 0:
        raise BadRequestError("requests without a JSON header are not supported", hint="describe the inputs in JSON")
    if length > bounds.max_json_header_bytes:
        raise TooLargeError(f"the JSON header has {length} bytes: at most {bounds.max_json_header_bytes} are accepted")
    return length


def _json_object(text: memoryview) -> dict[str, Any]:
    check_containers(text)
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as e:
        raise BadRequestError(f"the request is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise BadRequestError("the request must be a JSON object")
    return _given(value)


def _given(holder: dict[str, Any]) -> dict[str, Any]:
    """What a JSON object says: a field that is null counts as absent, since clients write data classes whole."""
    return {key: value for key, value in holder.items() if value is not None}


def parse_json(body: bytearray) -> dict[str, Any]:
    """A JSON object; an empty body is an empty object.

    Raises:
        BadRequestError: not a JSON object.
    """
    return _json_object(memoryview(body)) if body else {}


def _entries(header: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects of "inputs" or "outputs", each with a name."""
    entries = header.get(key)
    if not isinstance(entries, list):
        raise BadRequestError(f"'{key}' must be a list of objects")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise BadRequestError(f"every entry of '{key}' must be an object with a 'name'")
    return [_given(entry) for entry in entries]


def parameters_of(holder: dict[str, Any]) -> dict[str, Any]:
    """The object "parameters" of a request, an input or an output; empty where there is none.

    Raises:
        BadRequestError: not an object, or it names shared memory.
    """
    parameters = holder.get("parameters", {})
    if not isinstance(parameters, dict):
        raise BadRequestError("'parameters' must be an object")
    if any(key.startswith("shared_memory") for key in parameters):
        raise BadRequestError("shared memory is not supported", hint="send the tensor in the body")
    return _given(parameters)


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise BadRequestError(f"parameter '{name}' must be true or false")
    return value


def _outputs(header: dict[str, Any], binary: bool) -> dict[str, bool]:
    """Outputs by name, and whether each goes out as bytes; its own parameter overrides that of the request."""
    outputs: dict[str, bool] = {}
    for entry in _entries(header, "outputs") if "outputs" in header else []:
        name = entry["name"]
        if name in outputs:
            raise BadRequestError(f"output '{name[:64]}' appears twice")
        if parameters_of(entry).get("classification", 0) not in (0, False):
            raise BadRequestError("parameter 'classification' is not supported", hint="ask for TOP_SCORES")
        outputs[name] = _flag(parameters_of(entry), "binary_data", binary)
    return outputs


def _tensor(entry: dict[str, Any], expected: Expected, max_rows: int, blobs: "_Blobs") -> Tensor:
    """One input -> [N, width] or [N]."""
    name, datatype = entry["name"], entry.get("datatype")
    if not isinstance(datatype, str) or datatype not in expected.datatypes:
        known = ", ".join(expected.datatypes)
        raise BadRequestError(f"input '{name}' has datatype {shown(datatype)}: expected {known}")
    shape = _shape(name, entry.get("shape"), expected, max_rows)
    size = parameters_of(entry).get("binary_data_size")
    if size is None:
        return _from_json(name, datatype, entry.get("data"), shape)
    if "data" in entry:
        raise BadRequestError(f"input '{name}' has both 'data' and 'binary_data_size'")
    return blobs.take(name, DATATYPES[datatype], shape, size)


def _shape(name: str, shape: Any, expected: Expected, max_rows: int) -> tuple[int, ...]:
    whole = isinstance(shape, list) and all(type(n) is int for n in shape)
    rank = 2 if expected.widths else 1
    if not whole or len(shape) != rank or shape[0] < 0 or (rank == 2 and shape[1] not in expected.widths):
        raise BadRequestError(f"input '{name}' has shape {shown(shape)}: expected {expected.shape_text()}")
    if shape[0] > max_rows:
        raise BadRequestError(f"input '{name}' has {shape[0]} rows: at most {max_rows} are accepted")
    return tuple(shape)


def _from_json(name: str, datatype: str, data: Any, shape: tuple[int, ...]) -> Tensor:
    """Numbers, flat or in rows. Their types are known before NumPy sees them: it would make an array of anything, and
    one of texts as wide as the longest of them."""
    if datatype not in ("FP32", "INT32"):
        raise BadRequestError(f"input '{name}' is {datatype} in JSON: send FP32, or send it in binary")
    whole = "whole " if datatype == "INT32" else ""
    expected = f"expected {list(shape)} as shape of a list of {whole}numbers, flat or in rows"
    if not isinstance(data, list):
        raise BadRequestError(f"'data' of input '{name}' is {shown(data)}: {expected}")
    numbers = data
    if len(shape) == 2 and data and isinstance(data[0], list):
        if set(map(type, data)) != {list} or set(map(len, data)) != {shape[1]}:
            raise BadRequestError(f"'data' of input '{name}' has rows of unequal length: {expected}")
        numbers = list(chain.from_iterable(data))
    if len(numbers) != math.prod(shape):
        raise BadRequestError(f"'data' of input '{name}' has {len(numbers)} numbers: {expected}")
    wrong = set(map(type, numbers)) - ({int} if datatype == "INT32" else {int, float})
    if wrong:
        at = next(k for k, number in enumerate(numbers) if type(number) in wrong)
        raise BadRequestError(f"'data' of input '{name}' has {shown(numbers[at])} at {at}: {expected}")
    if datatype == "INT32" and numbers and not -(2**31) <= min(numbers) <= max(numbers) < 2**31:
        raise BadRequestError(f"'data' of input '{name}' must be whole numbers below 2^31")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinity, which is refused with its name
        array = np.array(numbers, np.int32 if datatype == "INT32" else np.float32)
    return torch.from_numpy(array.reshape(shape))


class _Blobs:
    """The binary part of a body; tensors are taken from it one after the other."""

    def __init__(self, body: bytearray, start: int, announced: bool) -> None:
        self._body, self._at, self._announced = body, start, announced

    def take(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], size: Any) -> Tensor:
        """A view of the next ``size`` bytes; it may start at any offset, since clients do not pad."""
        count = math.prod(shape)
        expected = count * dtype.itemsize
        if type(size) is not int or size != expected:
            raise BadRequestError(f"input '{name}' has binary_data_size {shown(size)}: expected {expected}")
        if not self._announced:
            raise BadRequestError(
                f"input '{name}' is binary, but the header Inference-Header-Content-Length is missing"
            )
        if self._at + size > len(self._body):
            raise BadRequestError(f"the body ends {self._at + size - len(self._body)} bytes before input '{name}' does")
        start, self._at = self._at, self._at + size
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._body, dtype=dtype, count=count, offset=start).view(shape)

    def finish(self) -> None:
        """Raise BadRequestError if bytes are left."""
        if self._at != len(self._body):
            raise BadRequestError(f"the body has {len(self._body) - self._at} bytes more than its inputs")


def check_reply_size(outputs: Iterable[tuple[int, bool]], bounds: Bounds) -> None:
    """Raise TooLargeError if outputs of so many numbers, as bytes or as JSON, would be too large together.

    Called before anything is computed.
    """
    size = sum(numbers * (4 if binary else _JSON_NUMBER_BYTES) for numbers, binary in outputs)
    if size > bounds.max_reply_bytes:
        raise TooLargeError(
            f"the reply would have up to {size} bytes: at most {bounds.max_reply_bytes} are sent",
            hint="send fewer rows, or ask for fewer outputs, in binary",
        )


def encode_infer(
    model: str, version: int, request_id: str | None, outputs: Sequence[tuple[str, NDArray[Any], bool]]
) -> Reply:
    """Write outputs (name, array, whether as bytes) into a reply, in their order."""
    described: list[dict[str, Any]] = []
    header: dict[str, Any] = {"model_name": model, "model_version": str(version), "outputs": described}
    if request_id is not None:
        header["id"] = request_id
    for name, array, binary in outputs:
        output: dict[str, Any] = {"name": name, "datatype": _NAMES[str(array.dtype)], "shape": list(array.shape)}
        if binary:
            output["parameters"] = {"binary_data_size": array.nbytes}
        else:
            output["data"] = np.ascontiguousarray(array).reshape(-1)
        described.append(output)
    text = orjson.dumps(header, option=orjson.OPT_SERIALIZE_NUMPY)
    blobs = [array for _, array, binary in outputs if binary]
    if not blobs:
        return Reply(text)
    length = len(text) + -len(text) % _ALIGNMENT
    body = np.empty(length + sum(array.nbytes for array in blobs), np.uint8)  # not zeroed, as bytearray is
    body[:length] = np.frombuffer(text.ljust(length), np.uint8)
    at = length
    for array in blobs:
        end = at + array.nbytes
        np.copyto(body[at:end].view(array.dtype).reshape(array.shape), array)
        at = end
    return Reply(body.data, length, "application/octet-stream")
