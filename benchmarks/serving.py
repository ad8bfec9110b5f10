"""CPU and latency of one request for 1,000 proposals x 1,024 numbers (float16) -> 1,203 scores each, on loopback.

    python benchmarks/serving.py                    calib serve in its forms, and the floor under it
    python benchmarks/serving.py --peers FOLDER     BentoML, LitServe and MLServer as well
    python benchmarks/serving.py --quick            few requests: whether it runs, not how fast

CPU is user and system time of all processes of a server, memory the sum of their peaks (VmHWM) in the timed requests;
latency is from the first byte sent to the last byte read by a client with one keep-alive connection. Every
configuration has a server of its own with one worker and one thread. Each answer is checked before anything is timed;
then rounds go forth and back over all configurations while the other servers idle. Metrics are the median and the range
over rounds, p99 is over all requests. Configurations that take long get fewer requests.

The floor is a matrix product with softmax and nothing else (``product``) plus a server on the same HTTP stack that
reads the request and answers with so many bytes prepared before (``empty``). Peers live in virtual environments below
FOLDER, which are made where they are missing, with the torch of this environment. BentoML and LitServe get and give raw
bytes, MLServer speaks JSON as it does by default; how each is set up stands in ``_serving_peers/``.

A table goes to stdout, with ``--json FILE`` all metrics into a file.
"""

import argparse
import json
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from _serving_cases import Case, Product, Served, empty, ours, peers, product
from _serving_environments import PACKAGES, Environment
from _serving_process import StartError, cpu_seconds, forget_peak, peak_mb, started, tree, wait_until_ready
from _serving_work import Work

ROUND_S = 8.0  # what one round of one configuration may take
FEWEST = 3


@dataclass
class Metrics:
    """What was measured of one configuration; lists have an entry per round."""

    requests: int
    reply_bytes: int
    cpu_ms: list[float] = field(default_factory=list)
    median_ms: list[float] = field(default_factory=list)
    all_ms: list[float] = field(default_factory=list)
    peak_mb: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Medians and ranges."""
        return {
            "requests_per_round": self.requests,
            "cpu_ms": spread(self.cpu_ms),
            "latency_ms": spread(self.median_ms),
            "p99_ms": round(float(np.quantile(self.all_ms, 0.99)), 3),
            "reply_bytes": self.reply_bytes,
            "peak_mb": round(self.peak_mb, 1),
        }


def spread(values: Sequence[float]) -> list[float]:
    """Median, least, most."""
    return [round(v, 3) for v in (median(values), min(values), max(values))]


def start(cases: list[Case], folder: Path, stack: ExitStack) -> dict[str, Product | Served]:
    """Start everything side by side, then check one answer of each; a peer that does not start is left out."""
    subjects: dict[str, Product | Served] = {}
    for name, bf16 in (("product", False), ("product, bf16", True)):
        process = stack.enter_context(started(product(folder, bf16=bf16), {}, folder / f"{name}.log", piped=True))
        subjects[name] = Product(process)
    logs = [folder / f"{number}.log" for number in range(len(cases))]
    processes = [
        stack.enter_context(started(case.launch.command, case.launch.env, log))
        for case, log in zip(cases, logs, strict=True)
    ]
    for case, log, process in zip(cases, logs, processes, strict=True):
        try:
            port = wait_until_ready(process, case.launch, log)
            subjects[case.name] = Served(process, port, case.request, case.check)
        except StartError as e:
            if not case.optional:
                raise
            print(f"{case.name} is left out: the server did not start: {e}")
    return subjects


def measure(subjects: dict[str, Product | Served], rounds: int, requests: int) -> dict[str, Metrics]:
    """Warm up, then measure in rounds, forth and back."""
    found = {}
    for name, subject in subjects.items():
        subject.warm()
        taken = min(subject.run(2))
        fitting = max(FEWEST, min(requests, int(ROUND_S / taken)))
        subject.run(min(fitting, 10))
        found[name] = Metrics(min(fitting, requests), subject.reply_bytes)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for name in [*found][:: 1 if number % 2 == 0 else -1]:
            _round(subjects[name], found[name])
    return found


def _round(subject: Product | Served, metrics: Metrics) -> None:
    subject.warm()
    pids = tree(subject.process.pid)
    forget_peak(pids)
    before = cpu_seconds(pids)
    taken = [1000 * seconds for seconds in subject.run(metrics.requests)]
    metrics.cpu_ms.append(1000 * (cpu_seconds(pids) - before) / metrics.requests)
    metrics.peak_mb = max(metrics.peak_mb, peak_mb(pids))
    metrics.median_ms.append(median(taken))
    metrics.all_ms += taken


def compare(found: dict[str, Metrics]) -> dict[str, list[float]]:
    """Ratios of CPU, round by round."""
    compared: dict[str, list[float]] = {}

    def note(what: str, names: Sequence[str], of: Callable[..., float]) -> None:
        if all(name in found for name in names):
            compared[what] = spread([of(*cpu) for cpu in zip(*(found[name].cpu_ms for name in names), strict=True)])

    dense = "calib dense"
    note("dense / floor", (dense, "product", "empty"), lambda d, p, e: d / (p + e))
    note("dense bf16 / floor bf16", ("calib dense, bf16", "product, bf16", "empty"), lambda d, p, e: d / (p + e))
    note("dense bf16 / dense", ("calib dense, bf16", dense), lambda b, d: b / d)
    note("top-300 / dense", ("calib top-300", dense), lambda t, d: t / d)
    note("detections - dense, ms", ("calib detections", dense), lambda t, d: t - d)
    raw = [name for name in found if name.startswith(("BentoML", "LitServe"))]
    if raw:
        best = min(raw, key=lambda name: median(found[name].cpu_ms))
        note(f"best raw peer ({best}) / dense", (best, dense), lambda b, d: b / d)
    for name in ("MLServer", "MLServer, no gzip"):
        note(f"{name} / dense", (name, dense), lambda m, d: m / d)
        note(f"{name} / calib JSON", (name, "calib JSON"), lambda m, j: m / j)
    return compared


def show(found: dict[str, Metrics], compared: dict[str, list[float]]) -> None:
    """Print the tables."""
    print(f"\n{'':22}{'CPU ms a request':>28}{'latency ms':>28}{'p99 ms':>10}{'reply bytes':>13}{'MB':>7}{'n':>5}")
    for name, metrics in found.items():
        row = metrics.as_json()
        cpu, latency = (f"{m:.2f} ({low:.2f}-{high:.2f})" for m, low, high in (row["cpu_ms"], row["latency_ms"]))
        print(
            f"{name:22}{cpu:>28}{latency:>28}{row['p99_ms']:>10.2f}{row['reply_bytes']:>13,}{row['peak_mb']:>7.0f}"
            f"{row['requests_per_round']:>5}"
        )
    print()
    for what, (middle, low, high) in compared.items():
        print(f"{what:40} {middle:7.2f} ({low:.2f}-{high:.2f})")


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="measure peers; their environments lie here")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--requests", type=int, help="per round [default: 40]")
    parser.add_argument("--quick", action="store_true", help="one round of three requests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all metrics")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 5)
    requests = options.requests or (FEWEST if options.quick else 40)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C does, a plain exit ends the servers
        signal.signal(number, lambda *_: sys.exit(1))
    torch.set_num_threads(1)
    versions = {"here": {name: version(name) for name in ("calib", "torch", "uvicorn", "uvloop", "httptools")}}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, ExitStack() as stack:
        folder, work = Path(name), Work.made_up()
        work.save(folder)
        cases = [empty(work), *ours(work, folder)]
        if options.peers:
            environments = {package: Environment(options.peers, package) for package in PACKAGES}
            for package, environment in environments.items():
                environment.make()
                versions[package] = environment.versions()
            cases += peers(work, folder, environments)
        else:
            print("peers are left out: name a folder for their environments with --peers")
        found = measure(start(cases, folder, stack), rounds, requests)
    compared = compare(found)
    for where, names in versions.items():
        print(f"{where}: {', '.join(f'{n} {v}' for n, v in names.items())}")
    show(found, compared)
    if options.json:
        about = {"rounds": rounds, "machine": platform.machine(), "python": platform.python_version()}
        rows = {name: metrics.as_json() for name, metrics in found.items()}
        options.json.write_text(json.dumps({**about, "versions": versions, "metrics": rows, "compared": compared}))


if __name__ == "__main__":
    main()
