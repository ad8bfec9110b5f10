"""What the engine of ``--engine ray`` costs: scoring of LVIS-sized images, 1,000 proposals x 1,024 numbers -> 1,203
classes, one thread per process.

    python benchmarks/ray_engine.py [--images 200 800] [--rounds 3] [--quick] [--json FILE]

Wall seconds of whole commands, alternating, on the same cache at two sizes, so that what every run costs (start of
Python, of Ray, of its workers) and what an image costs are apart: one process, two shards at a time with the join, and
Ray on this machine with one worker and with as many as it has cores. Files are compared byte for byte before the times
count. Needs ``calib[ray]``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from _serving_work import MODEL, Work
from scoring import made_up_cache

from calib.artifact import load, save

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
SHARDS, NO = 2, subprocess.DEVNULL


def score(cache: Path, head: Path, out: Path, *more: str) -> "subprocess.Popen[bytes]":
    """``calib score`` as a process."""
    given = ("score", "--cache", str(cache), "--head", str(head), "--out", str(out), *more)
    return subprocess.Popen([sys.executable, "-m", "calib.cli", *given], env=ENVIRONMENT, stdout=NO, stderr=NO)


def in_shards(cache: Path, head: Path, out: Path) -> list["subprocess.Popen[bytes]"]:
    """Both at once."""
    return [score(cache, head, out, "--shard", f"{k}/{SHARDS}") for k in range(SHARDS)]


def timed(cache: Path, head: Path, out: Path, how: str) -> float:
    """Wall seconds until ``out`` is there."""
    begun = time.perf_counter()
    if how == "two shards":
        for process in in_shards(cache, head, out):
            assert process.wait() == 0
    more = {"Ray, one worker": ("--engine", "ray", "--workers", "1"), "Ray": ("--engine", "ray")}.get(how, ())
    assert score(cache, head, out, *more).wait() == 0
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs=2, default=(200, 800), metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of 4 and 8 images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args()
    sizes, rounds = ((4, 8), 1) if options.quick else (tuple(options.images), options.rounds)
    torch.set_num_threads(1)
    work = Work.made_up()
    ways = ("one process", "two shards", "Ray, one worker", "Ray")
    taken: dict[str, dict[int, list[float]]] = {how: {n: [] for n in sizes} for how in ways}
    with tempfile.TemporaryDirectory() as name:
        folder, head = Path(name), Path(name) / "models" / "mine" / "1"
        work.save(folder)
        caches = {n: made_up_cache(folder / f"cache-{n}", work, n) for n in sizes}
        fitted = load(folder / "models" / MODEL / "1")
        digest = caches[sizes[0]].manifest.detector.digest
        save(head, replace(fitted, info=replace(fitted.info, detector_digest=digest)))
        for _ in range(rounds):
            for n in sizes:
                for how in ways:
                    taken[how][n].append(timed(caches[n].path, head, folder / f"{how}.parquet", how))
                wanted = (folder / f"{ways[0]}.parquet").read_bytes()
                assert all((folder / f"{how}.parquet").read_bytes() == wanted for how in ways)
    report(taken, sizes)
    if options.json:
        options.json.write_text(json.dumps(taken))


def report(taken: dict[str, dict[int, list[float]]], sizes: tuple[int, int]) -> None:
    """Medians and ranges per size; per image, from the difference of the two sizes; fixed, what is left."""
    few, many = sizes
    print(f"{'':16} " + " ".join(f"{f'{n} images, s':>26}" for n in sizes) + f" {'ms an image':>12} {'fixed, s':>9}")
    first = None
    for how, times in taken.items():
        middle = {n: median(values) for n, values in times.items()}
        each = (middle[many] - middle[few]) / (many - few)
        first = first or each
        cells = [f"{middle[n]:8.2f} ({min(times[n]):7.2f}-{max(times[n]):7.2f})" for n in sizes]
        row = " ".join(f"{c:>26}" for c in cells)
        print(f"{how:16} {row} {1000 * each:12.2f} {middle[few] - few * each:9.2f}   {each / first:.2f} x an image")


if __name__ == "__main__":
    main()
