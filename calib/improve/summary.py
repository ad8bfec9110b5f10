"""What came of a run: ``summary.json``, and the same as tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib import __version__
from calib.files import write_json
from calib.improve.request import CALIBRATED, CHOSEN, CONTROL, DETECTOR, NAMES, Request
from calib.improve.steps import Record, Steps
from calib.improve.table import Table
from calib.tables import Rows, Tables, percent
from calib.tune.objective import Objective

SHOWN = ("AP", "AP1", "AP2", "AP3", "AP4", "APr", "APc", "APf")
RARE = "AP1"  # categories of fewer than ten training instances
BETTER, WORSE, UNDECIDED = "better", "worse", "not told apart"


@dataclass(frozen=True)
class Summary(Tables):
    """Of the run at ``out``; ``record`` is what ``summary.json`` holds. ``done``: steps that this call did."""

    out: Path
    record: dict[str, Any]
    done: tuple[str, ...]

    @property
    def table(self) -> Table:
        """That of the heads with fixed settings; only where one was asked for."""
        return Table.of(self.record["table"])

    def tables(self) -> list[tuple[str, Rows]]:
        """Metrics of the four heads, and their differences to the control with 95 % intervals; in percent."""
        results = self.record["results"]
        names = [k for k in SHOWN if results[CONTROL].get(k) is not None]
        metrics = [{"head": n, **{k: percent(results[n][k]) for k in names}, "D-ECE": percent(results[n]["D-ECE"])}
                   for n in NAMES]  # fmt: skip
        baseline = self.record["baseline"]
        gains = [{"head": n, **{k: _interval(results[n]["difference_to_control"].get(k)) for k in names}}
                 for n in NAMES if n != baseline]  # fmt: skip
        split = self.record["judged_on"]["split"]
        return [(f"judged on {split}, AP %", metrics), (f"difference to {baseline}", gains)]


def _interval(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    return f"{100 * found['difference']:+.1f} ({100 * found['low']:+.1f}, {100 * found['high']:+.1f})"


def summarise(request: Request, found: dict[str, Record], steps: Steps) -> Summary:
    """Write ``summary.json``."""
    record = {
        "calib": __version__,
        "detector": request.detector.spec,
        "objective": request.search.objective,
        "budget": request.search.budget,
        "seed": request.search.seed,
        "chosen": found["search"] | found[CHOSEN] if found[CHOSEN]["from"] == "search" else found[CHOSEN],
        "judged_on": _judged_on(request),
        **outcome(request, found),
        "conclusions": conclusions(request, found),
        "results": found["judge"],
        "confidence": found[CALIBRATED],
        "control": found["control"],
        "ceiling": {k: v for k, v in found["ceiling"].items() if k != "warnings"},
        "caches": {k: found[k] for k in ("train", "tune", "val") if k in found},
        "export": found["export"],
        "report": found["report"],
        "doctor": found["doctor"]["report"] if "doctor" in found else None,
        "table": found.get("table"),
        "seconds": steps.seconds,
    }
    record["warnings"] = warnings(record, found)
    write_json(request.folder.summary, record)
    return Summary(request.out, record, tuple(steps.done))


def outcome(request: Request, found: dict[str, Record]) -> Record:
    """Which head stands for what was found, its gain over the control, and which head to serve."""
    metric = Objective.parse(request.search.objective).metric
    # Of several heads, one per fold, the scores are comparable once they say how often a detection is right.
    judged = CALIBRATED if request.data.is_crossed else CHOSEN
    gains = found["judge"][judged]["difference_to_control"]
    metric = metric if metric in gains else "AP"
    gain = gains.get(metric)
    serve = judged if verdict(gain) == BETTER else DETECTOR
    return {"judged": judged, "baseline": request.baseline, "metric": metric, "gain": gain, "verdict": verdict(gain),
            "serve": serve}  # fmt: skip


def conclusions(request: Request, found: dict[str, Record]) -> list[str]:
    """The outcome in words: what was chosen and what it gains, what to serve, what becomes of rare categories."""
    came = outcome(request, found)
    chosen = found["search"]["label"] if found[CHOSEN]["from"] == "search" else found[CHOSEN]["from"]
    lines = [
        f"chosen: {chosen}. {came['judged']} against {came['baseline']} on {request.data.val.name}: "
        f"{came['metric']} {_interval(came['gain'])} points, {came['verdict']}"
    ]
    if came["verdict"] == BETTER:
        lines.append(f"serve {came['serve']}")
    else:
        lines.append(
            f"serve {came['serve']}, as it is: no head was found that is surely better than the control; a larger "
            "--budget searches longer, --objective for what matters to you"
        )
    rare = found["judge"][came["judged"]]["difference_to_control"].get(RARE)
    if rare is not None and verdict(rare) != BETTER and came["metric"] != RARE:
        word = "worse" if verdict(rare) == WORSE else "not surely better"
        lines.append(
            f"rare categories are {word}: {RARE} {_interval(rare)} points; --objective {RARE}, or "
            f'"{RARE} subject to AP>=0", chooses for them'
        )
    return lines


def verdict(gain: dict[str, float] | None) -> str:
    """Of the chosen head against the control: whether the interval of the difference leaves 0 out."""
    if gain is None:
        return UNDECIDED
    return BETTER if gain["low"] > 0 else WORSE if gain["high"] < 0 else UNDECIDED


def _judged_on(request: Request) -> dict[str, Any]:
    data = request.data
    if not data.is_crossed:
        return {"split": data.val.name, "how": "chosen on tune, judged on test", "chosen_on": data.choosing.name}
    how = (
        f"{request.folds} folds: the detections of each fold are those of a head that was searched for, chosen and "
        f"calibrated on the other images alone, with the same share of the budget; the head in models/{CHOSEN} was "
        "found in the same way on all images, and the metrics are of the way it was found; the gain is that of "
        "calibrated scores, which are comparable between folds"
    )
    return {"split": data.val.name, "how": how, "chosen_on": data.choosing.name, "folds": request.folds}


def warnings(record: dict[str, Any], found: dict[str, Record]) -> list[str]:
    """What a reader must know, the gravest first."""
    lines = []
    if record["chosen"]["from"] != "search":
        lines.append(f"no head that was searched for beats the {record['chosen']['from']} on the split it is chosen on")
    lines += found["ceiling"]["warnings"]
    lines += found["doctor"]["warnings"] if "doctor" in found else []
    if record["confidence"]["maps"] is None:
        lines.append(f"every calibration of confidence cost AP: models/{CALIBRATED} is the chosen head as it is")
    if record["export"]["refused"]:
        lines += [f"the chosen head does not go to {to}: {why}" for to, why in record["export"]["refused"].items()]
    if record["report"]["report"] is None:
        lines.append(f"no report: {record['report']['why']}")
    return lines
