"""Keys, rates and deadlines, against live servers with these settings."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from numpy.typing import NDArray

from calib.artifact import save
from calib.server.errors import DeadlineError
from calib.server.inference import Payload
from calib.server.layers.access import Buckets, Keys

from .conftest import FEATURE_SIZE, Server, artifact, running

ONES = {"inputs": [{"name": "FEATURES", "datatype": "FP32", "shape": [1, FEATURE_SIZE], "data": [1] * FEATURE_SIZE}]}
INFER, LOAD = "/v2/models/head/infer", "/v2/repository/models/head/load"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two user keys and an admin key, and a rate."""
    folder = tmp_path_factory.mktemp("closed")
    save(folder / "models" / "head" / "1", artifact(1))
    settings = {"api_keys": "alpha, beta", "admin_keys": "overlord", "rate": "0.5", "burst": "30"}
    with running(folder / "models", folder / "log", **settings) as server:
        yield server
        log = server.log.read_text()
        assert "alpha" not in log and "overlord" not in log and "internal error" not in log


@pytest.fixture
def http(closed: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=closed.url, trust_env=False) as client:
        yield client


def refused(reply: httpx.Response, code: int, text: str) -> None:
    assert reply.status_code == code and list(reply.json()) == ["error"] and text in reply.json()["error"], reply.text


def test_health_is_open_and_nothing_else(http: httpx.Client) -> None:
    assert http.get("/v2/health/live").status_code == http.get("/v2/health/ready").status_code == 200
    for path in ("/v2", "/metrics", "/docs", "/openapi.json", "/v2/models/head", "/nothing"):
        reply = http.get(path)
        refused(reply, 401, "a key is needed")
        assert reply.headers["www-authenticate"] == "Bearer"
    refused(http.post(INFER, json=ONES), 401, "a key is needed")


@pytest.mark.parametrize("headers", [bearer("alpha"), bearer("beta"), {"X-API-Key": "beta"}, bearer("overlord")])
def test_known_keys_may_ask(http: httpx.Client, headers: dict[str, str]) -> None:
    assert http.post(INFER, json=ONES, headers=headers).status_code == 200


@pytest.mark.parametrize("headers", [bearer("alph"), bearer("alphaa"), {"X-API-Key": ""}, bearer("é")])
def test_unknown_keys_may_not(http: httpx.Client, headers: dict[str, str]) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    assert http.post(INFER, json=ONES, headers=encoded).status_code == 401  # type: ignore[arg-type]


def test_a_key_of_another_scheme_is_none(http: httpx.Client) -> None:
    refused(http.post(INFER, json=ONES, headers={"Authorization": "Basic alpha"}), 401, "a key is needed")


def test_loading_needs_an_admin_key(http: httpx.Client) -> None:
    refused(http.post(LOAD, json={}, headers=bearer("alpha")), 403, "need an admin key")
    refused(http.post(LOAD.replace("load", "unload"), json={}, headers=bearer("alpha")), 403, "need an admin key")
    assert http.post(LOAD, json={}, headers=bearer("overlord")).status_code == 200


def test_triton_clients_send_a_key_as_a_header(closed: Server) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{closed.port}") as client:
        tensor = triton.InferInput("FEATURES", [1, FEATURE_SIZE], "FP32")
        tensor.set_data_from_numpy(np.ones((1, FEATURE_SIZE), np.float32))
        assert client.infer("head", [tensor], headers=bearer("alpha")).as_numpy("SCORES").shape[0] == 1


def test_a_key_that_asks_too_often_waits_and_others_do_not(http: httpx.Client) -> None:
    replies = [http.post(INFER, json=ONES, headers=bearer("alpha")) for _ in range(40)]
    codes = [reply.status_code for reply in replies]
    assert codes[-1] == 429 and codes.count(200) <= 30
    refused(replies[-1], 429, "too many requests")
    assert 1 <= int(replies[-1].headers["retry-after"]) <= 3
    assert http.post(INFER, json=ONES, headers=bearer("beta")).status_code == 200


def test_buckets_fill_again() -> None:
    buckets = Buckets(rate=2, burst=3)
    assert [buckets.wait("a", 0.0) for _ in range(3)] == [0, 0, 0]
    assert buckets.wait("a", 0.0) == 0.5 and buckets.wait("b", 0.0) == 0
    assert buckets.wait("a", 0.5) == 0 and buckets.wait("a", 0.5) == 0.5
    assert [buckets.wait("a", 100.0) for _ in range(3)] == [0, 0, 0] and buckets.wait("a", 100.0) > 0


def test_an_empty_key_is_never_known() -> None:
    keys = Keys.of(["x"], [])
    assert not keys.knows(None, keys.users) and not keys.knows(b"", keys.users) and keys.knows(b"x", keys.users)


def test_metrics_count_what_happened(server: Server, features: NDArray[np.float32]) -> None:
    with httpx.Client(base_url=server.url, trust_env=False) as http:

        def values() -> dict[str, float]:
            lines = http.get("/metrics").raise_for_status().text.splitlines()
            return {k: float(v) for k, _, v in (line.rpartition(" ") for line in lines if not line.startswith("#"))}

        before = values()
        body = ONES | {"inputs": [ONES["inputs"][0] | {"shape": [2, FEATURE_SIZE], "data": [1] * 2 * FEATURE_SIZE}]}
        assert http.post("/v2/models/cosine/infer", json=body).status_code == 200
        assert http.post("/v2/models/cosine/infer", json={"inputs": []}).status_code == 400
        assert http.get("/nothing").status_code == 404
        change = {key: value - before.get(key, 0) for key, value in values().items()}
    labels = '{model="cosine",version="1"}'
    assert change[f"calib_inference_request_success_total{labels}"] == 1
    assert change[f"calib_inference_count_total{labels}"] == 2
    assert change['calib_inference_request_failure_total{model="cosine",reason="BAD_REQUEST",version="1"}'] == 1
    assert change[f"calib_inference_compute_infer_duration_us_total{labels}"] > 0
    assert change['calib_http_responses_total{code="404"}'] == 1
    assert change["calib_request_bytes_total"] > 100 and change["calib_response_bytes_total"] > 100
    assert before['calib_model_loaded{model="linear",version="10"}'] == 1


def test_the_access_log_is_a_json_line_per_request(tmp_path: Path) -> None:
    save(tmp_path / "models" / "head" / "1", artifact(1))
    with (
        running(tmp_path / "models", tmp_path / "log", access_log="true") as server,
        httpx.Client(base_url=server.url, trust_env=False) as http,
    ):
        reply = http.post(INFER, json=ONES, headers={"X-Request-Id": "abc-1"})
        assert reply.headers["x-request-id"] == "abc-1"
        wrong = http.get("/nothing", headers={"X-Request-Id": "two words"})
        assert len(wrong.headers["x-request-id"]) == 32
        by_id: dict[str, Any] = {}
        for _ in range(100):  # a line is written after its reply was sent
            lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
            by_id = {line["id"]: line for line in lines}
            if {"abc-1", wrong.headers["x-request-id"]} <= set(by_id):  # the fixture asked for health before
                break
            time.sleep(0.05)
    line = by_id["abc-1"]
    assert (line["status"], line["model"], line["version"], line["rows"]) == (200, "head", 1, 1)
    assert line["bytes_out"] == len(reply.content) and line["path"] == INFER
    assert 0 <= line["queue_ms"] <= line["total_ms"] and line["compute_ms"] > 0 and line["write_ms"] > 0
    assert by_id[wrong.headers["x-request-id"]]["status"] == 404


def infer_with_timeout(server: Server, microseconds: Any) -> httpx.Response:
    body = ONES | {"parameters": {"timeout": microseconds}}
    return httpx.post(f"{server.url}/v2/models/linear/infer", json=body, trust_env=False)


def test_a_clients_own_deadline(server: Server) -> None:
    assert infer_with_timeout(server, 10_000_000).status_code == infer_with_timeout(server, 0).status_code == 200
    refused(infer_with_timeout(server, 1), 504, "are allowed")
    for wrong in ("soon", 1.5, -1, True):
        refused(infer_with_timeout(server, wrong), 400, "whole number of microseconds")


def test_what_takes_longer_than_the_server_allows_is_dropped(tmp_path: Path) -> None:
    save(tmp_path / "models" / "head" / "1", artifact(1))
    rows = 20_000
    many = ONES["inputs"][0] | {"shape": [rows, FEATURE_SIZE], "data": [1.0] * rows * FEATURE_SIZE}
    with (
        running(tmp_path / "models", tmp_path / "log", deadline_s="0.02") as server,
        httpx.Client(base_url=server.url, trust_env=False, timeout=60) as http,
    ):
        refused(http.post(INFER, json={"inputs": [many]}), 504, "no answer within 0.02 s")
        assert any(http.post(INFER, json=ONES).status_code == 200 for _ in range(50))


def test_what_waited_too_long_is_not_computed() -> None:
    payload = Payload(bytearray(), None, deadline_s=1.0, submitted_ns=time.perf_counter_ns() - 2 * 10**9)
    with pytest.raises(DeadlineError, match=r"waited 2\.\d+ s, 1 s are allowed"):
        payload.check_wanted()
