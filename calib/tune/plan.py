"""What a search is asked for."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.errors import SettingError

from .outcome import STACKED

KEEP = 4  # one trial in so many goes on, to so many times the steps


@dataclass(frozen=True)
class Plan:
    """What is searched for and how long: ``trials``, or ``seconds`` of wall time (one of them).

    ``steps`` is the length of the longest trainings, ``finalists`` heads are trained from ``seeds`` seeds each.
    On each of the ``bases`` best learned heads, of different methods, the methods that only transform scores are tried
    ``stacked`` times in all. ``average``: averages of the best heads take part; they cost two heads when serving.
    ``max_detections`` None means the detector's own cap. ``base``: a fitted head, which every trial is built on.
    """

    objective: str = "AP"
    methods: tuple[str, ...] = ()
    trials: int | None = None
    seconds: float | None = None
    steps: int = 4500
    finalists: int = 3
    seeds: int = 3
    bases: int = 3
    stacked: int = 36
    average: bool = True
    seed: int = 0
    max_detections: int | None = None
    space: Path | None = None
    base: Path | None = None

    def __post_init__(self) -> None:
        if (self.trials is None) == (self.seconds is None):
            raise SettingError("the budget is a number of trials or a time", hint="--budget 100, or --budget 20m")
        for name in ("trials", "seconds", "steps", "finalists", "seeds", "bases", "stacked", "seed"):
            value, low = getattr(self, name), int(name not in ("bases", "seed"))
            if value is not None and value < low:
                option = "budget" if name in ("trials", "seconds") else name
                raise SettingError(f"{name} is {value}: expected at least {low}", hint=f"the option --{option}")
        if self.stacked >= STACKED:
            raise SettingError(f"stacked is {self.stacked}: expected less than {STACKED}")

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
        if int(trials[1]) == 0:
            raise SettingError("a budget of 0 trials finds nothing", hint="--budget 20m, or --budget 100")
        return {"trials": int(trials[1])}
    raise SettingError(
        f"budget is '{text}': expected a time or a number of trials", hint="--budget 20m, or --budget 100"
    )
