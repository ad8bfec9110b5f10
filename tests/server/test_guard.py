"""What happens before a request is the application's: slow, large, many; and after it was refused."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from calib.artifact import save

from .conftest import Server, artifact, running
from .test_abuse import INFER, MIB, _settled, _until_busy, entry, message, raw_reply, refused


@contextmanager
def serving(tmp_path: Path, **settings: str) -> Iterator[Server]:
    save(tmp_path / "models" / "linear" / "1", artifact(1))
    with running(tmp_path / "models", tmp_path / "log", **settings) as server:
        yield server
        assert "Traceback" not in server.log.read_text()


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def is_closed(connection: socket.socket) -> bool:
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize("begun", [b"", b"GET", b"GET /v2 HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_a_head_that_does_not_come_is_408(tmp_path: Path, begun: bytes) -> None:
    with serving(tmp_path, header_timeout_s="0.4") as server, connect(server) as connection:
        connection.sendall(begun)
        status, body = raw_reply(connection)
        assert status == 408 and "in time" in body["error"] and is_closed(connection)
        # Also on a connection that was used before.
        with connect(server) as used:
            used.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert raw_reply(used)[0] == 200
            if begun:
                used.sendall(begun)
                assert raw_reply(used)[0] == 408


def test_idle_connections_are_closed(tmp_path: Path) -> None:
    with serving(tmp_path, keep_alive_s="1") as server, connect(server) as connection:
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw_reply(connection)[0] == 200
        begun = time.monotonic()
        assert is_closed(connection) and time.monotonic() - begun < 10


def test_a_head_without_end_is_431(server: Server) -> None:
    for piece in (b"X: " + b"a" * 1000 + b"\r\n", b"a" * 1000):
        with connect(server) as connection:
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\nX-Long: ")
            try:
                for _ in range(200):
                    connection.sendall(piece)
            except OSError:  # refused while we were sending
                pass
            try:
                status, body = raw_reply(connection)
            except OSError:  # what was still under way made the system drop the answer
                continue
            assert status == 431 and "65536 bytes" in body["error"]


def test_more_connections_than_allowed_are_503(tmp_path: Path) -> None:
    with serving(tmp_path, max_connections="3") as server:
        held = [connect(server) for _ in range(3)]
        time.sleep(0.2)
        refused(httpx.get(f"{server.url}/v2/health/live", trust_env=False), 503, "too many connections")
        assert raw_reply_of_idle(server) == 408
        held.pop().close()
        for _ in range(50):
            reply = httpx.get(f"{server.url}/v2/health/live", trust_env=False)
            if reply.status_code == 200:
                break
            time.sleep(0.05)
        assert reply.status_code == 200
        for connection in held:
            connection.close()


def raw_reply_of_idle(server: Server) -> int:
    with connect(server) as connection:
        return raw_reply(connection)[0]


def test_a_body_in_countless_pieces_is_refused(server: Server) -> None:
    with connect(server) as connection:
        connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        try:
            for _ in range(110):
                connection.sendall(b"1\r\n \r\n" * 1000)
        except OSError:
            pass
        try:
            status, body = raw_reply(connection)
        except OSError:
            return
        assert status == 400 and "pieces" in body["error"]


def test_a_refused_body_is_read_so_that_the_answer_is_found(server: Server) -> None:
    """Clients that send first and read afterwards, as most do."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", INFER, body=b" " * (80 * MIB))
    reply = connection.getresponse()
    assert reply.status == 413 and list(json.loads(reply.read())) == ["error"]
    connection.close()


def test_places_are_bounded(tmp_path: Path) -> None:
    rows = json.dumps(message(entry(shape=[20_000, 32], data=[0.25] * 640_000))).encode()
    with serving(tmp_path, max_pending="1") as server, connect(server) as first:
        first.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(rows)}\r\n\r\n".encode() + rows)
        with httpx.Client(base_url=server.url, trust_env=False) as http:
            busy = _until_busy(http)
            refused(busy, 503, "waiting")
            assert busy.headers["retry-after"] == "1"
            assert raw_reply(first)[0] == 200
            assert _settled(http, json=message(entry())).status_code == 200


def test_work_of_clients_that_left_is_dropped(tmp_path: Path) -> None:
    body = json.dumps(message(entry())).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    rows = json.dumps(message(entry(shape=[20_000, 32], data=[0.25] * 640_000))).encode()
    large = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(rows)}\r\n\r\n".encode() + rows
    with serving(tmp_path) as server:
        with connect(server) as first:
            first.sendall(large)
            time.sleep(0.05)
            for _ in range(10):
                with connect(server) as leaving:
                    leaving.sendall(head + body)
            assert raw_reply(first)[0] == 200
        for _ in range(100):
            metrics = httpx.get(f"{server.url}/metrics", trust_env=False).text
            if "calib_pending_requests 0" in metrics:
                break
            time.sleep(0.05)
        assert 'reason="CANCELED"' in metrics
