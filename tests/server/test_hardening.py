"""What a hostile or unlucky world does to a running service, and what it must survive."""

import asyncio
import json
import os
import shutil
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import trustme

from calib.artifact import Artifact, save
from calib.heads.linear import LinearClassifier, LinearHead
from calib.layout import DESCRIPTION
from calib.server.app import Unforeseen
from calib.server.engine import Engine
from calib.server.errors import BusyError
from calib.server.models import Repository
from calib.server.shared import Change, Shared, Snapshots

from .conftest import FEATURE_SIZE, Server, artifact, damage
from .test_abuse import INFER, entry, message, raw_reply, refused
from .test_guard import connect, serving
from .test_load import resident_mb
from .test_models import ONES, eventually
from .test_process import command
from .test_workers import ask, workers
from .test_workers import serving as serving_together

GET = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.slow
def test_workers_go_on_when_their_folder_is_tidied_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with serving_together(tmp_path) as server:
        shutil.rmtree(next(tmp_path.glob("calib-serve-*")))
        for k in range(4):
            action = "load" if k % 2 else "unload"
            assert ask(server, f"/v2/repository/models/head/versions/2/{action}", {}).status_code == 200
            assert {ask(server).json()["model_version"] for _ in range(10)} == {"2" if k % 2 else "1"}
        assert httpx.get(f"{server.url}/v2/health/live", trust_env=False).status_code == 200


def test_torn_lines_of_the_changes_are_passed_over(tmp_path: Path) -> None:
    shared, told = Shared(tmp_path), Change("a", "", "1")
    lines = b'[["x", 1, ["a"\n[1]\n[["x", 1, ["a"]]]\n[["x", 1, ["a", "", "1"]]]\n[["x", 2'
    with (tmp_path / "changes").open("ab") as file:
        file.write(lines)
    assert shared.changes() == {("x", 1): told} and shared.changes() == {}
    with shared.turn():
        shared.write({("x", 3): None})
    other = Shared(tmp_path)
    assert other.changes() == {("x", 1): told, ("x", 3): None}
    other.close()
    shared.close()


@pytest.mark.slow
def test_a_worker_that_starts_later_serves_what_the_others_serve(tmp_path: Path) -> None:
    with serving_together(tmp_path) as server:
        models = tmp_path / "models"
        assert ask(server, "/v2/repository/models/head/versions/1/unload", {}).status_code == 200
        expected = ask(server, json=ONES | {"outputs": [{"name": "SCORES"}]}).json()
        save(models / "head" / "3", artifact(3))  # not loaded by anybody
        for version in ("1", "2"):
            damage(models / "head" / version)
        assert ask(server, "/v2/repository/models/head/versions/2/load", {}).status_code == 400
        for _ in range(2):
            os.kill(workers(server)[0], signal.SIGKILL)
            before = server.log.read_text().count("startup complete")
            assert eventually(lambda before=before: server.log.read_text().count("startup complete") > before, 60)  # type: ignore[misc]
        assert [ask(server).json() for _ in range(12)] == [expected] * 12
        assert {ask(server, "/v2/models/head/versions/1/infer").status_code for _ in range(6)} == {404}
        save(models / "head" / "2", artifact(4), overwrite=True)
        assert ask(server, "/v2/repository/models/head/load", {}).status_code == 400  # version 1 is damaged
        assert {ask(server).json()["model_version"] for _ in range(8)} == {"3"}


def test_of_two_servers_on_a_port_one_is_told(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        result = command("--models", str(tmp_path / "models"), "--port", server.url.rpartition(":")[2])
        assert result.returncode == 2 and "cannot listen" in result.stderr


def test_a_body_whose_client_has_waited_too_long_is_dropped_with_its_turn() -> None:
    engine, begun, go = Engine(1, 2, 1000), threading.Event(), threading.Event()

    def long() -> None:
        begun.set()
        go.wait(20)

    async def ask_once(work: Any) -> None:
        with engine.place(400) as place:
            await asyncio.wait_for(engine.run(work, place), 0.2)

    async def all_of_it() -> list[type[BaseException] | None]:
        ends = []
        for work in (long, lambda: None, lambda: None):
            try:
                await ask_once(work)
            except TimeoutError as e:
                ends.append(type(e))
        assert begun.is_set() and engine.pending == 1, "what computes keeps its place, what was queued does not"
        with pytest.raises(BusyError), engine.place(601):
            pass
        go.set()
        while engine.pending:
            await asyncio.sleep(0.01)
        return ends

    assert asyncio.run(all_of_it()) == [TimeoutError] * 3
    engine.close()


@pytest.mark.parametrize("head", [b"CONNECT a:80 HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /" + b"a" * 200_000])
def test_a_first_request_that_is_no_request_is_answered(server: Server, head: bytes) -> None:
    with connect(server) as connection:
        connection.sendall(head)
        status, reply = raw_reply(connection)
    assert status in (400, 404, 405, 431) and reply["error"]


def test_folders_that_are_not_served_are_named(tmp_path: Path) -> None:
    for name in ("head/1", "head/007", "日本/1", "stats/2"):
        save(tmp_path / name, artifact(1))
    result = command("--models", str(tmp_path), "--check")
    lines = [line for line in result.stdout.splitlines() if line.startswith("not served: ")]
    assert result.returncode == 1 and len(lines) == 3 and all(k in result.stdout for k in ("007", "日本", "stats"))


def test_what_was_pending_in_a_dead_worker_is_gone(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, lambda: {"pending": 1, "n": 1})
    for pid in (os.getppid(), 2**22 + 1):
        (tmp_path / f"counters-{pid}.json").write_text(json.dumps({"pending": 5, "n": 7}))
    assert sorted((c["pending"], c["n"]) for c in snapshots.all()) == [(0, 7), (1, 1), (5, 7)]


@pytest.mark.parametrize("flood", [b"a: b\r\n" * 1000, b"c" * 8000], ids=["many trailers", "one trailer"])
def test_trailers_without_end_are_refused(server: Server, flood: bytes) -> None:
    before = resident_mb(server.process.pid)
    with connect(server) as connection:
        connection.sendall(GET + b"Transfer-Encoding: chunked\r\n\r\n0\r\nx: y")
        sent = 0
        try:
            while sent < 40 << 20:
                connection.sendall(flood)
                sent += len(flood)
        except OSError:
            pass
    assert sent < 30 << 20 and resident_mb(server.process.pid) < before + 30


def test_a_long_head_in_one_piece_is_431(server: Server) -> None:
    reply = httpx.get(f"{server.url}/v2", headers={"X-Long": "a" * 70_000}, trust_env=False)
    refused(reply, 431, "65536")


def test_requests_that_follow_each_other_are_all_answered(server: Server) -> None:
    body = json.dumps(message(entry())).ljust(300_000).encode()
    post = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with connect(server) as connection:
        connection.sendall(post + post[:100])
        assert raw_reply(connection)[0] == 200
        connection.sendall(post[100:] + GET + b"Connection: close\r\n\r\n")
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
        assert received.count(b"HTTP/1.1 200 OK") == 2
    with connect(server) as connection:
        connection.sendall(post + b"no http at all\r\n\r\n")
        assert raw_reply(connection)[0] == 200, "what was asked before the garbage is answered"


def test_who_sends_slowly_after_the_answer_is_left(tmp_path: Path) -> None:
    with serving(tmp_path, header_timeout_s="1") as server, connect(server) as slow:
        slow.sendall(GET + b"Content-Length: 1000000\r\n\r\n")
        assert raw_reply(slow)[0] == 200
        begun = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < begun + 15:
                slow.sendall(b" ")
                time.sleep(0.1)


def wide_request(models: Path) -> tuple[bytes, int]:
    """A request of 80 kB to a head that is saved there, and the bytes of its scores: more than the system keeps."""
    classes, rows = 301, 20_000
    head = LinearHead(LinearClassifier(torch.zeros(classes + 1, 1), torch.zeros(classes + 1)))
    names = {"category_ids": [*range(classes)], "category_names": [str(k) for k in range(classes)]}
    save(models / "wide" / "1", Artifact(head, replace(artifact(1).info, **names)))  # type: ignore[arg-type]
    described = {"shape": [rows, 1], "parameters": {"binary_data_size": 4 * rows}}
    text = json.dumps(message(entry(data=..., **described), parameters={"binary_data_output": True})).encode()
    lines = f"POST /v2/models/wide/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {len(text)}\r\n"
    lines += f"Content-Length: {len(text) + 4 * rows}\r\n\r\n"
    return lines.encode() + text + bytes(4 * rows), 4 * rows * classes


def test_who_does_not_read_is_left(tmp_path: Path) -> None:
    request, size = wide_request(tmp_path / "models")
    with serving(tmp_path, send_timeout_s="3") as server, connect(server) as deaf:
        deaf.sendall(request)
        assert deaf.recv(1)
        time.sleep(5)
        assert is_closed_early(deaf, size)


def is_closed_early(connection: socket.socket, size: int) -> bool:
    """Whether the connection ends before so many bytes could be read."""
    connection.settimeout(20)
    got = 0
    try:
        while got < size and (piece := connection.recv(1 << 16)):
            got += len(piece)
    except ConnectionResetError:
        return True
    return got < size


def test_invented_keys_have_no_rate_of_their_own(tmp_path: Path) -> None:
    with serving(tmp_path, rate="0.01", burst="2") as server:
        codes = [
            httpx.get(f"{server.url}/v2", headers={"X-API-Key": f"k{k}"}, trust_env=False).status_code for k in range(5)
        ]
        assert codes == [200, 200, 429, 429, 429]


@pytest.mark.parametrize("keys", ["", ",", "one,,two"])
def test_empty_keys_are_no_keys(tmp_path: Path, keys: str) -> None:
    result = command("--models", str(tmp_path), CALIB_SERVE_API_KEYS=keys)
    assert result.returncode == 2 and "CALIB_SERVE_API_KEYS" in result.stderr


def test_watching_survives_folders_that_come_and_go(tmp_path: Path) -> None:
    with serving(tmp_path, watch_s="0.02") as server:
        for k in range(150):
            (tmp_path / "models" / "zz" / str(k)).mkdir(parents=True)
            shutil.rmtree(tmp_path / "models" / "zz")
        save(tmp_path / "models" / "late" / "1", artifact(3))
        assert eventually(lambda: httpx.get(f"{server.url}/v2/models/late/ready", trust_env=False).status_code == 200)
        save(tmp_path / "models" / "linear" / "2", artifact(2))
        url = f"{server.url}/v2/models/linear/versions/2/ready"
        assert eventually(lambda: httpx.get(url, trust_env=False).status_code == 200)
        shutil.rmtree(tmp_path / "models" / "linear" / "2")
        assert eventually(lambda: httpx.get(url, trust_env=False).status_code == 404)


def test_pinned_versions_must_be_there(tmp_path: Path) -> None:
    save(tmp_path / "models" / "head" / "1", artifact(1))
    for pinned in ("head=9", "other=1"):
        result = command("--models", str(tmp_path / "models"), "--check", "--set", f"pinned={pinned}")
        assert result.returncode == 2 and "pinned" in result.stderr


def test_check_uses_all_settings(tmp_path: Path) -> None:
    save(tmp_path / "models" / "head" / "1", artifact(1))
    for more, text in ((["--device", "abacus"], "abacus"), (["--set", "ssl_certfile=/nope"], "/nope")):
        result = command("--models", str(tmp_path / "models"), "--check", *more)
        assert result.returncode == 2 and text in result.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_key_of_another_certificate_is_an_error(tmp_path: Path, workers: str) -> None:
    save(tmp_path / "models" / "head" / "1", artifact(1))
    authority = trustme.CA()
    one, other = authority.issue_cert("127.0.0.1"), authority.issue_cert("127.0.0.1")
    one.cert_chain_pems[0].write_to_path(str(tmp_path / "c.pem"))
    other.private_key_pem.write_to_path(str(tmp_path / "k.pem"))
    files = ("--set", f"ssl_certfile={tmp_path / 'c.pem'}", "--set", f"ssl_keyfile={tmp_path / 'k.pem'}")
    result = command("--models", str(tmp_path / "models"), "--port", "0", "--processes", workers, *files)
    assert result.returncode == 2 and "do key and certificate fit" in result.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"category_ids": [1e30] * 6},
        {"category_ids": [10**22] * 6},
        {"category_names": [None] * 6},
        {"detector": {"max_detections": 3 * 10**8}},
        {"detector": {"score_threshold": True}},
    ],
)
def test_heads_that_could_not_answer_are_not_served(tmp_path: Path, change: dict[str, Any]) -> None:
    save(tmp_path / "head" / "1", artifact(1))
    path = tmp_path / "head" / "1" / DESCRIPTION
    description = json.loads(path.read_text())
    description["info"] |= change
    path.write_text(json.dumps(description))
    (row,) = Repository(tmp_path).index()
    assert row["state"] == "UNAVAILABLE" and row["reason"]


@pytest.mark.parametrize("place", ["shape", "datatype", "score_threshold", "score_dtype", "topk", "timeout"])
def test_values_of_any_depth_are_shown_in_errors(http: httpx.Client, place: str) -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    wrong = message(entry(**{place: deep})) if place in ("shape", "datatype") else message(entry())
    wrong |= {} if place in ("shape", "datatype") else {"parameters": {place: deep}}
    refused(http.post(INFER, json=wrong), 400)


def test_boxes_are_finite_also_where_they_are_not_used(http: httpx.Client) -> None:
    text = json.dumps(message(entry(), entry(name="BOXES", shape=[1, 4], data=[0, 0, 1, 1])))
    assert http.post(INFER, content=text).status_code == 200
    refused(http.post(INFER, content=text.replace("[0, 0, 1, 1]", "[0, 0, 1e39, 1]")), 400, "infinity")
    sizes = entry(name="IMAGE_SIZES", shape=[2], datatype="INT32", data=[-(2**63), 1])
    refused(http.post(INFER, json=message(entry(), sizes)), 400, "2^31")


def test_replies_are_bounded_as_a_whole(tmp_path: Path) -> None:
    with serving(tmp_path, max_reply_bytes="900") as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        rows = {"shape": [30, FEATURE_SIZE], "data": [0.5] * 30 * FEATURE_SIZE}
        both = [{"name": name, "parameters": {"binary_data": True}} for name in ("SCORES", "TOP_SCORES")]
        assert http.post(INFER, json=message(entry(**rows), outputs=both[:1])).status_code == 200
        refused(http.post(INFER, json=message(entry(**rows), outputs=both)), 413, "reply")
        proposals = {"model": "linear", "features": [[0.5] * FEATURE_SIZE] * 30, "score_threshold": 0}
        boxes = [[60 * k, 0, 60 * k + 50, 50] for k in range(30)]
        refused(http.post("/v1/rescore", json=proposals | {"boxes": boxes}), 413, "reply")


def test_what_nobody_foresaw_is_answered_counted_and_logged() -> None:
    sent: list[Any] = []

    async def broken(*_: object) -> None:
        raise RuntimeError("secret")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/x", "state": {"request_id": "abc"}}
    asyncio.run(Unforeseen(broken)(scope, broken, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 500 and json.loads(sent[1]["body"]) == {"error": "internal error abc"}


def test_a_hangup_looks_at_the_folder(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        save(tmp_path / "models" / "late" / "1", artifact(3))
        server.process.send_signal(signal.SIGHUP)
        assert eventually(lambda: httpx.get(f"{server.url}/v2/models/late/ready", trust_env=False).status_code == 200)
