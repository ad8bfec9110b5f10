"""One training of one trial, judged on the tune cache; several of them from one reading of the train cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

from calib.artifact import load
from calib.cache import Cache
from calib.decide.assess import Assessment
from calib.decide.compose import combine
from calib.errors import CalibError
from calib.heads.feed import Learner, Portion
from calib.parallel.devices import choose_device
from calib.parallel.pool import told
from calib.progress import Bar
from calib.sampling.class_balanced import ClassBatches
from calib.score import detector_nms
from calib.settings import Nms
from calib.train.head import Order, settings_of
from calib.train.one_pass import fit_orders

AVERAGE = "average"  # the method of a run with parts
BASELINE = -1  # the number of the unchanged detector, which is no trial


@dataclass(frozen=True)
class Run:
    """Trial ``trial``, trained for ``steps`` steps (0: nothing is learned) from ``seed``; its head goes to ``out``.

    With ``parts``, the heads there are averaged and nothing is trained.
    """

    trial: int
    method: str
    settings: dict[str, Any]
    steps: int
    seed: int
    out: Path
    parts: tuple[Path, Path] | None = None

    @property
    def key(self) -> str:
        """What it is recorded under."""
        return f"{self.trial}/{self.steps}/{self.seed}"

    @property
    def total(self) -> int:
        """Steps of all its loops."""
        return sum(v for k, v in self.settings.items() if k.endswith("loop.steps")) if self.steps else 0

    def feed(self) -> str:
        """Equal for runs that may take the same batches."""
        if self.parts:
            return AVERAGE
        settings = settings_of(self.method, self.settings, self.seed)
        if isinstance(settings, ClassBatches):
            return f"{settings.rows_per_step} {settings.draws_per_visit} {settings.background_share}"
        return str(getattr(settings, "images", self.method))


@dataclass(frozen=True)
class Unit:
    """Runs that one process trains together, with what it needs."""

    train: Path
    tune: Path
    runs: tuple[Run, ...]
    max_detections: int
    device: str


@dataclass(frozen=True)
class Judged:
    """Figures on the tune cache as fractions, or what went wrong; ``seconds`` of training and judging."""

    figures: dict[str, float] | None
    seconds: float
    error: str = ""


class _Timed:
    """A training that counts the seconds of its steps, apart from those of the others of its pass."""

    def __init__(self, learner: Learner, seconds: list[float], k: int) -> None:
        self.label, self.first, self.stop = learner.label, learner.first, learner.stop
        self._learner, self._seconds, self._k = learner, seconds, k

    def step(self, portion: Portion, bar: Bar) -> None:
        begin = perf_counter()
        self._learner.step(portion, bar)
        self._seconds[self._k] += perf_counter() - begin


@lru_cache(maxsize=1)
def _train_cache(path: Path) -> Cache:
    return Cache(path)


@lru_cache(maxsize=1)
def _tune_cache(path: Path) -> Assessment:
    return Assessment(Cache(path))


def do(unit: Unit) -> list[Judged]:
    """Train what is not trained yet, judge all; an error of a run is its result, not one of the others."""
    spent, failed = _trained(unit, [r for r in unit.runs if r.parts is None])
    for run in unit.runs:
        if run.parts is not None:
            try:
                combine("average", *run.parts, run.out, overwrite=True)
            except CalibError as e:  # a part that could not be trained
                failed[run.key] = e
    return [
        Judged(None, spent.get(run.key, 0.0), str(failed[run.key]))
        if run.key in failed
        else _judged(unit, run.out, spent.get(run.key, 0.0))
        for run in unit.runs
    ]


def _trained(unit: Unit, runs: Sequence[Run]) -> tuple[dict[str, float], dict[str, CalibError]]:
    """Seconds of the steps of every run that was not trained before, and the errors."""
    cache = _train_cache(unit.train)
    orders = [Order(r.method, settings_of(r.method, r.settings, r.seed), r.seed, cache, r.out) for r in runs]
    left = [k for k, order in enumerate(orders) if not order.is_done()]
    seconds = [0.0] * len(left)
    ended = fit_orders(
        [orders[k] for k in left],
        choose_device(unit.device),
        progress=told,
        overwrite=True,
        watch=lambda k, learner: _Timed(learner, seconds, k),
    )
    failed: dict[str, CalibError] = {}
    for k, error in zip(left, ended, strict=True):
        if isinstance(error, CalibError):
            failed[runs[k].key] = error
        elif isinstance(error, BaseException):
            raise error
    return {runs[k].key: s for k, s in zip(left, seconds, strict=True)}, failed


def _judged(unit: Unit, head: Path, seconds: float) -> Judged:
    begin = perf_counter()
    assessment = _tune_cache(unit.tune)
    try:
        figures = figures_of(assessment, load(head).head, capped(assessment.cache, unit.max_detections))
    except CalibError as e:
        return Judged(None, seconds, str(e))
    return Judged(figures, seconds + perf_counter() - begin)


def figures_of(assessment: Assessment, head: Any, nms: Nms) -> dict[str, float]:
    """The summary of ``head`` on the assessment's cache, without the numbers of categories."""
    found = assessment.found(head, nms)
    summary = assessment.evaluate(found, nms).summary()
    return {k: float(v) for k, v in summary.items() if not k.startswith("n")}


def capped(cache: Cache, max_detections: int) -> Nms:
    """The detector's thresholds with a cap of its own."""
    return replace(detector_nms(cache), max_detections=max_detections)


def units(runs: Sequence[Run], workers: int, train: Path, tune: Path, max_detections: int, device: str) -> list[Unit]:
    """Runs of like batches together, at least two units per worker where there are so many; the longest ones first."""
    ordered = sorted(runs, key=lambda r: (-r.steps, r.feed(), r.trial, r.seed))
    size = len(runs) if workers == 1 else max(1, min(4, len(runs) // (2 * workers)))
    parts = [tuple(ordered[i : i + size]) for i in range(0, len(ordered), size)]
    parts.sort(key=lambda part: -sum(r.total for r in part))
    return [Unit(train, tune, part, max_detections, device) for part in parts]
