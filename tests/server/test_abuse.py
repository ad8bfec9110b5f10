"""Bytes that no client should send: the right code, ``{"error": text}`` and nothing else, never a 500."""

import gzip
import http.client
import json
import socket
import time
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from calib.artifact import save

from .conftest import FEATURE_SIZE, Server, artifact, running

INFER = "/v2/models/linear/infer"
MIB = 1 << 20


def entry(**changes: Any) -> dict[str, Any]:
    base = {"name": "FEATURES", "datatype": "FP32", "shape": [1, FEATURE_SIZE], "data": [0.5] * FEATURE_SIZE}
    return {k: v for k, v in (base | changes).items() if v is not ...}


def message(*entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"inputs": list(entries), **more}


def refused(reply: httpx.Response, code: int, text: str = "") -> None:
    assert reply.status_code == code, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert list(reply.json()) == ["error"] and text in reply.json()["error"], reply.text
    assert "Traceback" not in reply.text


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[]", "JSON object"),
        (b'{"inputs": [NaN]}', "JSON"),
        (b"[" * 5000, "JSON"),
        (b"[" * 200_000, "lists and objects"),
        (b"{}", "'inputs'"),
        (b'{"inputs": []}', "missing"),
        (b'{"inputs": [1]}', "object"),
        (b'{"inputs": [{"name": 1}]}', "name"),
    ],
)
def test_bad_json(http: httpx.Client, body: bytes, text: str) -> None:
    refused(http.post(INFER, content=body), 400, text)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"shape": [2, FEATURE_SIZE]}, "expected [2, 32]"),
        ({"shape": [-1, FEATURE_SIZE]}, "shape"),
        ({"shape": [FEATURE_SIZE]}, "shape"),
        ({"shape": [1, 1, FEATURE_SIZE]}, "shape"),
        ({"shape": [True, FEATURE_SIZE]}, "shape"),
        ({"shape": [1.0, FEATURE_SIZE]}, "shape"),
        ({"shape": [2**62, FEATURE_SIZE]}, "rows"),
        ({"shape": "1,32"}, "shape"),
        ({"shape": ...}, "shape"),
        ({"datatype": "FP64"}, "datatype"),
        ({"datatype": "FP16"}, "binary"),
        ({"datatype": ["FP32"]}, "datatype"),
        ({"data": ...}, "list of numbers"),
        ({"data": "0.5"}, "list of numbers"),
        ({"data": ["0.5"] * FEATURE_SIZE}, "list of numbers"),
        ({"data": [None] * FEATURE_SIZE}, "list of numbers"),
        ({"data": [[0.5] * FEATURE_SIZE, [0.5]]}, "unequal"),
        ({"data": [1e39] * FEATURE_SIZE}, "infinity"),
        ({"data": [[[0.5]] * FEATURE_SIZE]}, "shape"),
        ({"name": "OTHER"}, "not known"),
        ({"parameters": 1}, "parameters"),
        ({"parameters": {"binary_data_size": 128}}, "both"),
        ({"parameters": {"shared_memory_region": "x"}}, "shared memory"),
    ],
)
def test_bad_inputs(http: httpx.Client, changes: dict[str, Any], text: str) -> None:
    refused(http.post(INFER, json=message(entry(**changes))), 400, text)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"id": 5}, "id"),
        ({"outputs": "SCORES"}, "outputs"),
        ({"outputs": [{"name": "SCORES"}, {"name": "SCORES"}]}, "appears twice"),
        ({"outputs": [{"name": "SCORES", "parameters": {"binary_data": 1}}]}, "binary_data"),
        ({"outputs": [{"name": "SCORES", "parameters": {"classification": 3}}]}, "classification"),
        ({"parameters": {"binary_data_output": "yes"}}, "binary_data_output"),
        ({"parameters": []}, "parameters"),
    ],
)
def test_bad_request_fields(http: httpx.Client, more: dict[str, Any], text: str) -> None:
    refused(http.post(INFER, json=message(entry(), **more)), 400, text)


def test_an_input_that_appears_twice(http: httpx.Client) -> None:
    refused(http.post(INFER, json=message(entry(), entry())), 400, "twice")


def test_reserved_parameters_that_are_not_used_are_ignored(http: httpx.Client) -> None:
    reply = http.post(INFER, json=message(entry(), parameters={"sequence_id": 1, "priority": 5, "triton_x": "y"}))
    assert reply.status_code == 200 and len(reply.json()["outputs"][0]["data"]) == 6


@pytest.mark.parametrize(
    ("size", "blob", "length", "text"),
    [
        (128, 100, None, "ends 28 bytes before"),
        (128, 130, None, "2 bytes more"),
        (100, 100, None, "expected 128"),
        (-128, 128, None, "expected 128"),
        ("128", 128, None, "expected 128"),
        (128, 128, "99999", "body has"),
        (128, 128, "-5", "decimal"),
        (128, 128, "\u00b2", "decimal"),
        (128, 128, "0", "without a JSON header"),
        (128, 128, "10", "JSON"),
    ],
)
def test_wrong_binary_sizes(http: httpx.Client, size: Any, blob: int, length: str | None, text: str) -> None:
    header = json.dumps(message(entry(data=..., parameters={"binary_data_size": size}))).encode()
    headers = {"Inference-Header-Content-Length": (length or str(len(header))).encode("latin-1")}
    refused(http.post(INFER, content=header + bytes(blob), headers=headers), 400, text)  # type: ignore[arg-type]


def test_binary_inputs_need_the_length_of_the_header(http: httpx.Client) -> None:
    body = message(entry(data=..., parameters={"binary_data_size": 128}))
    refused(http.post(INFER, json=body), 400, "Inference-Header-Content-Length is missing")


def test_sizes_beyond_the_limits_are_413(http: httpx.Client) -> None:
    header = {"Inference-Header-Content-Length": "100"}
    refused(http.post(INFER, content=bytes(64 * MIB + 1), headers=header), 413, "67108864")
    refused(http.post(INFER, content=b" " * (16 * MIB + 1)), 413, "16777216")
    refused(http.post("/v1/rescore", content=b" " * (16 * MIB + 1)), 413, "16777216")
    refused(http.post("/v2/repository/index", content=b" " * (MIB + 1)), 413, "1048576")
    chunks = (b" " * MIB for _ in range(18))
    refused(http.post(INFER, content=chunks), 413, "16777216")
    long_header = {"Inference-Header-Content-Length": str(2 * MIB)}
    refused(http.post(INFER, content=b" " * (2 * MIB), headers=long_header), 413, "JSON header")


def test_a_large_announced_body_is_refused_before_it_is_sent(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\n\r\n".encode())
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        assert reply.status == 413 and "at most" in json.loads(reply.read())["error"]


def test_bytes_that_are_not_http(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"hello\r\n\r\n")
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        assert reply.status == 400 and list(json.loads(reply.read())) == ["error"]


GOOD = json.dumps(message(entry())).encode()


@pytest.mark.parametrize(
    ("coding", "body", "code", "text"),
    [
        ("gzip", gzip.compress(GOOD)[:-10], 400, "truncated"),
        ("gzip", b"", 400, "truncated"),
        ("gzip", gzip.compress(GOOD) + b"tail", 400, "4 more bytes"),
        ("gzip", GOOD, 400, "damaged"),
        ("deflate", zlib.compress(GOOD)[:-2], 400, "truncated"),
        ("deflate", gzip.compress(GOOD), 400, "damaged"),
        ("gzip", gzip.compress(bytes(17 * MIB)), 413, "decompressed"),
        ("br", GOOD, 415, "'br'"),
        ("gzip, gzip", GOOD, 415, "not supported"),
    ],
    ids=["gzip-cut", "gzip-empty", "gzip-tail", "no-gzip", "deflate-cut", "no-deflate", "bomb", "brotli", "twice"],
)
def test_compressed_bodies(http: httpx.Client, coding: str, body: bytes, code: int, text: str) -> None:
    refused(http.post(INFER, content=body, headers={"Content-Encoding": coding}), code, text)


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/..",
        "/v2/models/../../etc/passwd",
        "/v2/models/%2e%2e/versions/1",
        "/v2/models/%2e%2e%2flinear",
        "/v2/models/linear/1",
        "/v2/models/linear/versions/..",
        "/v2/models/linear/versions/%2e%2e",
        "/v2/models/linear/versions/01",
        "/v2/models/linear/versions/" + "9" * 400,
        "/v2/models/linear/versions/%C2%B2",
        "/v2/models/.hidden",
        "/v2/models/notes",
        "/v2/models/" + "a" * 4000,
        "/v2/models/%00",
        "/v2/",
        "/nothing",
    ],
)
def test_names_never_become_paths(server: Server, path: str) -> None:
    # http.client sends the path as it is; other clients tidy it up first.
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", path)
    reply = connection.getresponse()
    assert reply.status == 404 and list(json.loads(reply.read())) == ["error"]
    connection.close()


def test_wrong_verbs_are_405(http: httpx.Client) -> None:
    for verb, path in (
        ("POST", "/v2"),
        ("GET", INFER),
        ("DELETE", "/v2/models/linear"),
        ("GET", "/v1/rescore"),
    ):
        reply = http.request(verb, path)
        refused(reply, 405, "use")
        assert reply.headers["allow"]


def test_repository_calls_take_neither_files_nor_settings(http: httpx.Client) -> None:
    files = {"parameters": {"file:1/head.json": "e30="}}
    refused(http.post("/v2/repository/models/linear/load", json=files), 400, "no parameters")
    refused(http.post("/v2/repository/models/nothing/load", json={}), 404, "unknown model")
    refused(http.post("/v2/repository/models/notes/unload", json={}), 404, "unknown model")
    refused(http.post("/v2/repository/index", content=b"{"), 400, "JSON")
    refused(http.post("/v2/repository/index", json={"ready": 1}), 400, "ready")


def test_random_bytes_are_never_an_internal_error(http: httpx.Client) -> None:
    rng = np.random.default_rng(0)
    good = json.dumps(message(entry(data=..., parameters={"binary_data_size": 128}))).encode()
    for _ in range(150):
        body = bytearray(good + bytes(128))
        for position in rng.integers(0, len(good), rng.integers(1, 6)):
            body[position] = rng.integers(256)
        reply = http.post(INFER, content=bytes(body), headers={"Inference-Header-Content-Length": str(len(good))})
        assert reply.status_code in (200, 400), (reply.status_code, body)


def test_the_description_names_every_path_and_the_error_form(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert {"/v1/rescore", "/v2/models/{model}/infer", "/v2/health/ready"} <= set(document["paths"])
    rescore = document["paths"]["/v1/rescore"]["post"]
    assert "features" in rescore["requestBody"]["content"]["application/json"]["schema"]["properties"]
    for path in document["paths"].values():
        for operation in path.values():
            assert set(operation["responses"]) == {"200", "default"}
    assert http.get("/docs").status_code == 200


def test_limits_are_settings(tmp_path: Path) -> None:
    save(tmp_path / "models" / "linear" / "1", artifact(1))
    settings = {"max_rows": "3", "max_json_bytes": "5000", "max_reply_bytes": "50", "body_timeout_s": "0.3"}
    settings |= {"max_pending": "1", "docs": "false"}
    started = running(tmp_path / "models", tmp_path / "log", **settings)
    with started as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        refused(_settled(http, json=message(entry(shape=[4, FEATURE_SIZE]))), 400, "at most 3")
        refused(_settled(http, content=b" " * 5001), 413, "5000")
        refused(_settled(http, json=message(entry())), 413, "reply")
        refused(http.get("/openapi.json"), 404)
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as slow:
            head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n"
            slow.sendall(head.encode())
            assert b" 100 " in slow.recv(100), "the server waits for the body"
            assert _settled(http, content=b"{}").status_code == 400, "a body that has not come holds no place"
            status, body = raw_reply(slow)
            assert status == 408 and "0.3 seconds" in body["error"]


def _settled(client: httpx.Client, **body: Any) -> httpx.Response:
    """With one place for pending requests the next one may come before the last has left it."""
    for _ in range(100):
        reply = client.post(INFER, **body)
        if reply.status_code != 503:
            break
        time.sleep(0.02)
    return reply


def _until_busy(client: httpx.Client) -> httpx.Response:
    """A reply given while another request has the only place."""
    for _ in range(1000):
        reply = client.post(INFER, json=message(entry()))
        if reply.status_code == 503:
            break
    return reply


def raw_reply(connection: socket.socket) -> tuple[int, dict[str, str]]:
    reply = http.client.HTTPResponse(connection)
    reply.begin()
    return reply.status, json.loads(reply.read())
