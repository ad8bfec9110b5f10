"""Search over methods and settings, judged on the tune cache: many short trainings, then fewer and longer ones.

Every method is tried once, the better half of them again and again, each for a quarter of the steps; the best quarter
of these trials is trained for all steps (successive halving: Jamieson and Talwalkar, "Non-stochastic Best Arm
Identification and Hyperparameter Optimization", AISTATS 2016; each length has a whole learning-rate schedule, so
nothing is judged in mid-flight). Only so many trials of one method go on: short trainings favour quick learners. The
best, and averages of the best of different methods, are trained again from other seeds; the best mean wins.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from shutil import rmtree
from time import monotonic
from typing import Any

from calib import registry
from calib.artifact import load, save
from calib.cache import Cache
from calib.errors import ExistsError, FitError, SettingError, UnsupportedError
from calib.files import lock, read_json, write_json
from calib.parallel.pool import Pool
from calib.progress import Progress, silent
from calib.train.head import check_needs

from .objective import Objective
from .outcome import Result, Row, result, write_trials
from .runs import AVERAGE, BASELINE, Judged, Run, do, units
from .space import Space, read_spaces, with_steps
from .study import Asked, Memory

REQUEST = "study.json"
ROUND = 12
BUDGET = ("trials", "seconds", "finalists", "seeds", "average", "space")  # a study may be gone on with by others
KEEP = 4  # one in so many goes on, to so many times the steps
PER_METHOD = 4  # of one method at most so many go on
SHARES = (0.45, 0.65)  # of the time left: for short trainings, then for whole ones; seeds take the rest


@dataclass(frozen=True)
class Plan:
    """What is searched for and how long: ``trials``, or ``seconds`` of wall time (one of them).

    ``steps`` is the length of the longest trainings, ``finalists`` heads are trained from ``seeds`` seeds each.
    ``average``: averages of the best heads of the three best methods take part; they cost two heads when serving.
    ``max_detections`` None means the detector's own cap.
    """

    objective: str = "AP"
    methods: tuple[str, ...] = ()
    trials: int | None = None
    seconds: float | None = None
    steps: int = 4500
    finalists: int = 3
    seeds: int = 3
    average: bool = True
    seed: int = 0
    max_detections: int | None = None
    space: Path | None = None

    def __post_init__(self) -> None:
        if (self.trials is None) == (self.seconds is None):
            raise SettingError("the budget is a number of trials or a time", hint="--budget 100, or --budget 20m")
        for name, low in (("trials", 1), ("seconds", 1), ("steps", 1), ("finalists", 1), ("seeds", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise SettingError(f"{name} is {value}: expected at least {low}")

    @property
    def short(self) -> int:
        """Steps of a short training."""
        return max(1, self.steps // KEEP)


_UNITS = {"s": 1, "m": 60, "h": 3600}


def budget_of(text: str) -> dict[str, Any]:
    """``20m`` -> ``{"seconds": 1200.0}``, ``100`` or ``100 trials`` -> ``{"trials": 100}``.

    Raises:
        SettingError: neither a time nor a number.
    """
    if time := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip()):
        return {"seconds": float(time[1]) * _UNITS[time[2]]}
    if trials := re.fullmatch(r"(\d+)(?:\s*trials)?", text.strip()):
        return {"trials": int(trials[1])}
    raise SettingError(
        f"budget is '{text}': expected a time or a number of trials", hint="--budget 20m, or --budget 100"
    )


def tune(
    train: Path,
    tune: Path,
    out: Path,
    plan: Plan,
    *,
    workers: int = 1,
    device: str = "cpu",
    progress: Progress = silent,
    note: Callable[[str], None] = lambda line: None,
) -> Result:
    """Search, and write the study to ``out``: trials, heads, the chosen one ready to serve.

    Interrupted, the same call goes on; with a larger budget it goes on from where it ended. With a budget in trials
    the outcome depends on caches, plan and seed alone, however many ``workers`` there are.

    Raises:
        SettingError, UnknownNameError: a plan that cannot be. UnsupportedError: caches of other modes or detectors.
        ExistsError: ``out`` is another study, or being written. FitError: nothing could be trained.
    """
    search = Search(train, tune, out, plan, workers, device, progress, note)
    with lock(out / "lock", f"searching for {out}"), Pool(workers) as pool:
        return search.run(pool)


@dataclass
class Search:
    """One call of ``tune``."""

    train: Path
    tune: Path
    out: Path
    plan: Plan
    workers: int
    device: str
    progress: Progress
    note: Callable[[str], None]
    rows: dict[str, Row] = field(default_factory=dict)
    averages: dict[int, Asked] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.objective = Objective.parse(self.plan.objective)
        cache, tune = Cache(self.train), Cache(self.tune)
        if cache.manifest.detector.digest != tune.manifest.detector.digest:
            raise UnsupportedError(f"caches {self.train} and {self.tune} were written by different detectors")
        if tune.manifest.mode == "train":
            raise UnsupportedError(
                f"cache {self.tune} was extracted with --mode train", hint="extract the tune split with --mode test"
            )
        if self.out.exists() and not self.out.is_dir():
            raise ExistsError(f"{self.out} is a file", hint="choose another --out")
        self.cap = self.plan.max_detections or tune.manifest.detector.max_detections
        self.stages = cache.manifest.detector.stages  # each is trained
        self.spaces = self._spaces(cache)
        self.begin = monotonic()
        self._claim(cache, tune)

    def _spaces(self, cache: Cache) -> dict[str, Space]:
        spaces = read_spaces(self.plan.space)
        chosen: dict[str, Space] = {}
        for name in self.plan.methods or registry.METHODS:
            info = registry.method(name)
            if name == "softmax" and not self.plan.methods:
                continue  # it is the baseline anyway
            if name not in spaces:
                raise SettingError(f"{name} has no search space", hint="give one with --space FILE.toml")
            try:
                check_needs(info, cache)
            except UnsupportedError as e:
                if self.plan.methods:
                    raise
                self.note(f"{name} is left out: {e}")
                continue
            chosen[name] = spaces[name]
        return chosen

    def _claim(self, cache: Cache, tune: Cache) -> None:
        """A study remembers what it is a study of; its budget may grow."""
        plan = {k: v for k, v in asdict(self.plan).items() if k not in BUDGET}
        spaces = {name: {"set": dict(s.fixed)} | {d.key: [d.kind, *d.values] for d in s.dimensions}
                  for name, s in self.spaces.items()}  # fmt: skip
        wanted = plan | {"methods": list(self.spaces), "train": cache.digest, "tune": tune.digest, "spaces": spaces}
        path = self.out / REQUEST
        if path.exists():
            known = read_json(path, "study")
            changed = [k for k in wanted if known.get(k) != wanted[k]]
            if changed:
                raise ExistsError(f"{self.out} is a study with other {', '.join(changed)}", hint="choose another --out")
            return
        if self.out.exists() and any(p.name != "lock" for p in self.out.iterdir()):
            raise ExistsError(f"{self.out} exists and is no study", hint="choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)

    def run(self, pool: Pool) -> Result:
        """All phases; what is recorded is not done again."""
        self.pool, self.memory = pool, Memory(self.out, self.spaces, self.plan.seed)
        records = self.memory.records
        self.spent = float(records.pop("seconds", 0.0))
        self.rows = {k: Row(**v) for k, v in records.items() if isinstance(v, dict)}
        self._measure([Run(BASELINE, "softmax", {}, 0, self.plan.seed, self._head(BASELINE, 0, 0))], "baseline")
        self.detector = self.rows[f"{BASELINE}/0/{self.plan.seed}"].figures
        if not self.detector:
            raise FitError(f"the detector's own head cannot be judged on {self.tune}")
        self.objective.check(self.detector)
        self._draw()
        self._promote()
        self.averages = self._averages()
        self._measure([self._run(a, self.plan.seed) for a in self.averages.values()], "averages")
        finalists = self._finalists()
        parts = {p.number: p for a in finalists for p in self._parts(a)}.values()
        for group, what in ((parts, "seeds of what finalists are made of"), (finalists, "finalists")):
            runs = [self._run(a, self.plan.seed + k) for a in group for k in range(self.plan.seeds)]
            self._measure(runs, what)
        return self._finish()

    def _averages(self) -> dict[int, Asked]:
        """Pairs of the best trials of the three best methods, by their numbers, which lie below the baseline's."""
        best: dict[str, Asked] = {}
        for trial, _ in self._ranked(self.plan.steps) if self.plan.average else ():
            best.setdefault(trial.method, trial)
        pairs = combinations(list(best.values())[:3], 2)
        settings = [{"one": a.number, "other": b.number} for a, b in pairs]
        known = {r.trial: r.settings for r in self.rows.values() if r.method == AVERAGE}
        for one in settings:
            if one not in known.values():
                known[BASELINE - 1 - len(known)] = one
        return {n: Asked(n, AVERAGE, s) for n, s in known.items() if s in settings}

    def _parts(self, trial: Asked) -> list[Asked]:
        """The trials that an average is made of; of another trial, itself."""
        ended = {t.number: t for t in self.memory.ended}
        return [ended[n] for n in trial.settings.values()] if trial.method == AVERAGE else [trial]

    @property
    def seconds(self) -> float:
        """Wall time spent on the study, over all its calls."""
        return self.spent + monotonic() - self.begin

    def _left(self) -> float:
        return float("inf") if self.plan.seconds is None else self.plan.seconds - self.seconds

    def _draw(self) -> None:
        """Rounds of new trials at the first rung."""
        end = self.seconds + SHARES[0] * self._left()
        longest = 0.0
        self._round(self._until(self.memory.asked))  # what an interruption left under way
        while self.plan.trials is None or self.memory.asked < self.plan.trials:
            if self.seconds + longest > end and self.memory.asked >= len(self.spaces):
                break
            begin = self.seconds
            self._round(self._until(self.memory.asked + 1))
            longest = max(longest, self.seconds - begin)

    def _until(self, asked: int) -> int:
        """The end of the round that trial number ``asked`` - 1 belongs to."""
        end = -(-asked // ROUND) * ROUND
        return end if self.plan.trials is None else max(min(end, self.plan.trials), self.memory.asked)

    def _round(self, until: int) -> None:
        trials = self.memory.ask(until, self._methods())
        runs = {a.number: self._run(a, self.plan.seed, self.plan.short) for a in trials}
        self._measure(list(runs.values()), f"trials to {until}")
        for number, run in runs.items():
            self.memory.tell(number, self._value(self.rows[run.key]))
        if trials:
            self._save()

    def _methods(self) -> Callable[[int], str]:
        """The method of a trial by its number: all in turn, then the better half in turn."""
        names = list(self.spaces)
        best: dict[str, float] = {}
        for trial, row in self._ranked(self.plan.short):
            best.setdefault(trial.method, self.objective.value(row.figures, self.detector))
        better = sorted(best, key=lambda m: -best[m])[: -(-len(names) // 2)] or names
        return lambda n: names[n] if n < len(names) else better[(n - len(names)) % len(better)]

    def _value(self, row: Row) -> float | None:
        return self.objective.value(row.figures, self.detector) if row.figures else None

    def _run(self, trial: Asked, seed: int, steps: int | None = None) -> Run:
        """``trial`` at a rung, the last if none is given; what does not learn has one length only, 0."""
        if trial.method == AVERAGE:
            one, other = (self._run(part, seed).out for part in self._parts(trial))
            out = self._head(trial.number, self.plan.steps, seed)
            return Run(trial.number, AVERAGE, trial.settings, self.plan.steps, seed, out, (one, other))
        steps = (self.plan.steps if steps is None else steps) if self.spaces[trial.method].learns else 0
        settings = with_steps(trial.method, trial.settings, steps) if steps else trial.settings
        return Run(trial.number, trial.method, settings, steps, seed, self._head(trial.number, steps, seed))

    def _head(self, number: int, steps: int, seed: int) -> Path:
        """Where a head lies: whole trainings are kept, seeds as versions."""
        whole = steps in (0, self.plan.steps)
        name = str(number) if number >= 0 else "detector" if number == BASELINE else f"average-{BASELINE - number}"
        return self.out / "heads" / name / str(seed + 1) if whole else self.out / "short" / f"{name}-{steps}" / "1"

    def _ranked(self, steps: int) -> list[tuple[Asked, Row]]:
        """Trials with a result at a rung (or that do not learn), best first."""
        found = []
        averages = self.averages.values() if steps == self.plan.steps else ()
        for trial in (*self.memory.ended, *averages):
            row = self.rows.get(self._run(trial, self.plan.seed, steps).key)
            if row is not None and row.figures:
                found.append((trial, row))
        return sorted(found, key=lambda f: (-self.objective.value(f[1].figures, self.detector), f[0].number))

    def _promote(self) -> None:
        """The best quarter is trained to the end; with a budget in time only as many as there is time for."""
        ranked = [(t, row) for t, row in self._ranked(self.plan.short) if self.spaces[t.method].learns]
        chosen: list[Run] = []
        cost, end = 0.0, SHARES[1] * self._left()
        for trial, row in ranked:
            run = self._run(trial, self.plan.seed)
            if sum(r.method == run.method for r in chosen) == PER_METHOD:
                continue
            cost += 0.0 if run.key in self.rows else row.seconds * KEEP / self.workers
            if len(chosen) >= -(-len(ranked) // KEEP) or (chosen and cost > end):
                break
            chosen.append(run)
        self._measure(chosen, f"{len(chosen)} whole trainings")
        self._save()

    def _finalists(self) -> list[Asked]:
        """The best of the longest; fewer where the time does not suffice for their seeds."""
        ranked = self._ranked(self.plan.steps)
        if not ranked:
            raise FitError("no trial could be trained and judged", hint=f"see {self.out / 'trials.parquet'}")
        chosen: list[Asked] = []
        cost = 0.0
        for trial, _ in ranked[: self.plan.finalists]:
            seconds = sum(self.rows[self._run(p, self.plan.seed).key].seconds for p in self._parts(trial))
            cost += seconds * (self.plan.seeds - 1) / self.workers
            if cost > self._left():
                break
            chosen.append(trial)
        return chosen

    def _measure(self, runs: Sequence[Run], label: str) -> None:
        """Train and judge what is not recorded yet; short heads are thrown away once they are judged."""
        left = [r for r in runs if r.key not in self.rows]
        if not left:
            return
        parts = units(left, self.workers, self.train, self.tune, self.cap, self.device)
        steps = max(1, self.stages * sum(r.total for r in left))
        judged = self.pool.run(do, parts, steps=steps, label=label, progress=self.progress)
        found = {r.key: j for part, js in zip(parts, judged, strict=True) for r, j in zip(part.runs, js, strict=True)}
        for run in left:
            self._keep(run, found[run.key])
        self.memory.record("seconds", self.seconds)
        rmtree(self.out / "short", ignore_errors=True)

    def _keep(self, run: Run, judged: Judged) -> None:
        row = Row(run.trial, run.method, run.settings, run.steps, run.seed, judged.figures or {},
                  judged.seconds, judged.error)  # fmt: skip
        self.memory.record(run.key, asdict(row))
        self.rows[run.key] = row

    def _save(self) -> None:
        write_trials(self.out, list(self.rows.values()), self.objective, self.detector)

    def _finish(self) -> Result:
        self._save()
        whole = [r for r in self.rows.values() if r.trial != BASELINE and r.steps in (0, self.plan.steps)]
        found = result(self.out, self.objective, self.detector, whole, self.seconds)
        best = load(self._head(found.chosen.trial, found.chosen.steps, self.plan.seed))
        save(found.head, best, overwrite=True)
        write_json(self.out / "result.json", found.record())
        return found
