"""What a second process brings to a training on one machine, beside a second thread.

    python benchmarks/distributed.py                LVIS size: 8,192 rows of 1,024 numbers a step, 1,203 classes
    python benchmarks/distributed.py --quick        one method, one round
    python benchmarks/distributed.py --cache demo/caches/train --methods natural bags --steps 100

Three ways to train a head, round by round in the same two processes: one process with one thread, one with two threads,
and two ranks over gloo with one thread each. Where one process trains, the other waits without computing. Seconds per
step are from the second step to the last, with reading; ratios are to one process with one thread, of the same round.
``cpu_ratio`` is that of processor time over all processes, which other work on the machine moves less than the clock.
``all-reduce``: milliseconds of one sum of gradients, with both ranks ready. Medians over rounds with their range; a
table goes to stderr, one JSON object to stdout. Two cores of the machine should have nothing else to do.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from methods import made_up

from calib.cache import Cache
from calib.parallel.distributed import ALONE, World, joined, launch
from calib.registry import METHODS, load
from calib.settings import known_keys, with_overrides
from calib.training.context import FitContext
from calib.training.stages import fit_alone

CPU = torch.device("cpu")
WAYS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}
Metrics = dict[str, dict[str, list[tuple[float, float]]]]


def seconds_per_step(method: str, cache: Cache, steps: int, world: World) -> tuple[float, float]:
    """Of one training, without its start: by the clock, and of all processors."""
    settings = load(METHODS[method].target)()
    short = {k: steps for k in known_keys(settings) if k.endswith(".steps")}
    ended: list[tuple[float, float]] = []

    @contextmanager
    def progress(label: str, *, total: int, unit: str) -> Iterator[Any]:
        class Bar:
            def advance(self, n: int = 1, **metrics: float) -> None:
                if n:
                    ended.append((time.perf_counter(), time.process_time()))

        yield Bar()

    fit_alone(with_overrides(settings, short), cache, FitContext(progress=progress, world=world))
    (start, busy), (stop, busy_at_end) = ended[0], ended[-1]
    cpu = torch.tensor([busy_at_end - busy], dtype=torch.float64)
    world.all_reduce([cpu])
    return (stop - start) / (len(ended) - 1), float(cpu) / (len(ended) - 1)


def all_reduce_ms(world: World, numbers: int) -> float:
    """Of one sum of float32 gradients."""
    row = torch.zeros(numbers)
    world.all_reduce([row])
    start = time.perf_counter()
    for _ in range(10):
        world.all_reduce([row])
    return (time.perf_counter() - start) * 100


def work(methods: list[str], path: Path, steps: int, rounds: int) -> Metrics:
    """In both ranks; the metrics of rank 0 count."""
    cache = Cache(path)
    found: Metrics = {m: {way: [] for way in WAYS} for m in methods}
    with joined(CPU) as world:
        for method in (m for _ in range(rounds) for m in methods):
            for way, (processes, threads) in WAYS.items():
                world.all_reduce([torch.zeros(1)])  # both are here
                torch.set_num_threads(threads)
                if processes == 2 or world.rank == 0:
                    together = world if processes == 2 else ALONE
                    found[method][way].append(seconds_per_step(method, cache, steps, together))
        detector = cache.manifest.detector
        numbers = (detector.num_classes + 1) * (detector.feature_size + 1)
        found["all-reduce"] = {f"{numbers} numbers": [(all_reduce_ms(world, numbers), 0.0) for _ in range(5)]}
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--methods", nargs="+", default=["natural", "bags", "seesaw"], choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    a = parser.parse_args()
    if a.quick:
        a.methods, a.steps, a.rounds = a.methods[:1], 4, 1
    with tempfile.TemporaryDirectory() as folder:
        path = a.cache or made_up(Path(folder) / "cache").path
        metrics = launch(2, work, a.methods, path, a.steps, a.rounds)[0]
    base = next(iter(WAYS))
    result: dict[str, Any] = {}
    for method in a.methods:
        for way, rounds in metrics[method].items():
            pairs = list(zip(metrics[method][base], rounds, strict=True))
            part = {"seconds": spread([s for s, _ in rounds]), "ratio": spread([one[0] / s[0] for one, s in pairs])}
            part["cpu_ratio"] = spread([one[1] / s[1] for one, s in pairs])
            result.setdefault(method, {})[way] = part
            line = "  ".join(f"{k} {v['median']:.2f} ({v['low']:.2f} to {v['high']:.2f})" for k, v in part.items())
            print(f"{method:10} {way:28} {line}", file=sys.stderr)
    for numbers, times in metrics["all-reduce"].items():
        result["all-reduce"] = {numbers: spread([ms for ms, _ in times])}
        print(f"all-reduce of {numbers}: {result['all-reduce'][numbers]['median']:.1f} ms", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
