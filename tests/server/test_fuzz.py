"""Bytes that no client sends, against a live server: an answer within its form, never a 500, and it lives on."""

import json

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import FEATURE_SIZE, Server

ROW = 4 * FEATURE_SIZE
HEADER = {
    "inputs": [
        {
            "name": "FEATURES",
            "datatype": "FP32",
            "shape": [1, FEATURE_SIZE],
            "parameters": {"binary_data_size": ROW},
        }
    ]
}
VALUES = st.sampled_from([-1, 0, 1, 2**31, 2**63, 1e308, None, True, "", "FP16", [], [[]], {}, [1, 2], "é"])
PATHS = st.sampled_from(
    [
        "/v2/models/linear/infer",
        "/v2/models/linear/versions/2/infer",
        "/v1/rescore",
        "/v2/repository/index",
        "/v2/repository/models/linear/load",
    ]
)


@st.composite
def mangled(draw: st.DrawFn) -> tuple[bytes, dict[str, str]]:
    """A right request with some of its JSON, its length or its bytes changed."""
    header = json.loads(json.dumps(HEADER))
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from(["name", "datatype", "shape", "parameters", "data", "outputs", "id"]))
        place = header if key in ("outputs", "id", "parameters") else header["inputs"][0]
        place[key] = draw(VALUES)
    text = json.dumps(header).encode()
    body = bytearray(text + bytes(ROW))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(body) - 1))
        body[at] = draw(st.integers(0, 255))
    body = body[: draw(st.sampled_from([len(body), len(body) - 1, len(text), len(text) // 2, 0]))]
    length = draw(st.sampled_from([str(len(text)), "0", "-1", "1e3", str(10**19), str(len(body) + 1), None]))
    headers = {} if length is None else {"Inference-Header-Content-Length": length}
    coding = draw(st.sampled_from([None, None, None, "gzip", "deflate", "br", "gzip, gzip"]))
    return bytes(body), headers | ({} if coding is None else {"Content-Encoding": coding})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(request=mangled() | st.tuples(st.binary(max_size=400), st.just({})), path=PATHS)
def test_whatever_arrives_is_answered_in_form(server: Server, request: tuple[bytes, dict[str, str]], path: str) -> None:
    body, headers = request
    reply = httpx.post(f"{server.url}{path}", content=body, headers=headers, timeout=20, trust_env=False)
    assert reply.status_code in (200, 400, 404, 413, 415), (reply.status_code, reply.text)
    if reply.status_code != 200:
        assert list(reply.json()) == ["error"]
    assert server.process.poll() is None
