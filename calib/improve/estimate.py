"""What a run would do and cost, from a few timed images: nothing is written."""

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from calib.cache.schema import Manifest
from calib.cache.shard import row_bytes
from calib.extract.adapter import Adapter
from calib.extract.dataset import Dataset
from calib.extract.opener import Opener
from calib.extract.pictures import read_image
from calib.improve.caches import Split, fold_names, splits
from calib.improve.entries import is_random
from calib.improve.examined import HOW
from calib.improve.request import HeadTable, Request
from calib.improve.steps import check_place
from calib.settings import ImageBatches
from calib.tables import Rows, Tables

TIMED_IMAGES = 4
TIMED_STEPS = 3


@dataclass(frozen=True)
class Part:
    """One step: images and rows of the cache that it writes, bytes on disk at most, seconds; None: not known."""

    step: str
    what: str
    images: int | None = None
    rows: int | None = None
    bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Estimate(Tables):
    """The steps of a run in their order."""

    parts: tuple[Part, ...]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"steps": [vars(p) for p in self.parts], "bytes": self.total("bytes"), "seconds": self.total("seconds")}

    def total(self, name: str) -> float:
        """Of what is known."""
        return sum(getattr(p, name) or 0 for p in self.parts)

    def tables(self) -> list[tuple[str, Rows]]:
        """One row per step, and the sums of what is known."""
        unknown = [p.step for p in self.parts if p.seconds is None and p.step.endswith("search")]
        what = f"without {', '.join(unknown)}" if unknown else ""
        last = Part("all", what, None, None, int(self.total("bytes")), self.total("seconds"))
        return [("steps; disk at most, time about", [_row(p) for p in (*self.parts, last)])]


def estimate(request: Request) -> Estimate:
    """Open the detector, look at a few pictures of each split, time a few training steps.

    Raises:
        As ``improve`` before its first step.
    """
    request.data.check()
    check_place(request.out)
    detector = request.detector
    adapter = Opener(detector.spec, request.device, detector.weights, detector.arguments)(0)
    extractions = [_extraction(request, split, adapter) for split in splits(request)]
    step = _seconds_per_step(request, adapter)
    names = fold_names(request)
    parts = [Part("doctor", "a look at data and detector", seconds=2 * HOW.seconds)] if request.doctor else []
    parts += [*extractions, _control(request, step)]
    for name in names:
        parts.append(_fold(request, name, extractions[-1]))
        parts.append(_search(request, f"{name}-search", step))
    parts.append(_search(request, "search", step))
    if request.table is not None:
        parts.append(_heads(request.table, step))
    return Estimate((*parts, Part("choose to report", "choose, calibrate, judge, export, report: minutes at most")))


def _extraction(request: Request, split: Split, adapter: Adapter) -> Part:
    dataset = Dataset.read(split.annotations, counts_from=request.data.train)
    n = len(dataset.images)
    records = dataset.images[:: -(-n // TIMED_IMAGES)]
    adapter.launch([read_image(records[0], request.data.images)])()  # the first one warms up
    begin = perf_counter()
    found = [len(adapter.launch([read_image(r, request.data.images)])()[0].features) for r in records]
    seconds = (perf_counter() - begin) / len(records)
    most = adapter.most_rows(split.mode)
    rows = most if split.mode == "train" else min(most, round(sum(found) / len(found)))
    size = row_bytes(Manifest(split.mode, "float16", "full", adapter.detector, {}))
    return Part(f"extract-{split.name}", split.annotations.name, n, n * rows, n * rows * size, n * seconds)


def _seconds_per_step(request: Request, adapter: Adapter) -> float:
    """Of a linear layer on as many rows as a step of training sees."""
    batches, detector = ImageBatches(), adapter.detector
    rows = batches.chunks * batches.images_per_chunk * adapter.most_rows("train")
    layer = torch.nn.Linear(detector.feature_size, detector.outputs).to(request.place)
    x = torch.randn(rows, detector.feature_size, device=request.place)
    target = torch.randint(detector.outputs, (rows,), device=request.place)
    begin = perf_counter()
    for _ in range(TIMED_STEPS):
        torch.nn.functional.cross_entropy(layer(x), target).backward()  # type: ignore[no-untyped-call]
        layer.zero_grad()
    return detector.stages * (perf_counter() - begin) / TIMED_STEPS


def _control(request: Request, seconds: float) -> Part:
    """A quarter of the steps for every trial, all of them for the best quarter."""
    wanted = request.search
    steps = wanted.control_trials * wanted.steps // 4 + -(-wanted.control_trials // 4) * wanted.steps
    return Part("control", f"{steps:,} steps at least", seconds=steps * seconds)


def _fold(request: Request, name: str, val: Part) -> Part:
    share = (request.folds - 1) / request.folds
    images, rows, size = (round(share * (n or 0)) for n in (val.images, val.rows, val.bytes))
    return Part(f"{name}-cache", "the images outside the fold", images, rows, size)


def _heads(table: HeadTable, seconds: float) -> Part:
    steps = sum(entry.steps * (table.seeds if is_random(entry, table.entries) else 1) for entry in table.entries)
    return Part("heads", f"{steps:,} steps for {len(table.entries)} rows of the table", seconds=steps * seconds)


def _search(request: Request, name: str, seconds: float) -> Part:
    """A quarter of the steps for every trial, all of them for the seeds of the finalists."""
    plan = request.search.plan(request.searches)
    if plan.seconds is not None:
        return Part(name, "its share of the budget" if request.data.is_crossed else "the budget", seconds=plan.seconds)
    trials = plan.trials or 0
    steps = trials * plan.short + min(trials, plan.finalists) * plan.seeds * plan.steps
    what = "its share of the budget: " if request.data.is_crossed else ""
    return Part(name, f"{what}{trials} trials, about {steps:,} steps", seconds=steps * seconds / request.processes)


def _row(part: Part) -> dict[str, Any]:
    return {
        "step": part.step,
        "of": part.what,
        "images": "" if part.images is None else f"{part.images:,}",
        "rows": "" if part.rows is None else f"{part.rows:,}",
        "disk": "" if part.bytes is None else f"{part.bytes / 1e6:,.1f} MB",
        "time": "" if part.seconds is None else _time(part.seconds),
    }


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
