"""``POST /v1/rescore`` with Arrow IPC streams, in and out."""

from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from calib.errors import CalibError
from calib.score.detect import detect
from calib.server.formats.arrow import MEDIA_TYPE, read_stream
from calib.settings import Nms

from .conftest import CLASSES, FEATURE_SIZE, Server

Array = NDArray[Any]
ARROW = {"Content-Type": MEDIA_TYPE}


def fixed(array: Array) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


def columns(features: Array, boxes: Array, **more: Array) -> dict[str, pa.Array]:
    one = {"features": fixed(features), "boxes": fixed(boxes)}
    return one | {k: fixed(v) if v.ndim == 2 else pa.array(v) for k, v in more.items()}


def stream(
    named: dict[str, pa.Array], batch_rows: int = 1000, compression: str | None = None, **metadata: str
) -> bytes:
    table = pa.table(named).replace_schema_metadata({"model": "linear"} | metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return bytes(sink.getvalue())


def ask(http: httpx.Client, body: bytes, **headers: str) -> httpx.Response:
    return http.post("/v1/rescore", content=body, headers=ARROW | headers)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("batch_rows", [7, 1000])
def test_several_images_in_one_stream(
    http: httpx.Client, server: Server, features: Array, boxes: Array, dtype: Any, batch_rows: int
) -> None:
    image = np.repeat([17, 4, 2**40], [15, 5, 20])
    named = columns(features.astype(dtype), boxes, image=image)
    reply = ask(http, stream(named, batch_rows, score_threshold="0.1", max_detections="8", version="2"))
    assert reply.status_code == 200 and reply.headers["content-type"] == MEDIA_TYPE
    found = pa.ipc.open_stream(reply.content).read_all()
    assert found.schema.metadata == {b"model_name": b"linear", b"model_version": b"2"}
    scores = server.head("linear", 2).scores(torch.from_numpy(features)).contiguous().numpy()
    at = 0
    for name, (start, stop) in zip((17, 4, 2**40), pairwise([0, 15, 20, 40]), strict=True):
        wanted = detect(scores[start:stop], boxes[start:stop], Nms(0.1, 0.4, 8), min_box_side=0.01)
        part = found.slice(at, len(wanted.row)).to_pydict()
        at += len(wanted.row)
        assert part["image"] == [name] * len(wanted.row)
        assert part["row"] == (wanted.row + start).tolist()
        assert part["category_index"] == wanted.category.tolist()
        assert part["category_id"] == [3 + 2 * c for c in part["category_index"]]
        np.testing.assert_array_equal(np.array(part["score"], np.float32), wanted.score)
        np.testing.assert_array_equal(np.array(part["box"], np.float32).reshape(-1, 4), wanted.box)
    assert at == len(found) > 8


def test_json_of_a_stream_and_a_stream_of_json(http: httpx.Client, features: Array, boxes: Array) -> None:
    body = {"model": "linear", "features": features.tolist(), "boxes": boxes.tolist()}
    plain = http.post("/v1/rescore", json=body).json()["detections"]
    as_json = ask(http, stream(columns(features, boxes)), Accept="application/json").json()["detections"]
    assert as_json == plain and len(plain) > 3
    as_stream = http.post("/v1/rescore", json=body, headers={"Accept": MEDIA_TYPE})
    found = pa.ipc.open_stream(as_stream.content).read_all().to_pylist()
    assert [one["row"] for one in found] == [one["row"] for one in plain]
    images = ask(http, stream(columns(features, boxes, image=np.full(40, 9))), Accept="application/json")
    assert {one["image"] for one in images.json()["detections"]} == {9}


def test_logits_and_boxes_of_each_class(http: httpx.Client, server: Server, features: Array, boxes: Array) -> None:
    logits = np.random.default_rng(2).standard_normal((40, CLASSES + 1)).astype(np.float32)
    own = np.repeat(boxes[:, None], CLASSES, axis=1) + np.arange(CLASSES, dtype=np.float32)[:, None]
    named = columns(features, own.reshape(40, -1), logits=logits)
    found = pa.ipc.open_stream(ask(http, stream(named, model="own-logits")).content).read_all().to_pydict()
    scores = torch.from_numpy(logits).softmax(dim=1)[:, :-1].contiguous().numpy()
    wanted = detect(scores, own, Nms(0.05, 0.4, 20), min_box_side=0.01)
    assert found["row"] == wanted.row.tolist()
    np.testing.assert_array_equal(np.array(found["box"], np.float32), wanted.box)


def test_no_rows_and_no_batches(http: httpx.Client, features: Array, boxes: Array) -> None:
    for named in (columns(features[:0], boxes[:0]), columns(features[:0], boxes[:0], image=np.zeros(0, np.int64))):
        reply = ask(http, stream(named))
        assert reply.status_code == 200 and len(pa.ipc.open_stream(reply.content).read_all()) == 0


def with_null(array: Array) -> pa.Array:
    values = pa.array(array.reshape(-1), mask=np.arange(array.size) == 3)
    return pa.FixedSizeListArray.from_arrays(values, array.shape[1])


def bodies(features: Array, boxes: Array) -> dict[str, tuple[bytes, int, str]]:
    good = columns(features, boxes)
    whole = stream(good)
    dictionary = pa.array(["a"] * 40).dictionary_encode()
    return {
        "empty": (b"", 400, "schema"),
        "json": (b"{}", 400, "Arrow IPC"),
        "cut": (whole[:-500], 400, "Arrow IPC"),
        "file format": (b"ARROW1\0\0" + whole, 400, "Arrow IPC"),
        "lz4": (stream(good, compression="lz4"), 400, "compressed"),
        "zstd": (stream(good, compression="zstd"), 400, "compressed"),
        "no model": (stream(good, model=""), 404, "unknown model"),
        "other model": (stream(good, model="nothing"), 404, "unknown model"),
        "version": (stream(good, version="99"), 404, "no version"),
        "threshold": (stream(good, score_threshold="1.5"), 400, "metadata score_threshold"),
        "nan": (stream(good, score_threshold="nan"), 400, "metadata score_threshold"),
        "no boxes": (stream({"features": good["features"]}), 400, "'boxes'"),
        "doubles": (stream(columns(features.astype(np.float64), boxes)), 400, ["float", "or", "halffloat"][0]),
        "variable lists": (stream(good | {"features": pa.array(features.tolist())}), 400, "fixed_size_list"),
        "narrow": (stream(columns(features[:, :-1], boxes)), 400, "width 31"),
        "nulls": (stream(good | {"features": with_null(features)}), 400, "nulls"),
        "null rows": (stream(good | {"boxes": pa.array([None] * 40, good["boxes"].type)}), 400, "nulls"),
        "not finite": (stream(columns(np.where(features > 1, np.float32(np.inf), features), boxes)), 400, "infinity"),
        "boxes not finite": (stream(columns(features, np.full_like(boxes, np.nan))), 400, "infinity"),
        "scattered": (stream(columns(features, boxes, image=np.arange(40) % 2)), 400, "sort by image"),
        "many images": (
            stream(columns(*(np.repeat(a, 2, 0) for a in (features, boxes)), image=np.arange(80))),
            400,
            "64",
        ),
        "float images": (stream(columns(features, boxes, image=np.ones(40))), 400, "integers"),
        "dictionary": (stream(good | {"note": dictionary}), 400, "record batches"),
        "many rows": (stream(columns(*(np.resize(a, (20_001, a.shape[1])) for a in (features, boxes)))), 413, "20000"),
    }


def test_streams_that_cannot_be_used(http: httpx.Client, features: Array, boxes: Array) -> None:
    for name, (body, code, text) in bodies(features, boxes).items():
        reply = ask(http, body)
        assert (reply.status_code, list(reply.json())) == (code, ["error"]), (name, reply.text)
        assert text in reply.json()["error"], (name, reply.text)


def test_a_column_named_twice(http: httpx.Client, features: Array, boxes: Array) -> None:
    table = pa.table([fixed(features), fixed(boxes), fixed(boxes)], names=["features", "boxes", "boxes"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.with_metadata({"model": "linear"})) as writer:
        writer.write_table(table.replace_schema_metadata({"model": "linear"}))
    assert "one column 'boxes'" in ask(http, bytes(sink.getvalue())).json()["error"]


GOOD = stream(columns(np.ones((3, FEATURE_SIZE), np.float32), np.ones((3, 4), np.float32)))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    changes=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, len(GOOD)) | st.just(len(GOOD)),
)
def test_damaged_streams_are_read_or_refused(changes: list[tuple[int, int]], cut: int) -> None:
    body = bytearray(GOOD)
    for at, value in changes:
        body[at] = value
    try:
        found = read_stream(body[:cut], max_rows=100, max_metadata=10_000)
        found.matrix("features", [FEATURE_SIZE])
        found.matrix("boxes", [4], [pa.float32()])
    except CalibError:
        pass
