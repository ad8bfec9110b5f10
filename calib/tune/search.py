"""Search over methods and settings, judged on the tune cache: many short trainings, then fewer and longer ones.

Every method is tried once, the better half of them again and again, each for a quarter of the steps; the best quarter
of these trials is trained for all steps (successive halving: Jamieson and Talwalkar, "Non-stochastic Best Arm
Identification and Hyperparameter Optimization", AISTATS 2016; each length has a whole learning-rate schedule, so
nothing is judged in mid-flight). Only so many trials of one method go on: short trainings favour quick learners.

On the best whole trainings, the methods that only transform scores are then tried. What is trained without any balance
gains most by that, so such heads are ranked by what they are worth after a logit adjustment. The best of all, and
averages of the best on different trainings, are trained again from other seeds; the best mean wins.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from calib import registry
from calib.artifact import load, save
from calib.errors import FitError, UnsupportedError
from calib.files import lock, write_json
from calib.layout import LOCK, RESULT, TRIALS
from calib.parallel.pool import Pool
from calib.progress import Progress, silent
from calib.training.plan import check_needs

from .bench import Bench
from .outcome import AVERAGE, BASE, BASELINE, Result, Row, number_on, result
from .plan import KEEP, Plan, budget_of
from .runs import Run
from .space import Space
from .study import Asked

__all__ = ["Plan", "Search", "budget_of", "tune"]

ROUND = 12
PER_METHOD = 4  # of one method at most so many go on
SHARES = (0.45, 0.65, 0.5)  # of the time left: for short trainings, whole ones, trials on these; seeds take the rest


def tune(
    train: Path,
    tune: Path,
    out: Path,
    plan: Plan,
    *,
    processes: int = 1,
    device: str = "cpu",
    progress: Progress = silent,
    note: Callable[[str], None] = lambda line: None,
) -> Result:
    """Search, and write the study to ``out``: trials, heads, the chosen one ready to serve.

    Interrupted, the same call goes on; with a larger budget it goes on from where it ended. With a budget in trials
    the outcome depends on caches, plan and seed alone, however many ``processes`` there are.

    Raises:
        SettingError, UnknownNameError: a plan that cannot be. UnsupportedError: caches of other modes or detectors.
        ExistsError: ``out`` is another study, or being written. FitError: nothing could be trained.
    """
    search = Search(train, tune, out, plan, processes, device, progress, note)
    with lock(out / LOCK, f"searching for {out}"), Pool(processes) as pool:
        search.open(pool)
        return search.run()


class Search(Bench):
    """The phases of a search."""

    def run(self) -> Result:
        """All of them; what is recorded is not done again."""
        self._draw()
        self._promote()
        self._stack()
        self.averages = self._averages()
        self._train_up(self.averages.values(), 1, "averages")
        finalists = self._finalists()
        self._train_up(finalists, self.plan.seeds, "finalists")
        return self._finish()

    def _draw(self) -> None:
        """Rounds of new trials at the first rung."""
        end = self.seconds + SHARES[0] * self.left
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
        ranked = self.ranked(self.plan.short, as_bases=True)
        trials = self.memory.ask(until, _turns(self.spaces, ranked))
        runs = {
            a.number: replace(self.run_of(a, self.plan.seed, self.plan.short), adjust=self.adjustment(a))
            for a in trials
        }
        self.measure(list(runs.values()), f"trials to {until}")
        for number, run in runs.items():
            self.memory.tell(number, self.value(self.rows[run.key]))
        if trials:
            self.save()

    def _promote(self) -> None:
        """The best quarter is trained to the end; with a budget in time only as many as there is time for."""
        ranked = [(t, row) for t, row in self.ranked(self.plan.short, as_bases=True) if self.learns(t)]
        chosen: list[Run] = []
        cost, end = 0.0, SHARES[1] * self.left
        for trial, row in ranked:
            run = replace(self.run_of(trial, self.plan.seed), adjust=self.adjustment(trial))
            if sum(r.method == run.method for r in chosen) == PER_METHOD:
                continue
            cost += 0.0 if run.key in self.rows else row.seconds * KEEP / self.processes
            if len(chosen) >= -(-len(ranked) // KEEP) or (chosen and cost > end):
                break
            chosen.append(run)
        self.measure(chosen, f"{len(chosen)} whole trainings")
        self.save()

    def _stack(self) -> None:
        """Rounds of trials on each of the best heads."""
        bases = [(base, spaces, self.memory.on(base.number, spaces)) for base, spaces in self._bases()]
        end, until = self.seconds + SHARES[2] * self.left, 0
        while bases and until < self.plan.stacked and (self.plan.seconds is None or self.seconds < end):
            until = min(until + (ROUND if until else len(self.on_base)), self.plan.stacked)  # all once, then the best
            drawn = [
                (memory, trial.number, self._on(base, trial))
                for base, spaces, memory in bases
                if memory.asked <= until  # else an interruption left it in a later round
                for trial in memory.ask(until, _turns(spaces, self._ranked_on(base), by_size=True))
            ]
            self.measure([self.trial_on(trial) for *_, trial in drawn], f"trials to {until} on {len(bases)} heads")
            for memory, number, trial in drawn:
                memory.tell(number, self.own_value(self.rows[self.trial_on(trial).key]))
        self.save()

    def _bases(self) -> list[tuple[Asked, dict[str, Space]]]:
        """The best whole training of each of the best methods, with what can be built on it."""
        found: dict[str, tuple[Asked, dict[str, Space]]] = {}
        for trial, _ in self.ranked(self.plan.steps, as_bases=True):
            if len(found) < self.plan.bases and self.learns(trial) and trial.method not in found:
                spaces = self._spaces_on(trial)
                if spaces:
                    found[trial.method] = trial, spaces
        return list(found.values())

    def _spaces_on(self, trial: Asked) -> dict[str, Space]:
        """Of the methods that only transform scores those that take its head as their base."""
        head, fitting = load(self.run_of(trial, self.plan.seed).out), {}
        for name, space in self.on_base.items():
            try:
                check_needs(registry.method(name), self.cache, head)
                fitting[name] = space
            except UnsupportedError:
                continue
        return fitting

    def _on(self, base: Asked, drawn: Asked) -> Asked:
        trial = Asked(number_on(base.number, drawn.number), drawn.method, drawn.settings, base)
        self.stacked[trial.number] = trial
        return trial

    def _ranked_on(self, base: Asked) -> list[tuple[Asked, Row]]:
        return [(t, row) for t, row in self.ranked(self.plan.steps) if t.base == base]

    def _averages(self) -> dict[int, Asked]:
        """Pairs of the best heads on trainings of the three best methods, by numbers below the baseline's."""
        best: dict[str, Asked] = {}
        for trial, _ in self.ranked(self.plan.steps) if self.plan.average else ():
            best.setdefault((trial.base or trial).method, trial)
        pairs = combinations(list(best.values())[:3], 2)
        settings = [{"one": a.number, "other": b.number} for a, b in pairs]
        known = {r.trial: r.settings for r in self.rows.values() if r.method == AVERAGE}
        for one in settings:
            if one not in known.values():
                known[BASELINE - 1 - len(known)] = one
        return {n: Asked(n, AVERAGE, s) for n, s in known.items() if s in settings}

    def _below(self, trial: Asked) -> list[Asked]:
        """What ``trial`` is made of, itself last."""
        if trial.method == AVERAGE:
            return [*(t for part in self.parts(trial) for t in self._below(part)), trial]
        return [trial] if trial.base is None else [trial.base, trial]

    def _train_up(self, trials: Iterable[Asked], seeds: int, what: str) -> None:
        """Train ``trials`` from so many seeds, and before them what they are made of."""
        needed = {t.number: t for trial in trials for t in self._below(trial)}.values()
        averages = [t for t in needed if t.method == AVERAGE]
        on_others = [t for t in needed if t.base is not None]
        trained = [t for t in needed if t.base is None and t.method != AVERAGE]
        for group, label in ((trained, f"{what}: trainings"), (on_others, f"{what}: on them"), (averages, what)):
            self.measure([self.run_of(t, self.plan.seed + k) for t in group for k in range(seeds)], label)

    def _finalists(self) -> list[Asked]:
        """The best of the longest, of a method on a base one; fewer where the time does not suffice for their seeds."""
        ranked = self.ranked(self.plan.steps)
        if not ranked:
            raise FitError("no trial could be trained and judged", hint=f"see {self.out / TRIALS}")
        chosen: list[Asked] = []
        cost = 0.0
        for trial, _ in ranked:
            if trial.base is not None and any((c.method, c.base) == (trial.method, trial.base) for c in chosen):
                continue
            seconds = sum(self.rows[self.run_of(t, self.plan.seed).key].seconds for t in self._below(trial))
            cost += seconds * (self.plan.seeds - 1) / self.processes
            if cost > self.left or len(chosen) == self.plan.finalists:
                break
            chosen.append(trial)
        return chosen

    def _finish(self) -> Result:
        self.save()
        whole = [r for r in self.rows.values() if r.trial not in (BASELINE, BASE) and r.steps in (0, self.plan.steps)]
        chain = [] if self.base is None else self.base.chain()
        below = [{k: link[k] for k in ("method", "settings")} for link in chain]
        base = self.rows[f"{BASE}/0/{self.plan.seed}"].metrics if below else {}
        found = result(self.out, self.objective, self.detector, whole, self.seconds, base, below)
        number, steps = found.chosen.trial, found.chosen.steps
        self._train_up([t for t in self.stacked.values() if t.number == number], 1, "chosen head")
        save(found.head, load(self.head(number, steps, self.plan.seed)), overwrite=True)
        write_json(self.out / RESULT, found.record())
        return found


def _turns(
    spaces: Mapping[str, Space], ranked: Sequence[tuple[Asked, Row]], *, by_size: bool = False
) -> Callable[[int], str]:
    """The method of a trial by its number: all in turn, then in turn the better half of those with something to draw;
    ``by_size``: each as often as it has settings to draw."""
    names = list(spaces)
    best = list(dict.fromkeys(trial.method for trial, _ in ranked))
    better = best[: -(-len(names) // 2)] or names
    better = [m for m in better for _ in (spaces[m].dimensions if by_size else spaces[m].dimensions[:1])] or better
    return lambda n: names[n] if n < len(names) else better[(n - len(names)) % len(better)]
