"""Per class, on a tune split: which head scores it best, and from which score on its detections are good enough.

A class with three objects says little about itself. Both decisions lean on the class's bin of training instances: what
was measured on n objects of the class counts n, what was measured on the bin counts ``strength``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calib.artifact import Artifact, check_free, save
from calib.cache import Cache
from calib.decide.assess import Assessment
from calib.errors import InputError, SettingError
from calib.evaluate import DEFAULT_BINS, bin_index
from calib.evaluate.outcome import outcomes
from calib.evaluate.select import Caps
from calib.heads.per_class import PerClassHead, ThresholdHead
from calib.score.opened import open_heads
from calib.tables import Rows, Tables, percent

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Selection(Tables):
    """Heads with the number of classes that take each, per bin; AP on the tune split (which chose: it is kind)."""

    heads: tuple[str, ...]
    default: str
    classes: tuple[tuple[int, ...], ...]  # [heads][bins]
    AP: tuple[float, ...]
    selected: float

    def tables(self) -> list[tuple[str, Rows]]:
        """A row per head."""
        rows = [
            {"head": h, "AP": percent(ap), "classes": sum(n), **{f"of bin {b + 1}": k for b, k in enumerate(n)}}
            for h, ap, n in zip(self.heads, self.AP, self.classes, strict=True)
        ]
        blank = dict.fromkeys(rows[0], "")
        return [("tune split", [*rows, blank | {"head": "selected", "AP": percent(self.selected)}])]


def select(
    heads: Sequence[Path],
    tune: Cache,
    out: Path,
    *,
    strength: float = 20.0,
    max_detections: int | None = None,
    overwrite: bool = False,
) -> tuple[Artifact, Selection]:
    """Give every class the head that serves it best on ``tune`` and write them as one head to ``out``.

    The head of the highest AP is the default. A class's gain under another head is averaged with the mean gain of its
    bin, by its objects and ``strength``; it moves if the greatest of these is above 0. Heads should have comparable
    scores (``calib calibrate``): classes compete for the places of an image.

    Raises:
        SettingError: fewer than two heads, or a negative strength. InputError: heads of other detectors.
        UnsupportedError: heads of other inputs, or a cache of training mode. ExistsError: ``out`` exists.
    """
    if len(heads) < 2 or not strength >= 0:
        raise SettingError(f"expected at least two heads and a strength of at least 0, got {len(heads)} and {strength}")
    check_free(out, overwrite=overwrite)
    opened = open_heads(heads, tune, max_detections=max_detections)
    artifacts, assessment, nms = opened.artifacts, Assessment(tune), opened.nms
    ap = []
    for artifact in artifacts:
        evaluation = assessment.evaluate(assessment.found(artifact.head, nms), nms)
        ap.append(evaluation.AP)
    n_gt = np.maximum(evaluation.n_gt, 0)
    table = np.stack(ap)  # [H, categories]
    mean = [float(row[row > -1].mean()) if (row > -1).any() else -1.0 for row in table]
    default = int(np.argmax(mean))
    counts = np.asarray(tune.categories.instance_count)
    of_bin = bin_index(counts, DEFAULT_BINS)
    gain, objects = np.zeros((len(heads), len(counts))), np.zeros(len(counts))
    has = (assessment.class_of >= 0) & (table[0] > -1)
    gain[:, assessment.class_of[has]] = (table - table[default])[:, has]
    objects[assessment.class_of[has]] = n_gt[has]
    choice = _choice(gain, objects, of_bin, strength, default)
    order = [default, *(k for k in range(len(heads)) if k != default)]  # the first gives background
    head = PerClassHead([artifacts[k].head for k in order], torch.from_numpy(np.argsort(order)[choice]))
    settings = {"strength": strength, "heads": [artifacts[k].part() for k in order], "choice": choice.tolist()}
    info = replace(artifacts[default].info, method="select", settings=settings, losses=[], base=[])
    result = Artifact(head.eval(), info)
    save(out, result, overwrite=overwrite)
    found = assessment.evaluate(assessment.found(head, nms), nms)
    numbers = tuple(tuple(int(((choice == k) & (of_bin == b)).sum()) for b in range(len(DEFAULT_BINS) + 1))
                    for k in range(len(heads)))  # fmt: skip
    names = tuple(str(p) for p in heads)
    return result, Selection(names, names[default], numbers, tuple(mean), float(found.summary()["AP"]))


def _choice(gain: Floats, objects: Floats, of_bin: NDArray[np.int64], strength: float, default: int) -> Any:
    """Head of every class from gains [H, C] over the default. [C]"""
    usual = np.zeros_like(gain)
    for b in np.unique(of_bin):
        members = of_bin == b
        seen = members & (objects > 0)
        if seen.any():
            usual[:, members] = gain[:, seen].mean(axis=1, keepdims=True)
    weight = objects + strength
    worth = np.where(weight > 0, (objects * gain + strength * usual) / np.maximum(weight, 1e-9), 0.0)
    best = worth.argmax(axis=0)
    return np.where(worth.max(axis=0) > 0, best, default)


@dataclass(frozen=True)
class Thresholds(Tables):
    """Thresholds of all classes, and what is left of the tune split's detections. ``missed`` are the ids of categories
    that do not reach the target: for a precision their threshold is the highest score seen, for a recall 0."""

    target: str
    threshold: tuple[float, ...]
    missed: tuple[int, ...]
    precision: float
    recall: float
    kept: int
    detections: int

    def tables(self) -> list[tuple[str, Rows]]:
        """One row."""
        low, middle, high = np.quantile(self.threshold, (0.1, 0.5, 0.9))
        return [
            (
                f"thresholds for {self.target}, tune split",
                [
                    {
                        "detections": self.detections,
                        "kept": self.kept,
                        "precision": percent(self.precision),
                        "recall": percent(self.recall),
                        "threshold (10, 50, 90 % of classes)": f"{low:.3g}, {middle:.3g}, {high:.3g}",
                        "missed by": f"{len(self.missed)} classes",
                    }
                ],
            )
        ]


def set_thresholds(
    head: Path,
    tune: Cache,
    out: Path,
    *,
    precision: float | None = None,
    recall: float | None = None,
    strength: float = 20.0,
    max_detections: int | None = None,
    overwrite: bool = False,
) -> tuple[Artifact, Thresholds]:
    """Give every class the lowest threshold at which ``precision`` is reached, or the highest that keeps ``recall``, at
    IoU 0.5 on ``tune``; write the head with its thresholds to ``out``.

    Raises:
        SettingError: not one of the two targets, or outside (0, 1]. InputError, UnsupportedError, ExistsError: as
        ``select``.
    """
    target = recall if precision is None else precision
    if (precision is None) == (recall is None) or target is None:
        raise SettingError("the target is a precision or a recall: give one of them")
    if not 0 < target <= 1 or not 0 <= strength < np.inf:
        raise SettingError(f"the target is {target}, strength {strength}: expected a target in (0, 1], strength >= 0")
    check_free(out, overwrite=overwrite)
    opened = open_heads([head], tune, max_detections=max_detections)
    (artifact,), assessment, nms = opened.artifacts, Assessment(tune), opened.nms
    evaluator = assessment.evaluator
    judged = outcomes(evaluator, assessment.found(artifact.head, nms), Caps(assessment.limit(nms)), 0.5)
    rows = np.flatnonzero(judged.is_true | judged.is_false)
    if not len(rows):
        raise InputError(f"head {head} detects nothing on {tune.path}")
    score, is_true = judged.ranked.score[rows], judged.is_true[rows]
    label = assessment.class_of[judged.ranked.category[rows]]
    objects = np.zeros(len(tune.categories))
    has = assessment.class_of >= 0
    objects[assessment.class_of[has]] = evaluator.objects.n[has, 0]
    of_bin = bin_index(np.asarray(tune.categories.instance_count), DEFAULT_BINS)
    threshold, missed = np.zeros(len(objects)), []
    for b in np.unique(of_bin):
        members = np.flatnonzero(of_bin == b)
        inside = np.isin(label, members)
        usual = _Curve(score[inside], is_true[inside], objects[members].sum())
        for c in members:
            own = _Curve(score[label == c], is_true[label == c], objects[c])
            threshold[c], reached = _threshold(own, usual, strength, target, by_precision=recall is None)
            if not reached:
                missed.append(int(tune.categories.category_id[c]))
    wrapped = ThresholdHead(artifact.head, torch.from_numpy(threshold.astype(np.float32)))
    wanted = f"{'precision' if recall is None else 'recall'} {target:g}"
    settings = {"target": wanted, "strength": strength, "head": artifact.part()}
    info = replace(artifact.info, method="threshold", settings=settings, losses=[], base=artifact.chain())
    result = Artifact(wrapped.eval(), info)
    save(out, result, overwrite=overwrite)
    kept = score > threshold.astype(np.float32)[label]
    true = float(is_true[kept].sum())
    return result, Thresholds(
        wanted,
        tuple(threshold.tolist()),
        tuple(missed),
        true / max(int(kept.sum()), 1),
        true / max(float(objects.sum()), 1.0),
        int(kept.sum()),
        len(score),
    )


class _Curve:
    """Detections of some classes by score: how many, and how many true ones, lie above a threshold."""

    def __init__(self, score: Floats, is_true: NDArray[np.bool_], objects: float) -> None:
        order = np.argsort(score)
        self.score, self.objects = score[order], objects
        self._true_below = np.concatenate([[0], np.cumsum(is_true[order])])

    def above(self, t: Floats) -> tuple[Floats, Floats]:
        """Numbers of detections and of true ones with greater scores."""
        at = np.searchsorted(self.score, t, side="right")
        return (len(self.score) - at).astype(float), (self._true_below[-1] - self._true_below[at]).astype(float)


def _threshold(own: _Curve, usual: _Curve, strength: float, target: float, *, by_precision: bool) -> tuple[float, bool]:
    """The threshold of a class, and whether it reaches the target there."""
    if not len(usual.score):
        return 0.0, False
    grid = np.quantile(usual.score, np.linspace(0, 1, 101)[:-1])
    t = np.unique(np.concatenate([[0.0], np.nextafter(own.score.astype(np.float32), np.float32(0)), grid]))
    (n, true), (all_, all_true) = own.above(t), usual.above(t)
    if by_precision:
        share = (true + strength * all_true / np.maximum(all_, 1)) / np.maximum(n + strength, 1e-9)
        good = np.flatnonzero((share >= target) & (n + all_ > 0))
        return (float(t[good[0]]), True) if len(good) else (float(t[-1]), False)
    share = (true + strength * all_true / max(usual.objects, 1.0)) / max(own.objects + strength, 1e-9)
    good = np.flatnonzero(share >= target)
    return (float(t[good[-1]]), True) if len(good) else (0.0, False)
