"""The stages of the demo. Each skips what an earlier run has finished, so an interrupted demo goes on."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.artifact import Artifact, load
from calib.cache import Cache
from calib.cache.schema import Manifest
from calib.cache.unfinished import is_cache
from calib.data.plan import DEFAULT_SEED, SPLITS, ShapesSettings
from calib.data.resources import shipped
from calib.data.shapes import build
from calib.demo.entries import CONTROL, Entry, entries, is_random
from calib.demo.table import CAPS, Table, collect
from calib.errors import ExistsError, MissingExtraError, SettingError
from calib.evaluate.evaluate_files import Options, evaluate_files
from calib.evaluate.folder import SUMMARY
from calib.extract.dataset import Dataset
from calib.extract.extraction import extract
from calib.extract.options import Extraction
from calib.files import read_json, replacing, require, write_json
from calib.parallel.pool import run_all, worker_progress
from calib.progress import Bar, Progress, silent
from calib.report import Report, write_report
from calib.score import detector_nms
from calib.score.detections import Output, write_detections
from calib.settings import Nms
from calib.training import train

DETECTOR = "shapes_detector.safetensors"
REQUEST = "demo.json"
REPLICATES = 100


@dataclass(frozen=True)
class DemoSettings:
    """``seeds``: how often learned heads are trained, for a spread. ``scale`` below 1 shortens everything for a try:
    fewer images, fewer training steps, and figures that mean nothing. ``detector``: a checkpoint of
    ``data/train_detector.py`` instead of the shipped one, which was trained on the images of the default seed."""

    seeds: int = 1
    scale: float = 1.0
    data_seed: int = DEFAULT_SEED
    every_method: bool = False
    detector: Path | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1 or not 0 < self.scale <= 1 or self.data_seed < 0:
            raise SettingError("seeds must be at least 1, scale above 0 and at most 1, data_seed at least 0")


def demo(out: Path, settings: DemoSettings, *, workers: int = 1, progress: Progress = silent) -> Table:
    """Render, extract, train, score, evaluate; write ``table.md``, plots and ``report.html``; return the table.

    Raises:
        ExistsError: ``out`` holds a demo with other settings. MissingExtraError: torchvision is not installed.
        MissingFileError, FormatError: ``detector`` is not there, or no detector.
    """
    from calib.data.detector import load_detector
    from calib.demo.plots import write_plots

    if settings.detector is not None:
        load_detector(settings.detector)  # a wrong file is refused before anything is written
    _claim(out, settings)
    _render(out, settings, workers, progress)
    for split in SPLITS:
        _extract(out, split, _detector(settings), progress)
    heads = entries(settings.scale, every_method=settings.every_method)
    _heads(_jobs(out, heads, settings.seeds), workers, progress)
    table = collect(out / "results", heads, settings.seeds)
    table.write(out / "table.md")
    write_plots(out, table)
    _report(out, _jobs(out, heads, 1), settings.scale, progress)
    return table


def _claim(out: Path, settings: DemoSettings) -> None:
    """A demo folder remembers what it is a demo of; more seeds and methods may be added to it."""
    wanted = {"scale": settings.scale, "data_seed": settings.data_seed, "detector": _detector(settings).name}
    path = out / REQUEST
    if path.exists():
        if {"detector": DETECTOR} | read_json(path, "demo settings") != wanted:
            raise ExistsError(f"{out} holds a demo with other settings", hint="choose another --out, or remove it")
        return
    if out.exists() and any(out.iterdir()):
        raise ExistsError(f"{out} exists and is no demo", hint="choose another --out")
    write_json(path, wanted)


def _detector(settings: DemoSettings) -> Path:
    return shipped(DETECTOR) if settings.detector is None else settings.detector


def _render(out: Path, settings: DemoSettings, workers: int, progress: Progress) -> None:
    if (out / "data").exists():
        return
    shapes = ShapesSettings(seed=settings.data_seed)
    if settings.scale < 1:
        shapes = ShapesSettings(
            seed=settings.data_seed,
            images=max(72, round(3430 * settings.scale)),
            tune_per_category=max(1, round(shapes.tune_per_category * settings.scale)),
            val_per_category=max(1, round(shapes.val_per_category * settings.scale)),
        )
    build(out / "data", shapes, workers=workers, progress=progress)


def _extract(out: Path, split: str, checkpoint: Path, progress: Progress) -> None:
    cache = out / "caches" / split
    if is_cache(cache) and Manifest.read(cache).complete:
        return
    import torch

    from calib.extract.torchvision import open_detector

    detector = out / "detector.safetensors"
    with replacing(detector) as temporary:
        shutil.copyfile(require(checkpoint, "detector"), temporary)
    adapter = open_detector(str(detector), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    data = out / "data"
    dataset = Dataset.read(data / f"{split}.json", counts_from=data / "train.json")
    extraction = Extraction(mode="train" if split == "train" else "test")

    def labelled(label: str, *, total: int, unit: str) -> AbstractContextManager[Bar]:
        return progress(f"extract {split}", total=total, unit=unit)

    extract(adapter, dataset, data / "images", cache, extraction, resume=True, progress=labelled)


@dataclass(frozen=True)
class Job:
    """One head of one seed, with everything that follows from it; ``base`` is the head that it is built on."""

    out: Path
    entry: Entry
    seed: int
    base: "Job | None" = None

    @property
    def run(self) -> str:
        """The name of its results: the head's, and the seed's where it is not the first."""
        return self.entry.name if self.seed == 0 else f"{self.entry.name}-seed{self.seed}"

    @property
    def head(self) -> Path:
        """Its folder; seeds are versions."""
        return self.out / "models" / self.entry.name / str(self.seed + 1)

    def results(self, cap: int) -> Path:
        """Its result folder at a cap of detections per image."""
        return self.out / ("results" if cap == max(CAPS) else f"results-{cap}") / self.run

    @property
    def finished(self) -> bool:
        """Whether an earlier run has done all of it."""
        return self.head.exists() and all((self.results(cap) / SUMMARY).exists() for cap in CAPS)


def _jobs(out: Path, heads: Sequence[Entry], seeds: int) -> list[Job]:
    """All seeds of every head in which something is drawn at random: in its own training, or in that of its base."""
    jobs: dict[tuple[str, int], Job] = {}
    for entry in heads:
        for seed in range(seeds if is_random(entry, heads) else 1):
            base = jobs.get((entry.base, seed), jobs.get((entry.base, 0)))
            jobs[entry.name, seed] = Job(out, entry, seed, base)
    return list(jobs.values())


def _heads(jobs: Sequence[Job], workers: int, progress: Progress) -> None:
    """Long trainings first; heads that are built on others when those are there."""
    left = [j for j in jobs if not j.finished]
    while left:
        ready = [j for j in left if j.base is None or j.base not in left]
        ready.sort(key=lambda j: -j.entry.steps)
        steps, label = sum(j.entry.steps for j in ready), f"train {len(ready)} heads"
        run_all(do, ready, workers=min(workers, len(ready)), steps=max(steps, 1), label=label, progress=progress)
        left = [j for j in left if j not in ready]


def do(job: Job) -> None:
    """Train, score and evaluate one head."""
    caches = job.out / "caches"
    artifact = _trained(job, caches / "train")
    cache = Cache(caches / "val")
    own = detector_nms(cache)
    nms = Nms(own.score_threshold, own.nms_iou, max(CAPS))
    detections = job.out / "detections" / f"{job.run}.parquet"
    write_detections(cache, [Output(artifact, nms, detections)])
    for cap in CAPS:
        # The best 45 of an image are the first of its best 300: suppression looks at better ones only.
        evaluate_files(job.out / "data" / "val.json", [detections], [job.results(cap)], Options(max_detections=cap))


def _trained(job: Job, cache: Path) -> Artifact:
    if job.head.exists():
        return load(job.head)
    overrides: dict[str, Any] = job.entry.settings
    base = None if job.base is None else job.base.head
    return train(job.entry.method, cache, job.head, overrides, base=base, seed=job.seed, progress=worker_progress)


def _report(out: Path, jobs: Sequence[Job], scale: float, progress: Progress) -> None:
    """The page of all heads at the smaller cap, after the figures that only it shows were added to their results."""
    jobs = sorted(jobs, key=lambda job: job.run != CONTROL)  # intervals are of differences to the first
    cap, annotations = min(CAPS), out / "data" / "val.json"
    folders = [job.results(cap) for job in jobs]
    if not all("difference" in read_json(folder / SUMMARY, "summary of results") for folder in folders[1:]):
        replicates = max(10, round(REPLICATES * scale))
        options = Options(max_detections=cap, calibration=True, matches=True, bootstrap=replicates)
        detections = [out / "detections" / f"{job.run}.parquet" for job in jobs]
        with progress("bootstrap", total=len(jobs) - 1, unit="heads") as bar:

            @contextmanager
            def one_head(label: str, *, total: int, unit: str) -> Iterator[Bar]:
                with silent(label, total=total, unit=unit) as nothing:
                    yield nothing
                bar.advance()

            evaluate_files(annotations, detections, folders, options, progress=one_head)
    heads = {job.run: job.head for job in jobs}
    title = "The demo: heads on rendered images"
    with suppress(MissingExtraError):  # the table and all files are there without the page
        write_report(
            out / "report.html", Report(folders, CONTROL, heads, out / "data" / "images", annotations, title=title)
        )
