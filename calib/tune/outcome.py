"""What a search found: every run as a row of Parquet, the trade-off between rare and frequent classes, the choice."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from calib.files import replacing
from calib.layout import CHOSEN_HEAD, TRIALS
from calib.tables import Rows, Tables, percent

from .objective import Metrics, Objective

AVERAGE = "average"  # the method of a trial that is the mean of two others
BASELINE = -1  # the number of the unchanged detector, which is no trial
BASE = -999  # that of the head that a whole study is built on
STACKED = 1000  # trials on the head of another one have numbers from -STACKED down, so many for each, averages between
SHOWN = 10


def number_on(base: int, k: int) -> int:
    """The number of trial ``k`` on the head of trial ``base``."""
    return -(STACKED * (base + 1) + k)


def name_of(trial: int) -> str:
    """What a trial is called: 36, or 36.12, the twelfth on the head of 36."""
    if trial >= 0:
        return str(trial)
    if trial > -STACKED:
        return {BASELINE: "detector", BASE: "base"}.get(trial, f"average-{BASELINE - trial}")
    base, k = divmod(-trial, STACKED)
    return f"{base - 1}.{k}"


@dataclass(frozen=True)
class Row:
    """One training of one trial, built on the head of trial ``base`` where there is one. ``metrics`` are fractions,
    empty where it failed (``error`` says why); ``adjusted``: those after a logit adjustment, where that was tried."""

    trial: int
    method: str
    settings: dict[str, Any]
    steps: int
    seed: int
    metrics: dict[str, float]
    seconds: float
    error: str = ""
    base: int | None = None
    adjusted: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """A trial trained to the end: mean metrics over its ``seeds`` seeds and their deviation (0 for one). ``chain``:
    trial, method and settings of the heads that it is built on, the nearest first; of an average's parts, in turn."""

    trial: int
    method: str
    settings: dict[str, Any]
    steps: int
    seeds: int
    metrics: dict[str, float]
    spread: dict[str, float]
    on_front: bool = False
    is_chosen: bool = False
    chain: tuple[dict[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """Its method, and those that it is built on or made of."""
        if self.method == AVERAGE:
            return f"average of {' and '.join(_parts(self.chain))}"
        return " on ".join([self.method, *(link["method"] for link in self.chain)])


def _parts(chain: Iterable[dict[str, Any]]) -> list[str]:
    """The heads of an average in words; a link whose trial is 14.22 stands on the next one, trial 14."""
    parts: list[str] = []
    is_stacked = False
    for link in chain:
        if is_stacked:
            parts[-1] += f" on {link['method']}"
        else:
            parts.append(link["method"])
        is_stacked = "." in str(link["trial"])
    return parts


@dataclass(frozen=True)
class Result(Tables):
    """The study at ``out``. ``axes`` are the metrics of rare and frequent classes that the front is of; ``base``: those
    of the head that every trial is built on, empty where there is none."""

    out: Path
    objective: str
    axes: tuple[str, str]
    detector: dict[str, float]
    candidates: tuple[Candidate, ...]
    seconds: float
    base: dict[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> Candidate:
        """The one that won."""
        return next(c for c in self.candidates if c.is_chosen)

    @property
    def is_gain(self) -> bool:
        """Whether it is better on the tune split than the unchanged detector, by the objective."""
        objective = Objective.parse(self.objective)
        return objective.value(self.chosen.metrics, self.detector) > objective.value(self.detector, self.detector)

    @property
    def head(self) -> Path:
        """Its head."""
        return self.out / CHOSEN_HEAD

    def record(self) -> dict[str, Any]:
        """As JSON."""
        plain = asdict(self) | {"out": str(self.out), "head": str(self.head)}
        plain["candidates"] = [asdict(c) | {"name": name_of(c.trial), "chain": list(c.chain)} for c in self.candidates]
        return plain | {"axes": list(self.axes)}

    def tables(self) -> list[tuple[str, Rows]]:
        """The candidates, best first, and the detector; AP in percent."""
        names = [n for n in ("AP", "AP1", "AP2", "AP3", "AP4", "APr", "APc", "APf") if self.detector.get(n, -1.0) >= 0]
        shown = [c for k, c in enumerate(self.candidates) if k < SHOWN or c.on_front]
        rows = [
            {"": "*" * c.is_chosen + "F" * c.on_front, "trial": name_of(c.trial), "method": c.label, "seeds": c.seeds}
            | {n: percent(c.metrics[n]) + (f" ±{percent(c.spread[n])}" if c.seeds > 1 else "") for n in names}
            for c in shown
        ]
        last = [
            {"": "", "trial": "", "method": what, "seeds": ""} | {n: percent(metrics[n]) for n in names}
            for what, metrics in (("the base", self.base), ("unchanged detector", self.detector))
            if metrics
        ]
        title = f"tune split, AP %; * chosen, F on the front of {' and '.join(self.axes)}"
        return [(title, [*rows, *last])]


def candidates(
    objective: Objective, detector: Metrics, rows: Sequence[Row], below: Sequence[dict[str, Any]]
) -> list[Candidate]:
    """One per trial, of its runs that ended well; those of most seeds first, then the best. ``below``: the links of
    what all are built on."""
    of = {r.trial: r for r in rows}

    def links(trial: int) -> list[dict[str, Any]]:
        row, settings = of[trial], dict(of[trial].settings)
        above = list(settings.values()) if row.method == AVERAGE else [] if row.base is None else [row.base]
        if row.method == AVERAGE:
            settings = {part: name_of(number) for part, number in settings.items()}
        own = {"trial": name_of(trial), "method": row.method, "settings": settings}
        return [own, *(link for other in above for link in links(other)), *([] if above else below)]

    trials = sorted({r.trial for r in rows if r.metrics})
    found = []
    for trial in trials:
        runs = [r for r in rows if r.trial == trial and r.metrics]
        mean = {k: fmean(r.metrics[k] for r in runs) for k in runs[0].metrics}
        spread = {k: stdev([r.metrics[k] for r in runs]) if len(runs) > 1 else 0.0 for k in mean}
        first = runs[0]
        own, *chain = links(trial)
        settled = (trial, first.method, own["settings"], first.steps, len(runs), mean, spread)
        found.append(Candidate(*settled, chain=tuple(chain)))
    most = max((c.seeds for c in found), default=0)
    return sorted(found, key=lambda c: (c.seeds < most, -objective.value(c.metrics, detector), c.trial))


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point is at least as good in both and better in one."""
    return [not any(x >= a and y >= b and (x > a or y > b) for x, y in points) for a, b in points]


def axes(detector: Metrics) -> tuple[str, str]:
    """Rare and frequent: by the data's own frequencies, else the first and the last bin that has a category."""
    if min(detector.get("APr", -1.0), detector.get("APf", -1.0)) >= 0:
        return "APr", "APf"
    bins = sorted(k for k, v in detector.items() if k.startswith("AP") and len(k) == 3 and k[2].isdigit() and v >= 0)
    return (bins[0], bins[-1]) if bins else ("AP", "AP")


def result(
    out: Path,
    objective: Objective,
    detector: Metrics,
    rows: Sequence[Row],
    seconds: float,
    base: Metrics,
    below: Sequence[dict[str, Any]],
) -> Result:
    """The study's outcome from the runs that went to the end, all built on ``below``, whose metrics are ``base``."""
    found = candidates(objective, detector, rows, below)
    rare, frequent = axes(detector)
    marks = front([(c.metrics[rare], c.metrics[frequent]) for c in found])
    marked = tuple(replace(c, on_front=m, is_chosen=k == 0) for k, (c, m) in enumerate(zip(found, marks, strict=True)))
    return Result(out, objective.text, (rare, frequent), dict(detector), marked, seconds, dict(base))


def write_trials(out: Path, rows: Sequence[Row], objective: Objective, detector: Metrics) -> None:
    """``trials.parquet``: a row per run, the unchanged detector as trial -1; settings as JSON, metrics as fractions."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    ordered = sorted(rows, key=lambda r: (r.trial, r.steps, r.seed))
    names = list(detector)
    columns: dict[str, Any] = {
        "trial": pa.array([r.trial for r in ordered], pa.int64()),
        "name": pa.array([name_of(r.trial) for r in ordered]),
        "base": pa.array([r.base for r in ordered], pa.int64()),
        "method": pa.array([r.method for r in ordered]),
        "steps": pa.array([r.steps for r in ordered], pa.int64()),
        "seed": pa.array([r.seed for r in ordered], pa.int64()),
        "value": pa.array([objective.value(r.metrics, detector) if r.metrics else None for r in ordered], pa.float64()),
        "adjusted": pa.array(
            [objective.value(r.adjusted, detector) if r.adjusted else None for r in ordered], pa.float64()
        ),
        **{n: pa.array([r.metrics.get(n) for r in ordered], pa.float64()) for n in names},
        "settings": pa.array([json.dumps(r.settings, sort_keys=True) for r in ordered]),
        "seconds": pa.array([r.seconds for r in ordered], pa.float64()),
        "error": pa.array([r.error or None for r in ordered], pa.string()),
    }
    with replacing(out / TRIALS) as temporary:
        pq.write_table(pa.table(columns), temporary)
