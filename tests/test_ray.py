"""Scoring and extraction on real Ray clusters write what one process writes, whoever is killed meanwhile."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.artifact import save
from calib.cache import Cache, Categories, Classifier, Manifest
from calib.cache.image_rows import ImageRows
from calib.cache.schema import META_SCHEMA, PROPOSAL_BOX, REFINED_BOX, Detector
from calib.cache.write import CacheWriter
from calib.train import train

pytest.importorskip("ray", reason="pip install 'calib[ray]'")
# Ray's own files and sockets are closed when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

Start = Callable[..., subprocess.Popen[str]]
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
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.slow
def test_a_worker_and_a_node_are_killed_and_the_file_is_that_of_one_process(
    made_up: tuple[Path, Path], tmp_path: Path, start: Start, calib: Callable[..., Any]
) -> None:
    cache, head = made_up
    given = ("score", "--cache", cache, "--head", head)
    assert calib(*given, "--out", tmp_path / "local.parquet", "--results-json", tmp_path / "local.json").exit_code == 0
    out = tmp_path / "out"
    with two_nodes() as (address, raylets):
        process = start(
            *given, "--out", out / "d.parquet", "--results-json", out / "d.json", "--engine", "ray", "--address", address
        )

        def pieces() -> int:
            return len(list(out.glob(".d.parquet.pieces/*/0*.parquet")))

        worker = wait_for(lambda: pieces() >= 2 and working(raylets[0]), process)[0]
        os.kill(worker, signal.SIGKILL)
        before = pieces()
        node = wait_for(lambda: pieces() >= before + 2 and working(raylets[1]), process)
        for pid in (raylets[1], *node):
            os.kill(pid, signal.SIGKILL)
        left = -(-IMAGES // 64) - pieces()
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    assert left > 5, "both were killed in the midst"
    assert sorted(p.name for p in out.iterdir()) == ["d.json", "d.parquet"]
    for kind in ("parquet", "json"):
        assert (out / f"d.{kind}").read_bytes() == (tmp_path / f"local.{kind}").read_bytes()
