"""The heads of a run: the detector as it is, the control, the chosen one, and that one with calibrated confidence."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calib.artifact import load, save
from calib.cache import Cache
from calib.decide.assess import Assessment
from calib.decide.confidence import Confidence, calibrate
from calib.files import write_text
from calib.improve.request import DETECTOR, Request, Search
from calib.progress import Progress
from calib.score.opened import open_heads
from calib.training import train
from calib.tune.objective import Objective
from calib.tune.outcome import Result
from calib.tune.plan import Plan
from calib.tune.search import tune

# The control is the detector's own layer trained on, without any balancing: rate and decay are all that is searched.
CONTROL_SPACE = """[natural]
set = { sampling = "natural" }
lr = { log = [0.01, 2.0] }
weight_decay = { log = [1e-06, 0.001] }
"""
MAPS = ("platt", "temperature", "isotonic")
SAME = 1e-9  # AP that differs by less is the same

Note = Callable[[str], None]


def detector_head(cache: Path, out: Path) -> dict[str, Any]:
    """The detector's own classifier as a head."""
    return {"digest": train("softmax", cache, out, overwrite=True).digest()}


def control(request: Request, caches: tuple[Path, Path], out: Path, head: Path, progress: Progress, note: Note) -> Any:
    """Search rate and decay of ``natural`` on (train, tune) in the study ``out``; the best goes to ``head``."""
    space = out.with_suffix(".toml")
    write_text(space, CONTROL_SPACE)
    wanted = request.search
    plan = Plan(
        wanted.objective, ("natural",), trials=wanted.control_trials, steps=wanted.steps, finalists=1, seeds=1,
        bases=0, average=False, seed=wanted.seed, space=space, max_detections=wanted.max_detections,
    )  # fmt: skip
    found = _tuned(request, caches, out, plan, progress, note)
    return _kept(found.head, head) | {"settings": found.chosen.settings}


def searched(request: Request, caches: tuple[Path, Path], out: Path, progress: Progress, note: Note) -> dict[str, Any]:
    """Search over methods, what is stacked on them, and averages, in the study ``out``."""
    found = _tuned(request, caches, out, request.search.plan(request.searches), progress, note)
    chosen = found.chosen
    more = {"label": chosen.label, "settings": chosen.settings, "chain": list(chosen.chain), "seeds": chosen.seeds}
    return {"digest": load(found.head).digest(), "candidates": len(found.candidates)} | more


def _tuned(
    request: Request, caches: tuple[Path, Path], out: Path, plan: Plan, progress: Progress, note: Note
) -> Result:
    return tune(*caches, out, plan, processes=request.processes, device=request.place, progress=progress, note=note)


def choose(found: Path, others: Sequence[Path], cache: Path, search: Search, out: Path) -> dict[str, Any]:
    """Write the best on ``cache`` of ``others`` (the detector first) and the head ``found``; of equals the first."""
    heads = {**{path.parent.name: path for path in others}, "search": found}
    opened = open_heads(list(heads.values()), cache, max_detections=search.max_detections)
    assessment, nms = Assessment(opened.cache), opened.nms
    metrics = {}
    for name, artifact in zip(heads, opened.artifacts, strict=True):
        summary = assessment.evaluate(assessment.found(artifact.head, nms), nms).summary()
        metrics[name] = {k: float(v) for k, v in summary.items() if not k.startswith("n")}
    goal = Objective.parse(search.objective)
    values = {name: goal.value(own, metrics[DETECTOR]) for name, own in metrics.items()}
    best = max(values, key=lambda name: values[name])
    return _kept(heads[best], out) | {"from": best, "values": values}


def with_confidence(head: Path, cache: Path, out: Path) -> dict[str, Any]:
    """Write ``head`` with the first of MAPS that leaves AP as it is, so that its scores say how often it is right.

    Where all of them cost AP the head is written as it is, and ``maps`` is None.
    """
    opened = Cache(cache)
    for kind in MAPS:
        artifact, (change,) = calibrate(head, opened, out, Confidence(kind), overwrite=True)
        if change.after["AP"] >= change.before["AP"] - SAME:
            return {"digest": artifact.digest(), "maps": kind, "before": change.before, "after": change.after}
    return _kept(head, out) | {"maps": None}


def _kept(head: Path, out: Path) -> dict[str, Any]:
    artifact = load(head)
    save(out, artifact, overwrite=True)
    return {"digest": artifact.digest(), "method": artifact.info.method}
