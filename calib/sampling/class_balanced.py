"""Class-balanced sampling (Kang et al., Decoupling Representation and Classifier, ICLR 2020, Sec. 4.1).

Classes come from a reshuffled cycle; every visit draws a few rows from the class's own reshuffled cycle. Background
is one extra class with a share of its own, since in detection it is nearly everything.
"""

from dataclasses import dataclass

import numpy as np

from calib.cache import Cache
from calib.cache.index import ClassIndex
from calib.errors import SettingError
from calib.sampling.step import Cycle, Rows, Step
from calib.settings import at_least


@dataclass(frozen=True)
class ClassBatches:
    """Settings of methods that train on class-balanced rows.

    ``rows_per_step``: batch size; ``draws_per_visit``: consecutive rows of a class; ``background_share``: of the rows
    (none given: as in the cache, which keeps the detector's own balance of foreground and background).
    """

    rows_per_step: int = 512
    draws_per_visit: int = 4
    background_share: float | None = None

    def __post_init__(self) -> None:
        at_least(self, 1, "rows_per_step", "draws_per_visit")
        if self.background_share is not None and not 0 <= self.background_share < 1:
            raise SettingError(f"background_share is {self.background_share}: expected a share in [0, 1)")

    def sampler(self, cache: Cache, seed: int) -> "ClassBalancedSampler":
        """The sampler of these settings over the rows of ``cache``."""
        return ClassBalancedSampler(
            ClassIndex.build(cache),
            rows_per_step=self.rows_per_step,
            background_share=self._share(cache),
            draws_per_visit=self.draws_per_visit,
            seed=seed,
        )

    def _share(self, cache: Cache) -> float:
        if self.background_share is not None:
            return self.background_share
        usable = cache.labels[cache.labels >= 0]
        return float(np.mean(usable == cache.background)) if len(usable) else 0.0


class ClassBalancedSampler:
    """``rows_per_step`` rows, ``background_share`` of them background and the rest equally often of every class.

    At least one row is foreground, however large the share: a step without one would teach background only.
    """

    def __init__(
        self,
        index: ClassIndex,
        *,
        rows_per_step: int,
        background_share: float,
        seed: int,
        draws_per_visit: int = 4,
    ) -> None:
        background = index.rows(index.background)
        share = min(round(rows_per_step * background_share), rows_per_step - 1)
        self._n_background = share if len(background) else 0
        self._n_foreground = rows_per_step - self._n_background
        self._classes = Cycle(index.present, seed, 2)
        self._background = Cycle(background, seed, 3)
        self._rows = {int(c): Cycle(index.rows(int(c)), seed, 4, int(c)) for c in index.present}
        self._draws = draws_per_visit
        self.identity = ("class-balanced", rows_per_step, background_share, draws_per_visit, seed)

    def step(self, i: int) -> Step:
        """The i-th stretch of both cycles."""
        background = self._background.take(i * self._n_background, self._n_background)
        rows = np.concatenate([*self._visits(i * self._n_foreground), background])
        return Step(rows, np.zeros(len(rows), np.int64), 1)

    def _visits(self, first: int) -> list[Rows]:
        """Foreground rows at positions first .. first + n_foreground, one part per visited class."""
        if self._n_foreground == 0:
            return []
        last = first + self._n_foreground
        low, high = first // self._draws, (last - 1) // self._draws + 1
        parts = []
        for visit, label in zip(range(low, high), self._classes.take(low, high - low), strict=True):
            # A class is visited once per pass over the classes, so its pass number counts its own draws.
            own = visit // len(self._classes.items) * self._draws
            start, stop = max(first - visit * self._draws, 0), min(last - visit * self._draws, self._draws)
            parts.append(self._rows[int(label)].take(own + start, stop - start))
        return parts
