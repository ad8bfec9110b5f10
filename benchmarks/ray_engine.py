"""What the engine of ``--engine ray`` costs: scoring of LVIS-sized images, 1,000 proposals x 1,024 numbers -> 1,203
classes, one thread per process.

    python benchmarks/ray_engine.py [--images 200 500] [--rounds 2] [--quick] [--json FILE]

Seconds of whole commands, alternating, on the same cache at two sizes, so that what every run costs (start of Python,
of Ray, of its workers) and what an image costs are apart: one process, two shards at a time with the join, and Ray on
this machine with one worker and with as many as it has cores. CPU is that of all processes together, Ray's own
included, as /proc shows it every tenth of a second (Linux). Files are compared byte for byte. Needs the extra ``ray``.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from _serving_work import MODEL, Work
from scoring import made_up_cache

from calib.artifact import load, save

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
SHARDS, NO = 2, subprocess.DEVNULL
SET_CHILD_SUBREAPER = 36  # of prctl(2)
Taken = dict[str, dict[int, list[tuple[float, float]]]]


def score(cache: Path, head: Path, out: Path, *more: str) -> "subprocess.Popen[bytes]":
    """``calib score`` as a process."""
    given = ("score", "--cache", str(cache), "--head", str(head), "--out", str(out), *more)
    return subprocess.Popen([sys.executable, "-m", "calib.cli", *given], env=ENVIRONMENT, stdout=NO, stderr=NO)


def in_shards(cache: Path, head: Path, out: Path) -> list["subprocess.Popen[bytes]"]:
    """Both at once."""
    return [score(cache, head, out, "--shard", f"{k}/{SHARDS}") for k in range(SHARDS)]


class Clock:
    """Wall seconds, and CPU seconds of everything that this process starts and what that starts."""

    def __init__(self) -> None:
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # who loses its parent stays below this process
        self._begun, self._cpu = time.perf_counter(), dict[str, float]()

    def wait(self, process: "subprocess.Popen[bytes]") -> None:
        """Until it has ended well."""
        while process.poll() is None:
            self._look(os.getpid())
            time.sleep(0.1)
        assert process.returncode == 0

    def read(self) -> tuple[float, float]:
        """Wall seconds until now, CPU seconds until all that was left has ended too."""
        wall = time.perf_counter() - self._begun
        with suppress(ChildProcessError):
            while True:
                self._look(os.getpid())
                os.wait()
        return wall, sum(self._cpu.values())

    def _look(self, pid: int) -> None:
        children = " ".join(p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/children"))
        for child in children.split():
            with suppress(FileNotFoundError, ProcessLookupError):
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                self._cpu[f"{child} {fields[19]}"] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                self._look(int(child))


def timed(cache: Path, head: Path, out: Path, how: str) -> tuple[float, float]:
    """Wall and CPU seconds until ``out`` is there."""
    clock = Clock()
    if how == "two shards":
        for process in in_shards(cache, head, out):
            clock.wait(process)
    more = {"Ray, one worker": ("--engine", "ray", "--processes", "1"), "Ray": ("--engine", "ray")}.get(how, ())
    clock.wait(score(cache, head, out, *more))
    return clock.read()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs=2, default=(200, 500), metavar="N")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round of 4 and 8 images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all metrics")
    options = parser.parse_args()
    sizes, rounds = ((4, 8), 1) if options.quick else (tuple(options.images), options.rounds)
    torch.set_num_threads(1)
    work = Work.made_up()
    ways = ("one process", "two shards", "Ray, one worker", "Ray")
    taken: Taken = {how: {n: [] for n in sizes} for how in ways}
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


def report(taken: Taken, sizes: tuple[int, int]) -> None:
    """Medians and ranges per size; per image, from the difference of the two sizes; fixed, what is left."""
    few, many = sizes
    for kind, what in enumerate(("wall", "CPU")):
        print(f"\n{what + ' seconds':16} " + " ".join(f"{f'{n} images':>26}" for n in sizes) + "   ms an image   fixed")
        first = None
        for how, times in taken.items():
            own = {n: [pair[kind] for pair in pairs] for n, pairs in times.items()}
            middle = {n: median(values) for n, values in own.items()}
            each = (middle[many] - middle[few]) / (many - few)
            first = first or each
            cells = " ".join(f"{middle[n]:8.2f} ({min(own[n]):7.2f}-{max(own[n]):7.2f})" for n in sizes)
            print(
                f"{how:16} {cells} {1000 * each:13.2f} {middle[few] - few * each:7.2f}   {each / first:.2f} x an image"
            )


if __name__ == "__main__":
    main()
