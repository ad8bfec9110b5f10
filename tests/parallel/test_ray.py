"""Scoring and extraction on real Ray clusters write what one process writes, whoever is killed meanwhile."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calib.artifact import save
from calib.cache import Cache, Categories, Classifier, Manifest
from calib.cache.image_rows import ImageRows
from calib.cache.schema import META_SCHEMA, PROPOSAL_BOX, REFINED_BOX, Detector
from calib.cache.write import CacheWriter
from calib.errors import InputError, MissingExtraError, MissingFileError, ProcessError, SettingError, ShapeError
from calib.files import hash_file
from calib.parallel.ray_engine import RayEngine
from calib.score import detections
from calib.training import train

pytest.importorskip("ray", reason="pip install 'calib-longtail[ray]'")
# Ray warns of its own settings, and closes its files and sockets when they are collected.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning:ray", "ResourceWarning", "pytest.PytestUnraisableExceptionWarning")
]

Start = Callable[..., subprocess.Popen[str]]
Command = Callable[..., list[Any]]
Content = Callable[[Path], dict[str, bytes]]
IMAGES, ROWS, CLASSES, FEATURES = 2000, 100, 1203, 256


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cache of 200,000 rows and a head for it."""
    folder, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    weight = rng.normal(size=(CLASSES + 1, FEATURES)).astype(np.float32)
    classifier = Classifier(weight, np.zeros(CLASSES + 1, np.float32))
    ids = np.arange(1, CLASSES + 1)
    categories = Categories(ids, tuple(map(str, ids)), np.full(CLASSES, 9), np.full(CLASSES, 9), ("r",) * CLASSES)
    manifest = Manifest("test", "float16", "none", Detector("made-up", classifier.digest(), CLASSES, FEATURES), {})
    with CacheWriter.create(folder / "cache", manifest, categories, classifier) as writer:
        for shard in range(0, IMAGES, 200):
            writer.commit(f"{shard // 200:05d}", (_image(shard + k, rng) for k in range(200)))
        writer.finish()
    save(folder / "head", train("softmax", Cache(folder / "cache"), folder / "trained"))
    return folder / "cache", folder / "head"


def _image(number: int, rng: np.random.Generator) -> ImageRows:
    corner = rng.uniform(0, 500, (ROWS, 2)).astype(np.float32)
    boxes = np.hstack([corner, corner + rng.uniform(20, 300, (ROWS, 2)).astype(np.float32)])
    meta: dict[str, Any] = {n: np.zeros(ROWS, META_SCHEMA.field(n).type.to_pandas_dtype()) for n in META_SCHEMA.names}
    meta |= {"image_id": np.full(ROWS, number), "roi_id": np.arange(ROWS, dtype=np.int32)}
    meta |= {name: boxes[:, k] for names in (PROPOSAL_BOX, REFINED_BOX) for k, name in enumerate(names)}
    image = {"image_id": number, "height": 800, "width": 800, "net_height": 800, "net_width": 800}
    image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    features = (0.3 * rng.normal(size=(ROWS, FEATURES))).astype(np.float32)
    return ImageRows(image, meta, features, np.zeros((ROWS, CLASSES + 1), np.float32))


@contextmanager
def two_nodes() -> Iterator[tuple[str, list[int]]]:
    """Address of a cluster and the process ids of its two raylets, of one processor each."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
        cluster.wait_for_nodes()
        nodes = [cluster.head_node, *cluster.worker_nodes]
        yield cluster.address, [n.all_processes["raylet"][0].process.pid for n in nodes]
    finally:
        cluster.shutdown()


def working(raylet: int) -> list[int]:
    """Worker processes of a node that have taken up an item."""
    children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
    return [int(c) for c in children if b"ray::MapWorker" in Path(f"/proc/{c}/cmdline").read_bytes()]


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + 300  # two raylets, their workers and torch start on what processor is left
    while time.monotonic() < deadline and process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate())


def pieces(out: Path) -> list[Path]:
    return sorted(out.glob(".d.parquet.pieces/*/0*.parquet"))


ALL = -(-IMAGES // 64)


@pytest.mark.slow
def test_a_worker_and_a_node_are_killed_and_the_file_is_that_of_one_process(
    made_up: tuple[Path, Path], tmp_path: Path, start: Start, calib: Callable[..., Any]
) -> None:
    cache, head = made_up
    given = ("score", "--cache", cache, "--head", head)
    assert calib(*given, "--out", tmp_path / "local.parquet", "--results-json", tmp_path / "local.json").exit_code == 0
    out = tmp_path / "out"
    with two_nodes() as (address, raylets):
        files = ("--out", out / "d.parquet", "--results-json", out / "d.json")
        process = start(*given, *files, "--engine", "ray", "--address", address)
        worker = wait_for(lambda: len(pieces(out)) >= 2 and working(raylets[0]), process)[0]
        os.kill(worker, signal.SIGKILL)
        before = len(pieces(out))
        node = wait_for(lambda: len(pieces(out)) >= before + 2 and working(raylets[1]), process)
        for pid in (raylets[1], *node):
            os.kill(pid, signal.SIGKILL)
        left = ALL - len(pieces(out))
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    assert left > 5, "both were killed in the midst"
    assert sorted(p.name for p in out.iterdir()) == ["d.json", "d.parquet"]
    for kind in ("parquet", "json"):
        assert (out / f"d.{kind}").read_bytes() == (tmp_path / f"local.{kind}").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_stopped_goes_on_behind_what_is_finished(
    made_up: tuple[Path, Path], tmp_path: Path, start: Start, calib: Callable[..., Any], how: signal.Signals
) -> None:
    cache, head = made_up
    given = ("score", "--cache", cache, "--head", head)
    assert calib(*given, "--out", tmp_path / "local.parquet").exit_code == 0
    out = tmp_path / "out"
    with two_nodes() as (address, _):
        command = (*given, "--out", out / "d.parquet", "--engine", "ray", "--address", address)
        process = start(*command)
        wait_for(lambda: len(pieces(out)) >= 3, process)
        process.send_signal(how)
        stderr = process.communicate(timeout=60)[1]
        assert process.returncode == (130 if how == signal.SIGINT else -9), stderr
        assert not (out / "d.parquet").exists()
        first = pieces(out)[0]
        assert len(pieces(out)) < ALL - 5
        # A finished piece without detections, by the name that its hash gives it: it stays, so it was not made again.
        pq.write_table(pq.read_table(first).slice(0, 0), first)
        number = int(first.name.partition(".")[0])
        first.rename(first.with_name(f"{number:05d}.{hash_file(first)}.parquet"))
        process = start(*command)
        stderr = process.communicate(timeout=300)[1]
        assert process.returncode == 0, stderr
    whole, found = pq.read_table(tmp_path / "local.parquet"), pq.read_table(out / "d.parquet")
    image = whole["image_id"].to_numpy()
    assert found.equals(whole.filter(pa.array((image < 64 * number) | (image >= 64 * (number + 1)))))


@pytest.mark.slow
def test_extraction_on_a_cluster_outlives_its_workers(
    calib: Callable[..., Any], start: Start, command: Command, tmp_path: Path, content: Content
) -> None:
    assert calib(*command(tmp_path / "one", "--images-per-shard", 1)).exit_code == 0
    out = tmp_path / "two"
    with two_nodes() as (address, raylets):
        given = command(out, "--images-per-shard", 1, "--engine", "ray", "--address", address)
        process = start(*given)

        def committed() -> int:
            return len(Manifest.read(out).shards) if (out / "manifest.json").exists() else 0

        for pid in wait_for(lambda: committed() >= 2 and working(raylets[1]), process):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: committed() >= 5, process)
        process.kill()
        process.communicate()
        assert 5 <= committed() < 24
        process = start(*given, "--resume")
        stderr = process.communicate(timeout=300)[1]
        assert process.returncode == 0, stderr
    assert content(out) == content(tmp_path / "one")


# ---- light ones: one instance on this machine for all


@pytest.fixture(scope="module")
def instance() -> Iterator[None]:
    """What ``--engine ray`` finds running and leaves running."""
    from calib.parallel.ray_engine import _connected

    with _connected("local"):
        yield


def test_scoring_writes_what_one_process_writes(
    val_cache: Cache, tmp_path: Path, calib: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, instance: None
) -> None:
    monkeypatch.setattr(detections, "IMAGES_PER_PIECE", 5)
    save(tmp_path / "head", train("softmax", val_cache, tmp_path / "trained"))
    given = ("score", "--cache", val_cache.path, "--head", tmp_path / "head")
    assert calib(*given, "--out", tmp_path / "local.parquet").exit_code == 0
    here = ("--out", tmp_path / "out" / "d.parquet")
    assert calib(*given, *here, "--shard", "0/2").exit_code == 0
    assert calib(*given, *here, "--engine", "ray", "--address", "127.0.0.1:1").exit_code == 2
    assert len(pieces(tmp_path / "out")) == 2, "what is finished stays"
    done = calib(*given, *here, "--engine", "ray", "--processes", 1)
    assert done.exit_code == 0, done.output
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["d.parquet"]
    assert (tmp_path / "out" / "d.parquet").read_bytes() == (tmp_path / "local.parquet").read_bytes()


@pytest.mark.slow
def test_extraction_writes_what_one_process_writes(
    calib: Callable[..., Any], command: Command, tmp_path: Path, content: Content, instance: None
) -> None:
    assert calib(*command(tmp_path / "one")).exit_code == 0
    done = calib(*command(tmp_path / "two", "--engine", "ray", "--processes", 1))
    assert done.exit_code == 0, done.output
    assert content(tmp_path / "two") == content(tmp_path / "one")


class _Halves:
    """Opens as a function that halves even numbers."""

    def __init__(self, opens: bool = True) -> None:
        self.opens = opens

    def __call__(self) -> Callable[[int], int]:
        if not self.opens:
            raise MissingFileError("the detector is not here", hint="copy it")
        return self.half

    @staticmethod
    def half(n: int) -> int:
        if n % 2:
            raise ShapeError(f"{n} is odd")
        return n // 2


@pytest.mark.slow
def test_errors_of_workers_are_raised_as_themselves(instance: None) -> None:
    engine, done = RayEngine(processes=1), list[int]()
    with pytest.raises(ShapeError, match="5 is odd"):
        engine.run(_Halves(), [2, 5], done.append)
    assert done in ([1], [])
    with pytest.raises(MissingFileError, match="not here") as caught:
        engine.run(_Halves(False), [2], done.append)
    assert caught.value.hint == "copy it"


@pytest.mark.slow
def test_an_item_that_kills_every_worker_is_given_up(tmp_path: Path, instance: None) -> None:
    deaths, done = tmp_path / "deaths", list[int]()
    with pytest.raises(ProcessError, match="5 workers died one after the other on the same item") as caught:
        RayEngine(processes=1).run(_Deadly(deaths), [1, 2, 3], done.append)
    assert "run the same command again" in caught.value.hint
    assert len(deaths.read_text()) == 5 and done in ([1], [])


@dataclass(frozen=True)
class _Deadly:
    """2 kills its worker."""

    deaths: Path

    def __call__(self) -> Callable[[int], int]:
        return self.do

    def do(self, n: int) -> int:
        if n == 2:
            with open(self.deaths, "a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return n


def test_a_cluster_without_room_is_refused_and_nothing_to_do_needs_none(instance: None) -> None:
    with pytest.raises(
        ProcessError, match=r"no room for a worker \(999 CPU\) on the Ray cluster: its nodes have \d+ CPU"
    ):
        RayEngine(cpus=999).run(_Halves(), [2], print)
    with pytest.raises(ProcessError, match="1 GPU"):
        RayEngine(gpus=1).run(_Halves(), [2], print)
    RayEngine(cpus=999).run(_Halves(), [], print)


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus in (0.0, float("nan")):
        with pytest.raises(SettingError, match="CPUs per process: expected more than 0"):
            RayEngine(cpus=cpus)
    with pytest.raises(SettingError, match="-1 processes: expected 0"):
        RayEngine(processes=-1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(InputError, match=f"no Ray cluster at 127.0.0.1:{port}: .*refused"):
        RayEngine(f"127.0.0.1:{port}").run(_Halves(), [2], print)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError) as caught:
        RayEngine().run(_Halves(), [2], print)
    assert caught.value.hint == "pip install 'calib-longtail[ray]'"
