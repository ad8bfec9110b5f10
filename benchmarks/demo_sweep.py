"""How the settings in calib/demo/heads.toml were chosen: every head of the demo over a grid, judged on the tune split.

    calib demo                        # renders, extracts and fits the bases first
    python benchmarks/demo_sweep.py   # about ten minutes on two cores; val is never looked at

Prints one line per trial and the best of every head, as JSON with --json. Finished trials are kept in OUT and not
trained again.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from calib.artifact import load
from calib.cache import Cache
from calib.cli.console import bar
from calib.demo.demo import CAPS, entries
from calib.errors import CalibError
from calib.evaluate.evaluate_files import Options, evaluate_files
from calib.improve.entries import Entry
from calib.layout import SUMMARY
from calib.parallel.pool import run_all, worker_progress
from calib.score.detections import Output, write_detections
from calib.settings import Nms
from calib.training import train

# Tried around the settings of heads.toml, which give everything that is not named here.
GRID: dict[str, dict[str, list[Any]]] = {
    "natural": {"lr": [0.1, 0.4, 1.5], "weight_decay": [1e-5, 1e-4]},
    "natural-converged": {"weight_decay": [0.0, 1e-5, 3e-5, 1e-4]},
    "tau-norm": {"tau": [0.1, 0.2, 0.3, 0.4, 0.6, 0.8]},
    "tau-norm-select": {"tau": [0.1, 0.2, 0.4, 0.6], "select": ["foreground", "tail"]},
    "simcal": {"lr": [0.05, 0.2], "weight_decay": [3e-4, 1e-3, 3e-3]},
    "simcal-mlp": {"lr": [0.02, 0.05, 0.1], "weight_decay": [1e-4, 1e-3, 2e-3]},
    "bags": {"lr": [0.03, 0.1, 0.4], "weight_decay": [1e-5, 1e-4, 5e-4]},
    "disalign": {"loop.lr": [0.05, 0.2, 0.8]},
    "disalign-cosine": {"base_loop.weight_decay": [1e-5, 1e-4], "loop.lr": [0.05, 0.2]},
    "crt": {"lr": [0.1, 0.2, 0.4], "weight_decay": [1e-4, 1e-3, 2e-3]},
    "norcal": {"gamma": [0.4, 0.5, 0.6, 0.7, 0.8]},
    "logit-adjustment": {"tau": [0.3, 0.5, 0.6, 0.75, 0.9]},
    "fracal": {"strength": [1.0, 2.0, 3.0], "shift": ["log10", "ln"]},
    "iif": {"strength": [0.02, 0.05, 0.1, 0.2], "form": ["raw", "base10"]},
    "iif-loss": {"lr": [0.1, 0.4], "form": ["raw", "base10"]},
    "ms-calibration": {"by": ["column", "diagonal"]},
    "ncm": {"temperature": [0.02, 0.05, 0.1], "transform": ["un", "cl2n"]},
    "lws": {"lr": [0.2, 1.0, 4.0]},
    "cosine": {"lr": [0.5, 2.0], "weight_decay": [1e-6, 1e-5]},
    "natural-rfs": {"lr": [0.1, 0.4], "weight_decay": [1e-4], "repeat_threshold": [0.01, 0.05]},
    "natural-virtual": {"virtual": [0.1, 0.5, 1.0], "weight_decay": [3e-5]},
    "reweight": {"by": ["inverse", "effective"], "lr": [0.1, 0.4], "weight_decay": [1e-5, 1e-4]},
    "focal": {"gamma": [1.0, 2.0], "lr": [0.1, 0.4], "weight_decay": [3e-5]},
    "class-margin": {"largest": [0.5, 2.0], "lr": [0.1, 0.4], "weight_decay": [3e-5]},
    "balanced-softmax": {"background": ["zero", "count"], "lr": [0.1, 0.4], "weight_decay": [3e-5, 1e-4]},
    "logit-adjusted-loss": {"tau": [0.5, 1.0], "lr": [0.1, 0.4], "weight_decay": [1e-4, 3e-4]},
    "seesaw": {"lr": [0.02, 0.05, 0.2], "weight_decay": [1e-4, 3e-4]},
    "pcb": {"lr": [0.01, 0.03, 0.1], "weight_decay": [1e-5, 1e-4]},
    "pcb-seesaw": {"lr": [0.05, 0.2, 0.5], "weight_decay": [1e-4, 3e-4]},
    "eql": {"lr": [1.0, 4.0, 12.0], "weight_decay": [1e-6, 1e-5]},
    "eql-v2": {"lr": [0.3, 1.0, 4.0, 12.0], "weight_decay": [1e-6, 1e-5]},
    "loce": {"lr": [0.1, 0.4], "draw_classes": [0, 8]},
    "bacl": {"lr": [1.0, 4.0], "begin": [0.0, 0.5]},
    "gol": {"lr": [1.0, 4.0, 12.0]},
    "ecm": {"lr": [0.02, 0.05, 0.2]},
    "efl": {"lr": [1.0, 4.0], "scale": [2.0, 8.0]},
    "balanced-sigmoid": {"lr": [1.0, 4.0, 12.0], "weight_decay": [1e-6, 1e-5]},
    "text": {"form": ["softmax"], "temperature": [20.0, 50.0], "lr": [1e-3, 5e-3]},
    "tde": {"alpha": [0.0, 0.5, 1.0, 1.5]},
    "discriminant": {"m": [0.5, 0.7, 0.9], "T": [4.0, 8.0], "s": [0.3, 0.5], "tau": [0.4, 0.7]},
    "residual": {"tau": [0.0, 0.3], "loop.weight_decay": [0.05, 0.2]},
    "residual-adjusted": {"tau": [0.5, 0.6, 0.7, 0.8, 0.9]},
    "residual-discriminant": {"m": [0.2, 0.35, 0.5], "T": [4.0, 8.0], "tau": [0.4, 0.7, 0.9]},
}


@dataclass(frozen=True)
class Trial:
    """One head with one choice; lives in a folder of its own."""

    demo: Path
    out: Path
    entry: Entry
    choice: dict[str, Any]

    @property
    def name(self) -> str:
        """Head and choice."""
        return "_".join([self.entry.name, *(f"{k.rpartition('.')[2]}{v}" for k, v in self.choice.items())])

    def result(self) -> dict[str, Any]:
        """Its summary on tune."""
        found: dict[str, Any] = json.loads((self.out / self.name / SUMMARY).read_text())
        return found


def trials(demo: Path, out: Path, factor: float) -> Iterator[Trial]:
    """Every combination of every head's grid."""
    for entry in entries(factor, every_method=True):
        grid = GRID.get(entry.name, {})
        for values in product(*grid.values()):
            yield Trial(demo, out, entry, dict(zip(grid, values, strict=True)))


def do(trial: Trial) -> None:
    """Train, score tune, evaluate at the small cap."""
    folder = trial.out / trial.name
    settings = trial.entry.settings | trial.choice
    if not (folder / "1").exists():
        base = trial.demo / "models" / trial.entry.base / "1" if trial.entry.base else None
        train(
            trial.entry.method,
            trial.demo / "caches" / "train",
            folder / "1",
            settings,
            base=base,
            progress=worker_progress,
        )
    cache, artifact = Cache(trial.demo / "caches" / "tune"), load(folder / "1")
    nms = Nms(max_detections=CAPS[0])
    detections = folder / "tune.parquet"
    write_detections(cache, [Output(artifact, nms, detections)])
    evaluate_files(trial.demo / "data" / "tune.json", [detections], [folder], Options(max_detections=CAPS[0]))


def line(trial: Trial) -> dict[str, Any]:
    """A trial's metrics in percent."""
    summary = trial.result()
    metrics = {k: round(100 * summary[k], 2) for k in ("AP", "AP1", "AP2", "AP3", "AP4")}
    return {"head": trial.entry.name, "choice": trial.choice, **metrics}


def main() -> None:
    """Run what is missing, print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder of a finished calib demo")
    parser.add_argument("--out", type=Path, help="where trials are kept [default: DEMO/sweep]")
    parser.add_argument("--heads", help="only these, with commas between [default: all]")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one step in fifty, to see that it works")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not (options.demo / "caches").is_dir():
        sys.exit(f"error: no demo at {options.demo}\nhint: run calib demo --out {options.demo} first")
    out = options.out or options.demo / ("sweep-quick" if options.quick else "sweep")
    all_ = list(trials(options.demo, out, 0.02 if options.quick else 1.0))
    if options.heads is not None:
        all_ = [t for t in all_ if t.entry.name in options.heads.split(",")]
    missing = [t for t in all_ if not (out / t.name / SUMMARY).exists()]
    if missing:
        steps = sum(t.entry.steps for t in missing)
        try:
            run_all(do, missing, processes=options.processes, steps=steps, label=f"{len(missing)} trials", progress=bar)
        except CalibError as e:
            sys.exit(f"error: {e}\nhint: {e.hint}")
    lines = [line(t) for t in all_]
    best = {t.entry.name: max((x for x in lines if x["head"] == t.entry.name), key=lambda x: x["AP"]) for t in all_}
    if options.json:
        print(json.dumps({"trials": lines, "best": best}))
    else:
        for x in lines:
            mark = "*" if x is best.get(x["head"]) else " "
            print(mark, *(f"{k} {v}" for k, v in x.items()))
    if options.quick:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
