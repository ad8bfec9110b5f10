"""The trials of a study: what each is in files, measuring what is not recorded yet, the order of the measured ones."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shutil import rmtree
from time import monotonic
from typing import Any

from calib import registry
from calib.artifact import load
from calib.cache import Cache
from calib.errors import ExistsError, FitError, UnsupportedError
from calib.files import read_json, write_json
from calib.layout import FIRST, HEADS, LOCK, SHORT, STUDY
from calib.parallel.pool import Pool
from calib.progress import Progress
from calib.training.plan import check_needs

from .objective import Objective
from .outcome import AVERAGE, BASE, BASELINE, Row, name_of, write_trials
from .plan import Plan
from .runs import ADJUSTMENT, Judged, Run, Unit, do, units
from .space import Space, read_spaces, with_steps
from .study import Asked, Memory

VERSION = 2  # of the records of a study
BUDGET = ("trials", "seconds", "finalists", "seeds", "bases", "stacked", "average", "space", "base")  # these may change


@dataclass
class Bench:
    """One call of ``tune``: its caches, its plan and what is known of its trials."""

    train: Path
    tune: Path
    out: Path
    plan: Plan
    processes: int
    device: str
    progress: Progress
    note: Callable[[str], None]
    rows: dict[str, Row] = field(default_factory=dict)
    averages: dict[int, Asked] = field(default_factory=dict)
    stacked: dict[int, Asked] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.objective = Objective.parse(self.plan.objective)
        self.cache, tune = Cache(self.train), Cache(self.tune)
        if self.cache.manifest.detector.digest != tune.manifest.detector.digest:
            raise UnsupportedError(f"caches {self.train} and {self.tune} were written by different detectors")
        if tune.manifest.mode == "train":
            raise UnsupportedError(
                f"cache {self.tune} was extracted with --mode train", hint="extract the tune split with --mode test"
            )
        if self.out.exists() and not self.out.is_dir():
            raise ExistsError(f"{self.out} is a file", hint="choose another --out")
        self.cap = self.plan.max_detections or tune.manifest.detector.max_detections
        self.base = None if self.plan.base is None else load(self.plan.base)
        self.spaces = self._spaces()
        on_base = read_spaces(self.plan.space, on_base=True)
        self.on_base = {
            name: on_base[name]
            for name in self.spaces
            if registry.method(name).base == "transforms" and not on_base[name].learns
        }
        self.begin = monotonic()
        self._claim(tune)

    def _spaces(self) -> dict[str, Space]:
        spaces = read_spaces(self.plan.space, on_base=self.base is not None)
        chosen: dict[str, Space] = {}
        for name in self.plan.methods or registry.METHODS:
            info = registry.method(name)
            if name == "softmax" and not self.plan.methods:
                continue  # it is the baseline anyway
            try:
                check_needs(info, self.cache, self.base)
            except UnsupportedError as e:
                if self.plan.methods:
                    raise
                self.note(f"{name} is left out: {e}")
                continue
            chosen[name] = spaces[name]
        return chosen

    def _claim(self, tune: Cache) -> None:
        """A study remembers what it is a study of; its budget may grow."""
        plan = {k: v for k, v in asdict(self.plan).items() if k not in BUDGET}
        spaces = {
            what: {
                name: {"set": dict(s.fixed)} | {d.key: [d.kind, *d.values] for d in s.dimensions}
                for name, s in of.items()
            }
            for what, of in (("spaces", self.spaces), ("spaces on a base", self.on_base))
        }
        wanted = plan | {"methods": list(self.spaces), "train": self.cache.digest, "tune": tune.digest, **spaces}
        wanted["version"] = VERSION
        wanted["base"] = None if self.base is None else self.base.digest()
        path = self.out / STUDY
        if path.exists():
            known = read_json(path, "study")
            changed = [k for k in wanted if known.get(k) != wanted[k]]
            if changed:
                raise ExistsError(f"{self.out} is a study with other {', '.join(changed)}", hint="choose another --out")
            return
        if self.out.exists() and any(p.name != LOCK for p in self.out.iterdir()):
            raise ExistsError(f"{self.out} exists and is no study", hint="choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)

    def open(self, pool: Pool) -> None:
        """Read what is recorded, and judge the unchanged detector and the base, which all is compared with."""
        self.pool, self.memory = pool, Memory.open(self.out, self.spaces, self.plan.seed)
        records = self.memory.records
        self.spent = float(records.pop("seconds", 0.0))
        self.rows = {k: Row(**v) for k, v in records.items() if isinstance(v, dict)}
        trained = {t.number: t for t in self.memory.ended}
        self.stacked = {
            r.trial: Asked(r.trial, r.method, r.settings, trained[r.base])
            for r in self.rows.values()
            if r.base is not None
        }
        baseline = Run(BASELINE, "softmax", {}, 0, self.plan.seed, self.head(BASELINE, 0, 0))
        runs = [baseline]
        if self.base is not None and self.plan.base is not None:
            runs.append(Run(BASE, self.base.info.method, self.base.info.settings, 0, self.plan.seed, self.plan.base))
        self.measure(runs, "baseline")
        self.detector = self.rows[baseline.key].metrics
        if not self.detector:
            raise FitError(f"the detector's own head cannot be judged on {self.tune}")
        self.objective.check(self.detector)

    @property
    def seconds(self) -> float:
        """Wall time spent on the study, over all its calls."""
        return self.spent + monotonic() - self.begin

    @property
    def left(self) -> float:
        """Wall time that is left."""
        return float("inf") if self.plan.seconds is None else self.plan.seconds - self.seconds

    def learns(self, trial: Asked) -> bool:
        """Whether it is trained in steps, on no trial's head."""
        return trial.base is None and trial.method != AVERAGE and self.spaces[trial.method].learns

    def own_value(self, row: Row) -> float | None:
        """The objective; None where the run failed."""
        return self.objective.value(row.metrics, self.detector) if row.metrics else None

    def value(self, row: Row) -> float | None:
        """The same, or that after a logit adjustment, where it is greater."""
        own = self.own_value(row)
        return own if own is None or not row.adjusted else max(own, self.objective.value(row.adjusted, self.detector))

    def adjustment(self, trial: Asked) -> dict[str, Any] | None:
        """Settings of a logit adjustment that ``trial`` is to be judged with too: every method's first one, and the
        others where that one gained by it. A head that was trained without any balance is worth more as a base."""
        if not self.plan.bases or ADJUSTMENT not in self.on_base or not self.learns(trial):
            return None
        for first in self.memory.ended:
            if first.method == trial.method:
                row = self.rows[self.run_of(first, self.plan.seed, self.plan.short).key]
                if self.value(row) == self.own_value(row):
                    return None
                break
        return self.on_base[ADJUSTMENT].centre

    def parts(self, trial: Asked) -> list[Asked]:
        """The trials that an average is made of; of another trial, itself."""
        if trial.method != AVERAGE:
            return [trial]
        known = {t.number: t for t in (*self.memory.ended, *self.stacked.values())}
        return [known[n] for n in trial.settings.values()]

    def run_of(self, trial: Asked, seed: int, steps: int | None = None) -> Run:
        """``trial`` at a rung, the last if none is given; what does not learn has one length only, 0."""
        if trial.method == AVERAGE:
            one, other = (self.run_of(part, seed).out for part in self.parts(trial))
            out = self.head(trial.number, self.plan.steps, seed)
            return Run(trial.number, AVERAGE, trial.settings, self.plan.steps, seed, out, (one, other))
        steps = (self.plan.steps if steps is None else steps) if self.learns(trial) else 0
        settings = with_steps(trial.method, trial.settings, steps) if steps else trial.settings
        base = self.plan.base if trial.base is None else self.run_of(trial.base, seed).out
        out = self.head(trial.number, steps, seed)
        return Run(trial.number, trial.method, settings, steps, seed, out, None, base)

    def head(self, number: int, steps: int, seed: int) -> Path:
        """Where a head lies: whole trainings are kept, seeds as versions."""
        name = name_of(number)
        if steps in (0, self.plan.steps):
            return self.out / HEADS / name / str(seed + 1)
        return self._thrown_away(f"{name}-{steps}")

    def _thrown_away(self, name: str) -> Path:
        return self.out / SHORT / name / FIRST

    def trial_on(self, trial: Asked) -> Run:
        """``trial``, which only transforms the scores of its base: the head is written again where it is wanted."""
        return replace(self.run_of(trial, self.plan.seed), out=self._thrown_away(name_of(trial.number)))

    def ranked(self, steps: int, *, as_bases: bool = False) -> list[tuple[Asked, Row]]:
        """Trials with a result at a rung (or that do not learn), best first; at the last one the composed ones too.

        ``as_bases``: by what they are worth after a logit adjustment too.
        """
        found = []
        composed = (*self.averages.values(), *self.stacked.values()) if steps == self.plan.steps else ()
        for trial in (*self.memory.ended, *composed):
            row = self.rows.get(self.run_of(trial, self.plan.seed, steps).key)
            if row is not None and row.metrics:
                found.append((trial, row))
        worth = self.value if as_bases else self.own_value
        return sorted(found, key=lambda f: (-(worth(f[1]) or 0.0), f[0].number))

    def measure(self, runs: Sequence[Run], label: str) -> None:
        """Train and judge what is not recorded yet; short heads are thrown away once they are judged."""
        left = [r for r in runs if not self._is_known(r)]
        if not left:
            return
        parts = units(left, self.processes, self.train, self.tune, self.cap, self.device)
        stages = self.cache.manifest.detector.stages
        steps = sum(stages * r.total or 1 for r in left)  # what is not trained counts as one
        self.pool.run(do, parts, steps=steps, label=label, progress=self.progress, ended=self._keep)
        rmtree(self.out / SHORT, ignore_errors=True)

    def _is_known(self, run: Run) -> bool:
        """Whether it is recorded, and its head there if it is to be kept: that of a trial on another head is written
        when it is a finalist."""
        row = self.rows.get(run.key)
        is_kept = run.out.is_relative_to(self.out / HEADS)
        return row is not None and (not row.metrics or not is_kept or run.out.exists())

    def _keep(self, unit: Unit, judged: Sequence[Judged]) -> None:
        for run, found in zip(unit.runs, judged, strict=True):
            trial = self.stacked.get(run.trial)
            row = Row(
                run.trial,
                run.method,
                run.settings,
                run.steps,
                run.seed,
                found.metrics or {},
                found.seconds,
                found.error,
                None if trial is None or trial.base is None else trial.base.number,
                found.adjusted,
            )
            self.memory.record(run.key, asdict(row))
            self.rows[run.key] = row
        self.memory.record("seconds", self.seconds)

    def save(self) -> None:
        """Write ``trials.parquet``."""
        write_trials(self.out, list(self.rows.values()), self.objective, self.detector)
