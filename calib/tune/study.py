"""The memory of a search: Optuna's journal in the study's folder, which survives a kill at any moment.

The settings of a method are drawn by TPE (Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011)
from the trials of that method. Every draw is seeded by (seed, trial, position in the trial) and sees the trials before
it only: a search that was interrupted draws what it would have drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import optuna
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from calib.layout import JOURNAL

from .space import Space

NAME = "calib tune"
METHOD = "method"
STARTUP = 3  # trials of a method before TPE takes over from chance


@dataclass(frozen=True)
class Asked:
    """A trial that was drawn: what to train, and the trial whose head it is built on."""

    number: int
    method: str
    settings: dict[str, Any]
    base: "Asked | None" = None


class _Draws:
    """A trial each of whose values is drawn with its own seed, so that a half-drawn one can be gone on with."""

    def __init__(self, trial: Trial, seed: tuple[int, ...]) -> None:
        self._trial, self._seed = trial, seed

    def _seeded(self) -> Trial:
        entropy = [*self._seed, self._trial.number, len(self._trial.params)]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        self._trial.study.sampler = TPESampler(seed=seed, n_startup_trials=STARTUP, constant_liar=True)
        return self._trial

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return self._seeded().suggest_float(name, low, high, log=log)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._seeded().suggest_categorical(name, choices)


class Memory:
    """Trials and what came of their runs."""

    def __init__(
        self, storage: JournalStorage, spaces: Mapping[str, Space], seed: tuple[int, ...], name: str = NAME
    ) -> None:
        self._storage, self._spaces, self._seed = storage, spaces, seed
        sampler = TPESampler(seed=seed[0])
        self._study = optuna.create_study(
            study_name=name, storage=storage, load_if_exists=True, direction="maximize", sampler=sampler
        )

    @classmethod
    def open(cls, folder: Path, spaces: Mapping[str, Space], seed: int) -> Self:
        """Open or begin; the caller holds the folder's lock."""
        folder.mkdir(parents=True, exist_ok=True)
        journal = folder / JOURNAL
        _mend(journal)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return cls(JournalStorage(JournalFileBackend(str(journal))), spaces, (seed,))

    def on(self, base: int, spaces: Mapping[str, Space]) -> "Memory":
        """Trials of ``spaces`` on the head of trial ``base``, in the same journal."""
        return Memory(self._storage, spaces, (*self._seed, base), f"{NAME}, on trial {base}")

    @property
    def asked(self) -> int:
        """Trials that were drawn, ended or not."""
        return sum(t.state != TrialState.WAITING for t in self._study.get_trials(deepcopy=False))

    def ask(self, until: int, method_of: Callable[[int], str]) -> list[Asked]:
        """Draw trials until there are ``until``, number n of ``method_of(n)``; all that have not ended.

        The first trial of a method is the centre of its space.
        """
        trials = self._study.get_trials(deepcopy=False)
        open_ = [t for t in trials if t.state == TrialState.RUNNING]
        drawn = [self._draw(Trial(self._study, t._trial_id)) for t in open_]
        seen = {t.params[METHOD] for t in trials if METHOD in t.params}
        for number in range(self.asked, until):
            if len(self._study.get_trials(deepcopy=False)) == number:  # else a kill left it queued
                method = method_of(number)
                centre = {} if method in seen else self._spaces[method].start()
                self._study.enqueue_trial({METHOD: method, **centre})
            drawn.append(self._draw(self._study.ask()))
            seen.add(drawn[-1].method)
        return drawn

    def _draw(self, trial: Trial) -> Asked:
        draws = _Draws(trial, self._seed)
        method = draws.suggest_categorical(METHOD, tuple(self._spaces))
        return Asked(trial.number, method, self._spaces[method].suggest(draws))

    def tell(self, number: int, value: float | None) -> None:
        """End a trial; None: it failed."""
        if value is None:
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, value)

    @property
    def ended(self) -> list[Asked]:
        """All trials that were reported, in their order."""
        done = [t for t in self._study.get_trials(deepcopy=False) if t.state.is_finished()]
        return [Asked(t.number, t.params[METHOD], self._settings(t.params)) for t in done]

    def _settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        space = self._spaces[params[METHOD]]
        return dict(space.fixed) | {d.key: params[f"{space.method}.{d.key}"] for d in space.dimensions}

    def record(self, key: str, value: Any) -> None:
        """Keep ``value`` (JSON)."""
        self._study.set_user_attr(key, value)

    @property
    def records(self) -> dict[str, Any]:
        """All that was kept."""
        return dict(self._study.user_attrs)


def _mend(journal: Path) -> None:
    """Take away what a killed process left: the lock of the journal, and a line that it did not finish."""
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if journal.exists() and not (content := journal.read_bytes()).endswith(b"\n"):
        with open(journal, "r+b") as f:
            f.truncate(content.rfind(b"\n") + 1)
