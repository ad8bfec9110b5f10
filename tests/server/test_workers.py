"""Several worker processes behind one port: what one does all do, and no process stays behind."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from calib.artifact import save
from calib.errors import CalibError
from calib.server.shared import Journal

from .conftest import Server, artifact, damage, running
from .test_models import ONES, eventually
from .test_process import command


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def workers(server: Server) -> list[int]:
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(server.process.pid)}
    return [pid for pid, text in commands.items() if b"spawn_main" in text]


@contextmanager
def serving(tmp_path: Path, **settings: str) -> Iterator[Server]:
    for version in (1, 2):
        save(tmp_path / "models" / "head" / str(version), artifact(version))
    with running(tmp_path / "models", tmp_path / "log", workers="2", **settings) as server:
        assert eventually(lambda: server.log.read_text().count("startup complete") == 2)
        yield server


def ask(server: Server, path: str = "/v2/models/head/infer", json: object = ONES) -> httpx.Response:
    """On a connection of its own, so that any worker may answer."""
    return httpx.post(f"{server.url}{path}", json=json, trust_env=False, timeout=20)


def test_all_workers_load_unload_and_count_together(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        versions = "/v2/repository/models/head/versions"
        for k in range(6):
            assert ask(server, f"{versions}/2/{'load' if k % 2 else 'unload'}", {}).status_code == 200
            seen = Counter(ask(server).json()["model_version"] for _ in range(12))
            assert seen == {"2" if k % 2 else "1": 12}, "a change that was answered holds for every worker"
        damage(tmp_path / "models" / "head" / "2")
        assert ask(server, f"{versions}/2/load", {}).status_code == 400
        for _ in range(8):
            index = ask(server, "/v2/repository/index", {}).json()
            assert ["damaged" in row["reason"] for row in index] == [False, True]
        time.sleep(1.5)  # counters of the other worker are up to a second old
        for _ in range(8):
            url = f"{server.url}/v2/models/head/versions/1/stats"
            counted = httpx.get(url, trust_env=False).json()["model_stats"][0]
            assert counted["inference_stats"]["success"]["count"] == 36
        metrics = httpx.get(f"{server.url}/metrics", trust_env=False).text
        assert 'calib_inference_request_success_total{model="head",version="1"} 36.0' in metrics


def test_a_worker_that_dies_is_replaced_and_knows_what_happened(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert ask(server, "/v2/repository/models/head/versions/2/unload", {}).status_code == 200
        first = workers(server)
        assert len(first) == 2
        os.kill(first[0], signal.SIGKILL)
        assert eventually(lambda: server.log.read_text().count("startup complete") == 3, seconds=30)
        assert {ask(server).json()["model_version"] for _ in range(12)} == {"1"}
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        pids = workers(server)
        server.process.kill()
        assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), seconds=20)


@pytest.mark.parametrize("problem", ["damaged", pytest.param("device", marks=pytest.mark.slow)])
def test_what_no_worker_can_start_with_ends_all(tmp_path: Path, problem: str) -> None:
    save(tmp_path / "head" / "1", artifact(1))
    more = ["--device", "abacus"] if problem == "device" else []
    if problem == "damaged":
        damage(tmp_path / "head" / "1")
    result = command("--models", str(tmp_path), "--port", "0", "--workers", "2", *more)
    assert result.returncode == 2 and problem in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_a_journal_is_followed_in_order_and_beyond_failures(tmp_path: Path) -> None:
    seen: dict[str, list[tuple[str, str, str | None]]] = {"a": [], "b": []}

    def apply(name: str, action: str, model: str, version: str | None) -> None:
        seen[name].append((action, model, version))
        if model == "bad":
            raise CalibError("cannot be loaded")

    one, other = (Journal(tmp_path, lambda *change, name=name: apply(name, *change)) for name in "ab")  # type: ignore[misc]
    for change in (("load", "x", None), ("load", "bad", "2")):
        with one.turn():
            one.write(*change)
            with suppress(CalibError):
                apply("a", *change)
    assert other.is_behind() and not one.is_behind()
    with other.turn():
        other.write("unload", "x", "1")
        apply("b", "unload", "x", "1")
    one.catch_up()
    assert seen["a"] == seen["b"] == [("load", "x", None), ("load", "bad", "2"), ("unload", "x", "1")]
    one.close()
    other.close()
