"""What it costs that a cache lies on object storage: the same reading and training from an S3 server and from the disk.

    python benchmarks/storage.py             163,840 rows x 1,024 float16 in 10 shards, one thread
    python benchmarks/storage.py --quick     32,768 rows, one round

| line | is |
|---|---|
| epoch, cold | rows/s of one pass of training steps (natural sampling) with an empty mirror, over that of local files |
| epoch, warm | the same with everything in the mirror, opened anew |
| feed, warm | the same without training |
| scan, cold | reading all rows in order with an empty mirror, over local files |
| scan, small mirror | the same with a mirror that holds a third of the cache |
| epoch, small mirror | training with such a mirror: every batch reads in every shard |
| upload, download | MB per second of whole shards |

The server is moto's, in a process of its own on loopback, on the same cores: its share of them is in every cold metric,
and a real store over a network has other rates. Local, cold and warm alternate, round by round; medians with their
range. A table goes to stderr, one JSON object to stdout. Everything is written to a temporary folder.
Needs the extra ``s3`` and ``'moto[s3]' flask flask-cors``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from methods import made_up
from training import CPU, learn, source_of, training

from calib.cache import Cache
from calib.storage import Remote, local, parse
from calib.storage.transfer import upload
from calib.training.loader import BatchLoader

SERVER = Path(__file__).parents[1] / "tests" / "storage" / "s3_server.py"
URL = "s3://bench/caches/train"
Metrics = dict[str, list[float]]


def epoch(cache: Cache) -> float:
    """Seconds of one pass of training steps, after the cache was opened."""
    model = training(cache, "fp32")
    start = time.perf_counter()
    with BatchLoader(source_of(cache), 0, cache.n_rows // 8192, CPU) as feed:
        learn(model, iter(feed))
    return time.perf_counter() - start


def feed(cache: Cache) -> float:
    """Seconds of the same batches without training."""
    start = time.perf_counter()
    with BatchLoader(source_of(cache), 0, cache.n_rows // 8192, CPU) as batches:
        for _ in batches:
            pass
    return time.perf_counter() - start


def scan(cache: Cache) -> float:
    """Seconds of reading everything in order."""
    start = time.perf_counter()
    for low in range(0, cache.n_rows, 1024):
        cache.features.read(low, min(low + 1024, cache.n_rows))
    return time.perf_counter() - start


def with_mirror(folder: Path, work: Callable[[Cache], float], limit: int, *, cold: bool = True) -> float:
    """``work`` on the cache in the store, with an empty mirror if ``cold``."""
    os.environ |= {"CALIB_MIRROR": str(folder), "CALIB_MIRROR_BYTES": str(limit)}
    if cold:
        shutil.rmtree(folder, ignore_errors=True)
    return work(Cache(local(URL)))


def put(cache: Path) -> float:
    """Upload the cache as its writer does; MB per second."""
    place = parse(URL)
    assert isinstance(place, Remote)
    files = [f for f in cache.rglob("*") if f.is_file() and not f.name.startswith(".")]
    start = time.perf_counter()
    for file in files:
        upload(file, place / file.relative_to(cache).as_posix())
    return sum(f.stat().st_size for f in files) / 1e6 / (time.perf_counter() - start)


def measure(own: Cache, folder: Path, rounds: int) -> Metrics:
    """Ratios of rates to those of local files; 1 is no cost."""
    size = sum(f["bytes"] for s in own.manifest.shards for f in s.files.values())
    whole, third = 4 * size, size // 3 + size // len(own.manifest.shards)
    metrics: Metrics = {"upload, MB/s": [put(own.path)]}

    def add(name: str, here: float, there: float) -> None:
        metrics.setdefault(name, []).append(here / there)

    epoch(own)  # what happens once per process
    for _ in range(rounds):
        # Every reading has a mirror of its own: mirrors live as long as the process.
        place = Path(tempfile.mkdtemp(dir=folder))
        here = epoch(Cache(own.path))
        add("epoch, cold", here, with_mirror(place, epoch, whole))
        add("epoch, warm", epoch(Cache(own.path)), with_mirror(place, epoch, whole, cold=False))
        add("feed, warm", feed(Cache(own.path)), with_mirror(place, feed, whole, cold=False))
        place, here = Path(tempfile.mkdtemp(dir=folder)), scan(Cache(own.path))
        there = with_mirror(place, scan, whole)
        add("scan, cold", here, there)
        metrics.setdefault("download, MB/s", []).append(size / 1e6 / there)
        add("scan, small mirror", here, with_mirror(Path(tempfile.mkdtemp(dir=folder)), scan, third))
    add("epoch, small mirror", epoch(Cache(own.path)), with_mirror(Path(tempfile.mkdtemp(dir=folder)), epoch, third))
    return metrics


def main() -> None:
    """Parse arguments, start the server, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=320, help="of 512 rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, rounds = (64, 1) if options.quick else (options.images, options.rounds)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen([sys.executable, str(SERVER)], **pipes) as server:
        os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(server.stdout.readline())}"}  # type: ignore[union-attr]
        os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        place = parse(URL)
        assert isinstance(place, Remote)
        place.fs.mkdir("bench")
        own = made_up(Path(folder) / "own", images=images)
        metrics = measure(own, Path(folder), rounds)
        server.stdin.close()  # type: ignore[union-attr]
    for what, values in metrics.items():
        print(f"{what:22} {median(values):>9,.3g}   {min(values):,.3g} .. {max(values):,.3g}", file=sys.stderr)
    print(json.dumps({"rows": own.n_rows, "shards": len(own.manifest.shards), "rounds": rounds, "metrics": metrics}))


if __name__ == "__main__":
    main()
