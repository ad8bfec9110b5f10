"""The demo: images are rendered, then ``calib improve`` runs on them with a table of heads beside the chosen one."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from calib.data.plan import DEFAULT_SEED, ShapesSettings
from calib.data.resources import shipped
from calib.data.shapes import build
from calib.errors import ExistsError, SettingError
from calib.files import read_json, replacing, require, write_json
from calib.improve.entries import Entry, read_entries
from calib.improve.improve import improve
from calib.improve.request import Data, Frozen, HeadTable, Request, Search
from calib.improve.summary import Summary
from calib.layout import RunFolder
from calib.progress import Progress, silent

DETECTOR = "shapes_detector.safetensors"
REQUEST = "demo.json"
# 0.3 detections per proposal is LVIS's own ratio (300 to 1,000); 300 is LVIS's cap, twice our 150 proposals.
CAPS = (45, 300)
REPLICATES = 100
METHODS = ("natural", "crt", "seesaw", "residual", "logit-adjustment", "norcal", "fracal", "tau-norm", "discriminant")
SEARCH = Search("18", methods=METHODS, steps=1200, finalists=2, seeds=1, stacked=24, control_trials=1,
                max_detections=CAPS[0])  # fmt: skip

Note = Callable[[str], None]


@dataclass(frozen=True)
class DemoSettings:
    """``seeds``: how often learned heads are trained, for a spread. ``scale`` below 1 shortens everything for a try:
    fewer images, fewer training steps, and metrics that mean nothing. ``detector``: a checkpoint of
    ``data/train_detector.py`` instead of the shipped one, which was trained on the images of the default seed."""

    seeds: int = 1
    scale: float = 1.0
    data_seed: int = DEFAULT_SEED
    every_method: bool = False
    detector: Path | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1 or not 0 < self.scale <= 1 or self.data_seed < 0:
            raise SettingError("seeds must be at least 1, scale above 0 and at most 1, data_seed at least 0")

    @property
    def checkpoint(self) -> Path:
        """The detector."""
        return shipped(DETECTOR) if self.detector is None else self.detector


def entries(factor: float = 1.0, *, every_method: bool = False) -> tuple[Entry, ...]:
    """Rows of the table in their order, trained for ``factor`` of their steps; ``every_method``: the long table."""
    sources = ["heads.toml", "more_heads.toml"] if every_method else ["heads.toml"]
    found = read_entries(*(Path(str(files(__package__).joinpath(name))) for name in sources))
    return tuple(e if factor == 1 else e.scaled(factor) for e in found)


def demo(
    out: Path,
    settings: DemoSettings,
    *,
    processes: int = 1,
    progress: Progress = silent,
    note: Note = lambda line: None,
) -> Summary:
    """Render, improve, draw the plots of the table: everything under ``out``.

    Raises:
        ExistsError: ``out`` holds a demo with other settings. MissingExtraError: torchvision is not installed.
        MissingFileError, FormatError: ``detector`` is not there, or no detector.
    """
    from calib.data.detector import load_detector
    from calib.demo.plots import write_plots

    if settings.detector is not None:
        load_detector(settings.detector)  # a wrong file is refused before anything is written
    _claim(out, settings)
    _render(out, settings, processes, progress)
    _copy_detector(settings.checkpoint, out / "detector.safetensors")
    summary = improve(request_of(out, settings, processes), progress=progress, note=note)
    write_plots(out, summary.table)
    return summary


def request_of(out: Path, settings: DemoSettings, processes: int) -> Request:
    """What the demo asks of ``calib improve``."""
    data, detector = out / "data", out / "detector.safetensors"
    whole = settings.scale == 1
    search = SEARCH if whole else Search("2", methods=("tau-norm", "logit-adjustment"), steps=2, finalists=1, seeds=1,
                                         stacked=1, control_trials=1, max_detections=CAPS[0])  # fmt: skip
    return Request(
        Frozen(f"torchvision:{detector}"),
        Data(data / "train.json", data / "images", data / "val.json", data / "tune.json"),
        out,
        search,
        replicates=REPLICATES if whole else 10,
        processes=processes,
        doctor=whole,  # a handful of images say nothing
        table=HeadTable(entries(settings.scale, every_method=settings.every_method), settings.seeds, CAPS),
    )


def _claim(out: Path, settings: DemoSettings) -> None:
    """A demo folder remembers what it is a demo of; more seeds and methods may be added to it."""
    wanted = {"scale": settings.scale, "data_seed": settings.data_seed, "detector": settings.checkpoint.name}
    path = out / REQUEST
    if path.exists():
        if {"detector": DETECTOR} | read_json(path, "demo settings") != wanted:
            raise ExistsError(f"{out} holds a demo with other settings", hint="choose another --out, or remove it")
        return
    if out.exists() and any(out.iterdir()):
        raise ExistsError(f"{out} exists and is no demo", hint="choose another --out")
    write_json(path, wanted)
    RunFolder(out).steps.mkdir()


def _copy_detector(checkpoint: Path, out: Path) -> None:
    if not out.exists():
        with replacing(out) as temporary:
            shutil.copyfile(require(checkpoint, "detector"), temporary)


def _render(out: Path, settings: DemoSettings, processes: int, progress: Progress) -> None:
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
    build(out / "data", shapes, processes=processes, progress=progress)
