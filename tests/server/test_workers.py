"""Several worker processes behind one port: what one does all do, and no process stays behind."""

import errno
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from calib.artifact import save
from calib.errors import UnknownNameError
from calib.heads.linear import LinearHead
from calib.server.errors import BadRequestError, BusyError, NotServedError
from calib.server.models import Repository
from calib.server.shared import Change, Shared

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
    with running(tmp_path / "models", tmp_path / "log", processes="2", **settings) as server:
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
    result = command("--models", str(tmp_path), "--port", "0", "--processes", "2", *more)
    assert result.returncode == 2 and problem in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_changes_are_followed_by_their_last_word(tmp_path: Path) -> None:
    one, other = Shared(tmp_path), Shared(tmp_path)
    first, second = Change("a", "", "1"), Change("b", "it is damaged", "2")
    with one.turn():
        one.write({("x", 1): first, ("y", 2): first})
        one.write({("x", 1): second, ("y", 2): None})
    assert other.is_behind() and not one.is_behind() and not other.begun
    assert other.changes() == {("x", 1): second, ("y", 2): None}
    assert other.changes() == {} and other.begun
    with other.turn():
        other.write({("x", 1): first})
    assert one.changes() == {("x", 1): first}
    one.close()
    other.close()


Worker = Callable[[], Repository]


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    """Makes the repository of one more worker, over a model folder with head 1."""
    save(tmp_path / "models" / "head" / "1", artifact(1))
    with ExitStack() as stack:

        def start() -> Repository:
            shared = Shared(tmp_path / "shared")
            stack.callback(shared.close)
            return Repository(tmp_path / "models", shared=shared)

        yield start


@pytest.fixture
def pair(worker: Worker, tmp_path: Path) -> tuple[Path, Repository, Repository]:
    """The model folder and two workers."""
    return tmp_path / "models", worker(), worker()


def weights(repository: Repository, version: str = "1") -> list[float]:
    head = repository.find("head", version).head
    assert isinstance(head, LinearHead)
    return head.classifier.weight.flatten().tolist()


def expected(seed: int) -> list[float]:
    head = artifact(seed).head
    assert isinstance(head, LinearHead)
    return head.classifier.weight.flatten().tolist()


def copies(models: Path) -> int:
    return len(list(models.with_name("shared").joinpath("models").iterdir()))


def remove(models: Path) -> None:
    shutil.rmtree(models / "head")


def link(models: Path) -> None:
    remove(models)
    save(models.with_name("elsewhere"), artifact(3))
    (models / "head").mkdir()
    (models / "head" / "1").symlink_to(models.with_name("elsewhere"))


@pytest.mark.parametrize("by", ["load", "refresh"])
@pytest.mark.parametrize(
    "later",
    [
        lambda models: save(models / "head" / "1", artifact(3), overwrite=True),
        lambda models: damage(models / "head" / "1"),
        remove,
        link,
        lambda models: save(models / "head" / "2", artifact(3)),
    ],
    ids=["replaced", "damaged", "removed", "linked", "another version"],
)
def test_workers_load_what_the_first_of_them_read(
    pair: tuple[Path, Repository, Repository], worker: Worker, later: Callable[[Path], object], by: str
) -> None:
    """Whatever becomes of the files between the load and the others' next request, or the start of another."""
    models, one, other = pair
    assert weights(other) == expected(1)
    save(models / "head" / "1", artifact(2), overwrite=True)
    if by == "load":
        one.load("head")
    else:
        assert one.refresh() == ["head"]
    later(models)
    assert other.is_behind()
    other.catch_up()
    third = worker()
    assert weights(one) == weights(other) == weights(third) == expected(2)
    assert one.index() == other.index() == third.index()
    assert copies(models) == 1, "of what is loaded, and no others"


def test_a_change_made_by_one_is_found_once(pair: tuple[Path, Repository, Repository]) -> None:
    models, one, other = pair
    save(models / "head" / "2", artifact(2))
    assert other.refresh() == ["head"] and one.refresh() == []
    assert one.find("head").version == 2
    one.unload("head", "2")
    assert other.refresh() == one.refresh() == [] and other.find("head").version == 1
    remove(models)
    assert one.refresh() == ["head"] and other.refresh() == []
    assert [row["state"] for row in other.index()] == ["UNAVAILABLE"] * 2


def test_what_fails_is_told_with_its_reason_and_the_one_before_goes_on(
    pair: tuple[Path, Repository, Repository], worker: Worker
) -> None:
    models, one, other = pair
    damage(models / "head" / "1")
    with pytest.raises(BadRequestError) as e:
        one.load("head")
    other.catch_up()
    third = worker()
    for repository in (one, other, third):
        assert weights(repository) == expected(1)
        (row,) = repository.index()
        assert str(models / "head" / "1") in row["reason"] and row["reason"] in str(e.value)


def test_names_that_are_not_there_are_neither_told_nor_copied(
    pair: tuple[Path, Repository, Repository], tmp_path: Path
) -> None:
    models, one, other = pair
    (models / "linked").mkdir()
    (models / "linked" / "1").symlink_to(tmp_path)
    for name, version in (("nothing", None), ("head", "9"), ("x" * 10_000, "1"), ("../head", "1")):
        for change in (one.load, one.unload):
            with pytest.raises((UnknownNameError, NotServedError)):
                change(name, version)
    assert not other.is_behind()
    with pytest.raises(BadRequestError):
        one.load("linked")
    assert copies(models) == 1


def test_no_space_means_that_nothing_happened(
    pair: tuple[Path, Repository, Repository], monkeypatch: pytest.MonkeyPatch
) -> None:
    models, one, other = pair
    save(models / "head" / "1", artifact(2), overwrite=True)

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch, pytest.raises(BusyError):
        patch.setattr("calib.server.shared.tempfile.mkdtemp", full)
        one.load("head")
    with monkeypatch.context() as patch, pytest.raises(BusyError):
        patch.setattr("calib.server.shared.os.ftruncate", full)
        one.load("head")
    assert not other.is_behind() and weights(one) == weights(other) == expected(1)
    assert copies(models) == 1
    one.load("head")
    other.catch_up()
    assert weights(one) == weights(other) == expected(2)


def test_a_hangup_looks_at_the_folder_once_for_all(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        pids = workers(server)
        save(tmp_path / "models" / "head" / "3", artifact(3))
        server.process.send_signal(signal.SIGHUP)
        assert eventually(lambda: "loaded again: head" in server.log.read_text())
        assert {ask(server).json()["model_version"] for _ in range(12)} == {"3"}
        assert sorted(workers(server)) == sorted(pids) and server.log.read_text().count("loaded again") == 1
