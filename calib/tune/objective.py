"""What a search maximises: a metric of the evaluation, if wanted under conditions on others.

``AP1 subject to AP4>=-0.5``: the highest AP1 among heads whose AP4 is at most 0.5 points below that of the unchanged
detector. A head that breaks a condition is worth less than every one that keeps all, and the less the more it breaks
it (Deb, "An efficient constraint handling method for genetic algorithms", CMAME 2000), so that a search finds its way
to the allowed ones.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from calib.errors import SettingError

# What an evaluation gives; whether a split has categories of a kind is seen later.
METRICS = ("AP", "bAP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AP1", "AP2", "AP3", "AP4",
           "AR", "ARs", "ARm", "ARl")  # fmt: skip
_METRIC = rf"({'|'.join(METRICS)})"
_FORM = re.compile(rf"\s*{_METRIC}\s*(?:subject to\s+(.*))?")
_CONDITION = re.compile(rf"{_METRIC}\s*>=\s*([+-]?\d+(?:\.\d+)?)")
HINT = 'AP, bAP, AP1 ..., or for example "AP1 subject to AP4>=-0.5 and APf>=-1" (points of change to the detector)'

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Objective:
    """Maximise ``metric``; ``conditions`` are (metric, least change to the unchanged detector in points)."""

    text: str
    metric: str
    conditions: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Objective":
        """Read ``METRIC`` or ``METRIC subject to METRIC>=POINTS [and ...]``.

        Raises:
            SettingError: another form.
        """
        form = _FORM.fullmatch(text)
        if form is None:
            raise SettingError(f"objective is '{text}'", hint=HINT)
        conditions = []
        for part in re.split(r"\s+and\s+|\s*,\s*", form[2].strip()) if form[2] else []:
            condition = _CONDITION.fullmatch(part)
            if condition is None:
                raise SettingError(f"condition '{part}' of the objective is not METRIC>=POINTS", hint=HINT)
            conditions.append((condition[1], float(condition[2])))
        return cls(" ".join(text.split()), form[1], tuple(conditions))

    def check(self, detector: Metrics) -> None:
        """Raise SettingError where the split has no such metric."""
        for name in (self.metric, *(metric for metric, _ in self.conditions)):
            if detector.get(name, -1.0) < 0:
                known = ", ".join(k for k, v in detector.items() if v >= 0)
                raise SettingError(f"objective '{self.text}': the tune cache has no {name}", hint=f"it has {known}")

    def violation(self, metrics: Metrics, detector: Metrics) -> float:
        """By how much the conditions are broken in all, as a fraction; 0 if none is."""
        return sum(max(0.0, points / 100 - (metrics[name] - detector[name])) for name, points in self.conditions)

    def value(self, metrics: Metrics, detector: Metrics) -> float:
        """The metric, at least 0; below 0 where a condition is broken."""
        broken = self.violation(metrics, detector)
        return -broken if broken > 0 else metrics[self.metric]
