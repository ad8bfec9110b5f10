"""What one client does with its connections must not keep others from being served."""

import http.client
import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import httpx
import pytest
import trustme

from calib.artifact import save
from calib.server.layers.access_log import Lines
from calib.server.layers.protocol import GuardedConfig
from calib.server.serve import _Process
from calib.server.serve_settings import ServeSettings

from .conftest import FEATURE_SIZE, Server, artifact
from .test_abuse import INFER, MIB, entry, message, raw_reply
from .test_guard import connect, is_closed, serving
from .test_hardening import is_closed_early, wide_request
from .test_load import resident_mb
from .test_models import eventually
from .test_workers import serving as serving_together
from .test_workers import workers

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n"
GOOD = json.dumps(message(entry())).encode()
POST = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n"


def posted(body: bytes = GOOD, headers: str = "") -> bytes:
    return f"{POST}{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose times are a second and whose bounds are low."""
    times = dict.fromkeys(("header_timeout_s", "keep_alive_s", "send_timeout_s"), "1")
    bounds = {"max_connections": "20", "max_pending": "2", "max_pending_bytes": str(MIB), "max_drained_bytes": "300000"}
    with serving(tmp_path_factory.mktemp("hasty"), **times, **bounds) as server:
        yield server


LATE = {
    "nothing": [b""],
    "half a head": [b"GET /v2 HTT"],
    "idle": [LIVE + b"\r\n"],
    "empty line after the answer": [LIVE + b"\r\n", b"\r\n"],
    "half a head after the answer": [LIVE + b"\r\n", b"GET"],
    "body after the answer": [LIVE + b"Content-Length: 5\r\n\r\n", b"hello"],
    "byte after an upgrade": [LIVE + b"Connection: Upgrade\r\nUpgrade: x\r\n\r\n", b"z"],
    "a body that stops": [f"{POST}Content-Length: 100\r\n\r\n".encode(), b"{"],
    "half a chunk size": [f"{POST}Transfer-Encoding: chunked\r\n\r\n".encode(), b"1"],
    "half a trailer": [f"{POST}Transfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n".encode(), b"a: "],
    "100-continue": [f"{POST}Content-Length: 100\r\nExpect: 100-continue\r\n\r\n".encode()],
    "pipelined, then half a head": [LIVE + b"\r\n" + LIVE + b"\r\nGET"],
}


@pytest.mark.parametrize("parts", LATE.values(), ids=LATE.keys())
def test_no_wait_is_endless(hasty: Server, parts: list[bytes]) -> None:
    with connect(hasty) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.2)
        assert is_closed(connection)


@pytest.mark.parametrize("begun", [b"GET /v2 HTTP/1.1\r\nX: ", f"{POST}Content-Length: 99\r\n\r\n".encode()])
def test_bytes_buy_no_time(hasty: Server, begun: bytes) -> None:
    """One byte every tenth of a second, in a head or a body: over after the time of the phase, with 408."""
    with connect(hasty) as connection:
        connection.sendall(begun)
        sent = 0
        with suppress(OSError):
            for _ in range(90):
                connection.sendall(b" ")
                sent += 1
                time.sleep(0.1)
        assert sent < 60
        with suppress(OSError):
            assert raw_reply(connection)[0] == 408


def test_idle_connections_give_way(hasty: Server) -> None:
    """Places are taken by those who keep us waiting only as long as nobody else needs them."""
    with ExitStack() as stack:
        for _ in range(20):
            held = stack.enter_context(connect(hasty))
            held.sendall(f"{POST}Content-Length: 999\r\n\r\n".encode())
        assert eventually(lambda: status_of(hasty, LIVE + b"\r\n") == 200)


def status_of(server: Server, request: bytes) -> int:
    with connect(server) as connection:
        connection.sendall(request)
        try:
            return raw_reply(connection)[0]
        except (OSError, http.client.HTTPException):
            return 0


@pytest.mark.parametrize("framing", [f"Content-Length: {MIB}", "Transfer-Encoding: chunked"])
def test_bodies_that_do_not_come_take_no_places(hasty: Server, framing: str) -> None:
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connect(hasty)).sendall(f"{POST}{framing}\r\n\r\n".encode())
        assert status_of(hasty, posted()) == 200


def test_bytes_that_have_come_are_bounded_and_given_back(hasty: Server) -> None:
    body = GOOD.ljust(600_000)
    with connect(hasty) as slow:
        slow.sendall(posted(body)[:-1])
        time.sleep(0.3)
        with connect(hasty) as other:
            other.sendall(posted(body))
            assert raw_reply(other)[0] in (200, 503)  # 503 within a second, then the slow one gives way
        assert eventually(lambda: status_of(hasty, posted(body)) == 200)
    assert eventually(lambda: status_of(hasty, posted(GOOD.ljust(2 * MIB))) == 200), (
        "one larger than all is taken alone"
    )


def test_pipelined_requests_are_not_hoarded(server: Server) -> None:
    before = resident_mb(server.process.pid)
    with connect(server) as connection:
        connection.settimeout(0.5)
        sent = 0
        with suppress(TimeoutError):
            while sent < 40 * MIB:
                sent += connection.send((LIVE + b"\r\n") * 5000)
        assert sent < 40 * MIB and resident_mb(server.process.pid) < before + 40
        assert status_of(server, LIVE + b"\r\n") == 200


def test_a_body_of_two_lengths_is_refused(server: Server) -> None:
    lengths = b"POST /v2/models/x/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(lengths + b"2\r\n{}\r\n0\r\n\r\n")
        assert raw_reply(connection)[0] == 400


@pytest.mark.parametrize(
    "after", [b"no http\r\n\r\n", b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ"]
)
@pytest.mark.parametrize("more", ["", "Connection: close\r\n"])
def test_answers_stay_in_order(server: Server, after: bytes, more: str) -> None:
    rows = json.dumps(message(entry(shape=[2000, FEATURE_SIZE], data=[0.5] * 2000 * FEATURE_SIZE))).encode()
    request = posted(rows, more)
    for pause in (0.0, 0.02):
        with connect(server) as connection:
            connection.sendall(request[:-10])
            time.sleep(0.1)
            connection.sendall(request[-10:] + (b"" if pause else after))
            time.sleep(pause)
            with suppress(OSError):
                connection.sendall(after if pause else b"")
            assert raw_reply(connection)[0] == 200
            if not more:
                with suppress(OSError):
                    assert raw_reply(connection)[0] in (400, 404)


@pytest.mark.parametrize(
    "headers",
    [
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: YQ==\r\n",
        "Connection: Upgrade\r\nUpgrade: x\r\nExpect: 100-continue\r\n",
    ],
)
def test_upgrades_are_ignored(server: Server, headers: str) -> None:
    with connect(server) as connection:
        for _ in range(2):
            head, body = posted(GOOD, headers)[: -len(GOOD)], GOOD
            connection.sendall(head)
            if "Expect" in headers:
                assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
            connection.sendall(body)
            assert raw_reply(connection)[0] == 200


@pytest.mark.parametrize("flags", [["--http2"], ["--http1.0"], ["-H", "Expect: 100-continue"], ["--data-binary", "@-"]])
def test_curl(server: Server, flags: list[str]) -> None:
    line = ["curl", "-s", "--noproxy", "*", f"{server.url}{INFER}", *flags]
    line += [] if "@-" in flags else ["--data-binary", "@-"]
    done = subprocess.run(line, input=GOOD, capture_output=True, timeout=30)
    assert json.loads(done.stdout)["model_name"] == "linear"


def test_header_lines_are_counted(server: Server) -> None:
    lines = b"".join(b"a%d: b\r\n" % k for k in range(30_000))
    for count in (90, 30_000):
        with connect(server) as connection:
            connection.sendall(LIVE + b"".join(lines.splitlines(keepends=True)[:count]) + b"\r\n")
            assert raw_reply(connection)[0] == (200 if count == 90 else 431)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("path", [INFER, "/nothing"])
def test_who_sends_all_before_reading_finds_the_refusal(server: Server, version: str, path: str) -> None:
    with connect(server) as connection:
        size = 40 * MIB
        head = f"POST {path} HTTP/{version}\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n"
        connection.sendall(head.encode())
        connection.sendall(bytes(size))
        assert raw_reply(connection)[0] == (413 if path == INFER else 404)


def test_a_refused_body_without_end_is_left(hasty: Server) -> None:
    with connect(hasty) as connection, pytest.raises(OSError):
        connection.sendall(f"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\n\r\n".encode())
        for _ in range(1000):
            connection.sendall(bytes(MIB))


def test_replies_that_are_not_taken_give_way(tmp_path: Path) -> None:
    """24 MB each and never read: two are over the bound, and the time they would have is long."""
    request, size = wide_request(tmp_path / "models")
    settings = {"send_timeout_s": "60", "keep_alive_s": "1", "max_pending_bytes": str(size + MIB)}
    with serving(tmp_path, **settings) as server, ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(3)]
        for connection in held:
            connection.sendall(request)
        assert held[0].recv(1)
        assert eventually(lambda: status_of(server, posted()) == 200)
        assert sum(is_closed_early(connection, size) for connection in held) >= 2


@pytest.fixture
def over_tls(tmp_path: Path) -> Iterator[tuple[int, ssl.SSLContext]]:
    """Port of a server whose times are two seconds, and how to trust it."""
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "pair.pem"))
    save(tmp_path / "models" / "linear" / "1", artifact(1))
    wide_request(tmp_path / "models")
    command = [sys.executable, "-m", "calib.cli", "serve", "--models", str(tmp_path / "models"), "--port", "0"]
    pair = {"ssl_certfile": str(tmp_path / "pair.pem"), "ssl_keyfile": str(tmp_path / "pair.pem")}
    for name, value in (pair | {"header_timeout_s": "2", "send_timeout_s": "2"}).items():
        command += ["--set", f"{name}={value}"]
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with (tmp_path / "log").open("wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        assert eventually(lambda: "startup complete" in (tmp_path / "log").read_text(), seconds=60)
        yield int(re.findall(r"https://127\.0\.0\.1:(\d+)", (tmp_path / "log").read_text())[0]), trusting
    finally:
        process.kill()
        process.wait()


def test_bounds_hold_over_tls(over_tls: tuple[int, ssl.SSLContext], tmp_path: Path) -> None:
    port, trusting = over_tls
    request, size = wide_request(tmp_path / "other")
    with socket.create_connection(("127.0.0.1", port), timeout=30) as silent:
        assert is_closed(silent), "a handshake that does not come"
    dialled = partial(socket.create_connection, ("127.0.0.1", port), timeout=30)
    with trusting.wrap_socket(dialled(), server_hostname="127.0.0.1") as connection:
        connection.sendall(request)
        for _ in range(40):
            connection.recv(1)
            time.sleep(0.1)
        assert is_closed_early(connection, size), "a byte now and then is not enough"
    with trusting.wrap_socket(dialled(), server_hostname="127.0.0.1") as connection:
        connection.sendall(posted())
        assert raw_reply(connection)[0] == 200


def test_a_log_that_nobody_reads_keeps_nobody_waiting(tmp_path: Path) -> None:
    save(tmp_path / "models" / "linear" / "1", artifact(1))
    command = [sys.executable, "-m", "calib.cli", "serve", "--models", str(tmp_path / "models"), "--port", "0"]
    reading, writing = os.pipe()
    process = subprocess.Popen([*command, "--set", "access_log=true"], stderr=writing, stdout=subprocess.DEVNULL)
    os.close(writing)
    try:
        log = b""
        while b"startup complete" not in log:
            log += os.read(reading, 1 << 16)
        url = re.findall(r"http://127\.0\.0\.1:\d+", log.decode())[0]
        with httpx.Client(base_url=url, trust_env=False, timeout=20) as http:
            for _ in range(800):  # each line is longer than 200 bytes, a pipe holds 64 KiB
                assert http.get("/v2/" + "x" * 200).status_code == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reading)


def test_lines_that_find_no_room_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr("calib.server.layers.access_log._STDERR", writing)
    monkeypatch.setattr("calib.server.layers.access_log._MAX_LINES", 3)
    lines = Lines()
    for k in range(10):
        lines.handle(logging.makeLogRecord({"msg": "y" * 200_000 + str(k)}))
    text, kept, dropped = b"", 0, 0
    while kept + dropped < 10:
        text += os.read(reading, 1 << 20)
        kept = len(re.findall(rb"y\d\n", text))
        dropped = sum(int(n) for n in re.findall(rb"(\d+) lines of the log", text))
    lines.flush()
    os.close(reading)
    os.close(writing)
    assert 3 <= kept <= 4


@pytest.mark.parametrize(("proxies", "codes"), [("", [200, 429]), ("127.0.0.1", [200, 200])])
def test_only_named_proxies_speak_for_others(tmp_path: Path, proxies: str, codes: list[int]) -> None:
    settings = {"proxies": proxies} if proxies else {}
    with serving(tmp_path, rate="0.001", burst="1", **settings) as server:
        asked = [
            httpx.get(f"{server.url}/v2", headers={"X-Forwarded-For": f"10.0.0.{k}"}, trust_env=False) for k in (1, 2)
        ]
        assert [reply.status_code for reply in asked] == codes


def test_a_worker_that_was_stopped_does_not_keep_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calib.server.serve.DRAIN_S", 0)
    monkeypatch.setattr("calib.server.serve._MARGIN_S", 0.2)
    process = _Process(GuardedConfig(None, ServeSettings(models=tmp_path)), [])
    process.process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what was stopped before it is told to end, inherited
    process.start()
    signal.signal(signal.SIGTERM, handler)
    os.kill(process.process.pid or 0, signal.SIGSTOP)
    assert not process.is_alive(0)
    process.terminate()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_a_service_with_a_stopped_worker_ends_in_time(tmp_path: Path) -> None:
    """In less than the TimeoutStopSec of docs/calib.service, also while that worker is asked for its health."""
    with serving_together(tmp_path) as server:
        stopped = workers(server)[0]
        os.kill(stopped, signal.SIGSTOP)
        time.sleep(2)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) == 0
        assert not Path(f"/proc/{stopped}").exists()
