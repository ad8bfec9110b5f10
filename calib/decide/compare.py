"""Heads side by side on one labelled cache: metrics with intervals, who wins and loses where, where they agree."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.cache import Cache
from calib.decide.assess import Assessment
from calib.errors import SettingError
from calib.evaluate import Detections, Evaluation, Rescored
from calib.evaluate.bootstrap import Interval, check_replicates, draw, interval
from calib.evaluate.outcome import outcomes
from calib.evaluate.select import Caps
from calib.heads.base import Head
from calib.progress import Progress, silent
from calib.score.opened import open_heads
from calib.tables import Tables, percent


@dataclass(frozen=True)
class Change:
    """AP of one category under the first head and under another, as fractions."""

    category_id: int
    name: str
    instance_count: int | None
    objects: int
    first: float
    other: float

    @property
    def gain(self) -> float:
        """``other`` - ``first``."""
        return self.other - self.first


@dataclass(frozen=True)
class Agreement:
    """Shares. ``same_class``: of proposals that both give the same best class (background too), ``same_foreground``:
    of those that lie on an object. ``both``, ``only_first``, ``only_other``, ``neither``: of the objects, found at IoU
    0.5 within the cap."""

    same_class: float
    same_foreground: float
    both: float
    only_first: float
    only_other: float
    neither: float


@dataclass(frozen=True)
class Comparison(Tables):
    """``metrics`` of every head, ``differences`` to the first; changes and agreement of every head but the first."""

    names: tuple[str, ...]
    max_detections: int
    metrics: tuple[dict[str, Interval], ...]
    differences: tuple[dict[str, Interval], ...]
    changes: tuple[tuple[Change, ...], ...]  # of every category with objects, the greatest gain first
    agreement: tuple[Agreement, ...]

    def tables(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """Titles and rows, AP in percent with 95 % intervals."""
        shown = [(f"AP %, at most {self.max_detections} detections per image", self._rows(self.names, self.metrics))]
        shown += [(f"difference to {self.names[0]}", self._rows(self.names[1:], self.differences))]
        for name, changes in zip(self.names[1:], self.changes, strict=True):
            rows = [_change(c) for c in (*changes[:5], *changes[-5:][max(0, 10 - len(changes)) :])]
            shown.append((f"{name} against {self.names[0]}: greatest gains and losses", rows))
        rows = [
            {"head": name, **{k: percent(v) for k, v in asdict(a).items()}}
            for name, a in zip(self.names[1:], self.agreement, strict=True)
        ]
        return [*shown, (f"agreement with {self.names[0]}, %: classes of proposals, then objects found", rows)]

    def _rows(self, names: Sequence[str], metrics: Sequence[dict[str, Interval]]) -> list[dict[str, Any]]:
        return [
            {"head": name} | {k: f"{percent(v.difference)} ({percent(v.low)}, {percent(v.high)})" for k, v in f.items()}
            for name, f in zip(names, metrics, strict=True)
        ]

    def record(self) -> dict[str, Any]:
        """As JSON, fractions."""
        metrics = [{k: {"value": v.difference, "low": v.low, "high": v.high} for k, v in f.items()}
                   for f in self.metrics]  # fmt: skip
        others = [
            {
                "difference": {k: asdict(v) for k, v in d.items()},
                "changes": [asdict(c) | {"gain": c.gain} for c in changes],
                "agreement": asdict(agreement),
            }
            for d, changes, agreement in zip(self.differences, self.changes, self.agreement, strict=True)
        ]
        heads = [f | {"to": self.names[0], **o} for f, o in zip(metrics[1:], others, strict=True)]
        return dict(zip(self.names, [metrics[0], *heads], strict=True))


def compare(
    heads: Sequence[Path],
    cache: Path | Cache,
    *,
    max_detections: int | None = None,
    replicates: int = 1000,
    seed: int = 0,
    progress: Progress = silent,
) -> Comparison:
    """Judge ``heads`` on ``cache`` and set the others against the first.

    Raises:
        SettingError: fewer than two heads, or than 10 replicates. InputError: heads of another detector.
        UnsupportedError, MissingFileError: a cache of training mode, or without annotations.
    """
    if len(heads) < 2:
        raise SettingError(f"{len(heads)} heads: expected at least two to compare")
    check_replicates(replicates)
    opened = open_heads(heads, cache, max_detections=max_detections)
    assessment, nms = Assessment(opened.cache), opened.nms
    found = [assessment.found(a.head, nms, progress=progress) for a in opened.artifacts]
    cap = assessment.limit(nms)
    drawn = draw(assessment.evaluator, found, replicates=replicates, max_detections=cap, seed=seed, progress=progress)
    evaluations = [assessment.evaluator.evaluate(f, max_detections=cap) for f in found]
    known = [k for k, values in drawn[0].items() if not np.isnan(values[0])]
    return Comparison(
        names_of(heads),
        nms.max_detections,
        tuple({k: _sure(d[k]) for k in known} for d in drawn),
        tuple({k: _sure(d[k] - drawn[0][k]) for k in known} for d in drawn[1:]),
        tuple(_changes(evaluations[0], e) for e in evaluations[1:]),
        _agreements(assessment, [a.head for a in opened.artifacts], found, cap),
    )


def names_of(heads: Sequence[Path]) -> tuple[str, ...]:
    """MODELS/NAME/VERSION -> NAME, with the version where a name comes twice, else the whole path."""
    paths = [path.resolve() for path in heads]
    for form in (lambda p: p.parent.name, lambda p: f"{p.parent.name}/{p.name}", str):
        names = tuple(form(p) for p in paths)
        if len(set(names)) == len(names):
            return names
    raise SettingError("a head is named twice", hint="name each once")


def _sure(values: NDArray[np.float64]) -> Interval:
    found = interval(values, centred=True)
    assert found is not None  # what exists on all images exists in most draws
    return found


def _changes(first: Evaluation, other: Evaluation) -> tuple[Change, ...]:
    counts = first.instance_count
    changes = [
        Change(
            int(first.category_ids[c]),
            first.names[c],
            None if counts is None else int(counts[c]),
            int(first.n_gt[c]),
            float(first.AP[c]),
            float(other.AP[c]),
        )
        for c in np.flatnonzero(first.AP > -1)
    ]
    return tuple(sorted(changes, key=lambda c: (-c.gain, c.category_id)))


def _agreements(
    assessment: Assessment, heads: Sequence[Head], found: Sequence[Detections | Rescored], cap: int
) -> tuple[Agreement, ...]:
    cache, evaluator = assessment.cache, assessment.evaluator
    counts = ~evaluator.truth.is_ignored
    on_object = (assessment.labels >= 0) & (assessment.labels != cache.background)
    classes, hits = [], []
    for head, one in zip(heads, found, strict=True):
        judged = outcomes(evaluator, one, Caps(cap), 0.5)
        hit = np.zeros(len(counts), np.bool_)
        hit[judged.object[judged.is_true]] = True
        classes.append(assessment.predicted(head))
        hits.append(hit[counts])
    first, hit = classes[0], hits[0]
    return tuple(
        Agreement(
            _share(c == first),
            _share((c == first)[on_object]),
            _share(h & hit),
            _share(hit & ~h),
            _share(h & ~hit),
            _share(~h & ~hit),
        )
        for c, h in zip(classes[1:], hits[1:], strict=True)
    )


def _share(is_so: NDArray[np.bool_]) -> float:
    return float(is_so.mean()) if len(is_so) else 0.0


def _change(c: Change) -> dict[str, Any]:
    return {
        "category": c.name,
        "training instances": "" if c.instance_count is None else c.instance_count,
        "objects": c.objects,
        "first": percent(c.first),
        "other": percent(c.other),
        "gain": f"{100 * c.gain:+.1f}",
    }
