"""The bytes themselves, without a server: alignment, one buffer, tensors at any offset."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import CalibError
from calib.server.formats.wire import Bounds, Expected, check_reply_size, encode_infer, parse_infer

BOUNDS = Bounds(max_rows=100, max_json_header_bytes=2000, max_reply_bytes=4000)


def request_bytes(array: np.ndarray[tuple[int, ...], np.dtype[np.float32]], padding: int = 0) -> tuple[bytearray, str]:
    parameters = {"binary_data_size": array.nbytes}
    entry = {"name": "FEATURES", "datatype": "FP32", "shape": list(array.shape), "parameters": parameters}
    header = json.dumps({"inputs": [entry]}).encode() + b" " * padding
    return bytearray(header + array.tobytes()), str(len(header))


@pytest.mark.parametrize("padding", range(8))
def test_a_tensor_may_start_anywhere(padding: int) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    body, length = request_bytes(array, padding)
    parsed = parse_infer(body, length, {"FEATURES": Expected((4,))}, BOUNDS)
    np.testing.assert_array_equal(parsed.tensors["FEATURES"].numpy(), array)
    assert not parsed.binary and not parsed.outputs and parsed.request_id is None


@pytest.mark.parametrize("name", ["m", "a-model-of-another-length"])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_the_scores_of_a_reply_start_on_a_multiple_of_64(name: str, rows: int) -> None:
    scores = torch.rand(rows, 4)[:, :-1].numpy()  # not contiguous, as heads return them
    reply = encode_infer(name, 3, "id", [("SCORES", scores, True)])
    assert reply.header_length is not None and reply.header_length % 64 == 0
    header = json.loads(bytes(reply.body[: reply.header_length]))
    assert header["outputs"][0]["parameters"]["binary_data_size"] == 12 * rows
    assert (header["model_name"], header["model_version"], header["id"]) == (name, "3", "id")
    sent = np.frombuffer(reply.body, np.float32, offset=reply.header_length)
    np.testing.assert_array_equal(sent, scores.reshape(-1))


def test_json_scores_come_back_to_the_same_bits() -> None:
    scores = (torch.rand(50, 7) ** 8).numpy()
    reply = encode_infer("m", 1, None, [("SCORES", scores, False)])
    data = json.loads(bytes(reply.body))["outputs"][0]["data"]
    assert reply.header_length is None
    np.testing.assert_array_equal(np.array(data, np.float32), scores.reshape(-1))


def test_the_reply_is_bounded_before_it_is_computed() -> None:
    check_reply_size([(600, True), (400, True)], BOUNDS)
    with pytest.raises(CalibError, match="reply"):
        check_reply_size([(600, True), (401, True)], BOUNDS)
    with pytest.raises(CalibError, match="reply"):
        check_reply_size([(1000, False)], BOUNDS)


def test_outputs_of_several_kinds_follow_each_other() -> None:
    scores, rows = np.arange(3, dtype=np.float16), np.array([7, 8], np.int32)
    outputs = [("A", scores, True), ("B", rows, False), ("C", rows, True), ("D", np.zeros((0, 4), np.float32), True)]
    reply = encode_infer("m", 1, None, outputs)
    assert reply.header_length is not None
    header = json.loads(bytes(reply.body[: reply.header_length]))["outputs"]
    assert [(o["datatype"], o["shape"]) for o in header] == [
        ("FP16", [3]),
        ("INT32", [2]),
        ("INT32", [2]),
        ("FP32", [0, 4]),
    ]
    assert header[1]["data"] == [7, 8] and "data" not in header[0]
    sizes = [o["parameters"]["binary_data_size"] for o in header if "parameters" in o]
    assert sizes == [6, 8, 0] and len(reply.body) == reply.header_length + 14
    assert bytes(reply.body[reply.header_length :]) == scores.tobytes() + rows.tobytes()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
KEYS = ("name", "datatype", "shape", "data", "parameters")
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["FEATURES", "SIZES"]) | JSON,
        "datatype": st.sampled_from(["FP32", "FP16", "BF16", "INT32", "INT8"]) | JSON,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | st.just([1, 2]) | JSON,
        "data": st.lists(st.floats(width=32), max_size=4) | JSON,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-1, 20) | JSON}) | JSON,
    },
)


@given(
    inputs=st.lists(ENTRY | JSON, max_size=3) | JSON,
    more=st.dictionaries(st.sampled_from(["id", "outputs", "parameters"]), JSON, max_size=3),
    tail=st.binary(max_size=20),
    has_length=st.booleans(),
)
def test_whatever_is_sent_is_a_request_or_a_calib_error(
    inputs: object, more: dict[str, object], tail: bytes, has_length: bool
) -> None:
    header = json.dumps({"inputs": inputs, **more}).encode()
    length = str(len(header)) if has_length else None
    try:
        request = parse_infer(
            bytearray(header + tail), length, {"FEATURES": Expected((2,)), "SIZES": Expected((), ("INT32",))}, BOUNDS
        )
    except CalibError:
        return
    assert all(tensor.ndim == 1 or tensor.shape[1] == 2 for tensor in request.tensors.values())
