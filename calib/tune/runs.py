"""One training of one trial, judged on the tune cache; several of them from one reading of the train cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

from calib import registry
from calib.artifact import Artifact, load
from calib.cache import Cache
from calib.decide.assess import Assessment
from calib.decide.compose import combine
from calib.decide.on_base import OnBase
from calib.errors import CalibError, UnsupportedError
from calib.evaluate import Detections, Rescored
from calib.parallel.devices import choose_device
from calib.parallel.pool import worker_progress
from calib.sampling.class_balanced import ClassBatches
from calib.score import detector_nms
from calib.settings import Nms
from calib.training.context import FitContext
from calib.training.loop import run_trainings
from calib.training.plan import HeadPlan, check_needs, settings_of
from calib.training.stages import fit_alone

from .outcome import BASE

ADJUSTMENT = "logit-adjustment"


@dataclass(frozen=True)
class Run:
    """Trial ``trial``, trained for ``steps`` steps (0: nothing is learned) from ``seed``; its head goes to ``out``.

    ``base``: the head that it is built on. With ``parts``, the heads there are averaged; a run of trial BASE finds its
    head at ``out``: nothing is trained. With ``adjust``, the head is judged after a logit adjustment of these settings
    too.
    """

    trial: int
    method: str
    settings: dict[str, Any]
    steps: int
    seed: int
    out: Path
    parts: tuple[Path, Path] | None = None
    base: Path | None = None
    adjust: Mapping[str, Any] | None = None

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
            return self.method
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
    """Metrics on the tune cache as fractions, or what went wrong; ``seconds`` of training and judging."""

    metrics: dict[str, float] | None
    seconds: float
    error: str = ""
    adjusted: dict[str, float] = field(default_factory=dict)


@lru_cache(maxsize=1)
def _train_cache(path: Path) -> Cache:
    return Cache(path)


@lru_cache(maxsize=1)
def _tune_cache(path: Path) -> Assessment:
    return Assessment(Cache(path))


@lru_cache(maxsize=1)
def _base(path: Path) -> Artifact:
    return load(path)


@lru_cache(maxsize=1)
def _on_base(tune: Path, path: Path) -> OnBase:
    return OnBase(_tune_cache(tune), _base(path).head)


def do(unit: Unit) -> list[Judged]:
    """Train what is not trained yet, judge all; an error of a run is its result, not one of the others."""
    spent, failed = _trained(unit, [r for r in unit.runs if r.parts is None and r.trial != BASE])
    for run in unit.runs:
        if run.parts is not None:
            try:
                combine("average", *run.parts, run.out, overwrite=True)
            except CalibError as e:  # a part that could not be trained
                failed[run.key] = e
    judged = []
    with worker_progress("judge", total=len(unit.runs), unit="steps") as bar:
        for run in unit.runs:
            seconds, error = spent.get(run.key, 0.0), failed.get(run.key)
            judged.append(_judged(unit, run, seconds) if error is None else Judged(None, seconds, str(error)))
            bar.advance(0 if run.total else 1)
    return judged


def _trained(unit: Unit, runs: Sequence[Run]) -> tuple[dict[str, float], dict[str, CalibError]]:
    """Seconds of the steps of every run that was not trained before, and the errors."""
    cache = _train_cache(unit.train)
    plans: dict[str, HeadPlan] = {}
    failed: dict[str, CalibError] = {}
    for r in runs:
        try:
            settings = settings_of(r.method, r.settings, r.seed)
            base = None if r.base is None else _base(r.base)
            plans[r.key] = HeadPlan(r.method, settings, r.seed, cache, r.out, base)
        except CalibError as e:  # a base that could not be trained
            failed[r.key] = e
    device = choose_device(unit.device)
    left = {
        key: FitContext(device=device, progress=worker_progress) for key, plan in plans.items() if not plan.is_done()
    }
    heads = run_trainings([plans[key].trainings(context, overwrite=True) for key, context in left.items()])
    for key, error in zip(left, heads, strict=True):
        if isinstance(error, CalibError):
            failed[key] = error
        elif isinstance(error, Exception):
            raise error
    return {key: context.spent.seconds for key, context in left.items()}, failed


def _judged(unit: Unit, run: Run, seconds: float) -> Judged:
    begin = perf_counter()
    assessment = _tune_cache(unit.tune)
    nms = capped(assessment.cache, unit.max_detections)
    try:
        artifact = load(run.out)
        judge = assessment if run.base is None else _on_base(unit.tune, run.base)
        metrics = _metrics(assessment, judge.found(artifact.head, nms), nms)
        adjusted = {} if run.adjust is None else _adjusted(unit, run, artifact, nms)
    except CalibError as e:
        return Judged(None, seconds, str(e))
    return Judged(metrics, seconds + perf_counter() - begin, adjusted=adjusted)


def _adjusted(unit: Unit, run: Run, artifact: Artifact, nms: Nms) -> dict[str, float]:
    """Metrics of the logit adjustment of ``run`` on its head; none of a head that is no base for one."""
    train, settings = _train_cache(unit.train), settings_of(ADJUSTMENT, run.adjust or {}, run.seed)
    try:
        check_needs(registry.method(ADJUSTMENT), train, artifact)
        head = fit_alone(settings, train, FitContext(run.seed, base=artifact.head))
    except UnsupportedError:
        return {}
    assessment = _tune_cache(unit.tune)
    return _metrics(assessment, assessment.found(head, nms), nms)


def _metrics(assessment: Assessment, found: Detections | Rescored, nms: Nms) -> dict[str, float]:
    """The summary without the numbers of categories."""
    summary = assessment.evaluate(found, nms).summary()
    return {k: float(v) for k, v in summary.items() if not k.startswith("n")}


def capped(cache: Cache, max_detections: int) -> Nms:
    """The detector's thresholds with a cap of its own."""
    return replace(detector_nms(cache), max_detections=max_detections)


def units(runs: Sequence[Run], processes: int, train: Path, tune: Path, max_detections: int, device: str) -> list[Unit]:
    """Runs of like batches together, at least two units per worker where there are so many; the longest ones first."""
    ordered = sorted((r for r in runs if r.steps), key=lambda r: (-r.steps, r.feed(), r.trial, r.seed))
    size = max(1, len(ordered) if processes == 1 else min(4, len(ordered) // (2 * processes)))
    parts = [tuple(ordered[i : i + size]) for i in range(0, len(ordered), size)]
    # What is not trained reads nothing together: one by one, those of one base in a row.
    parts += [(r,) for r in sorted((r for r in runs if not r.steps), key=lambda r: (str(r.base), r.trial, r.seed))]
    parts.sort(key=lambda part: -sum(r.total for r in part))
    return [Unit(train, tune, part, max_detections, device) for part in parts]
