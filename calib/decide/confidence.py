"""Confidence calibration on a tune split: scores that say how often a detection is right.

Balanced heads rank well and lie about certainty. An increasing map per group of classes (all, a bin of training
instances, or each class) mends that without a change of order within a class. Maps of bins and classes are drawn
towards the map of all by ``strength`` detections' worth of evidence, so that a class with three detections has nearly
the map of all. Letters: K detections, G groups.

Platt and temperature maps minimise the log loss of smoothed targets; isotonic ones are scikit-learn's, with every flat
stretch shrunk to its centre and straight lines between (Oron and Flournoy, "Centered Isotonic Regression", 2017):
they stay strictly increasing, and ties would change AP.

Maps by box size (``by=size``) may change the order within a class, which is their point: Gilg et al., "The Box Size
Confidence Bias Harms Your Object Detector", WACV 2023. Sizes are equal numbers of detections by area; the paper's own
map is ``histogram``: straight lines between the mean score and the precision of equal numbers of detections, (0, 0) and
(1, 1). It fits every class by itself, here all share the maps, drawn towards that of all sizes. Numbers of sizes and
score bins are settings; the paper chooses them by cross-validation.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit

from calib.artifact import Artifact, check_free, save
from calib.cache import Cache
from calib.decide.assess import Assessment
from calib.errors import FitError, InputError, SettingError
from calib.evaluate import DEFAULT_BINS, bin_index
from calib.evaluate.calibration import calibration, reliability
from calib.evaluate.outcome import outcomes
from calib.evaluate.select import Caps
from calib.heads.base import Head
from calib.heads.by_size import BySizeHead
from calib.heads.calibrated import CalibratedHead
from calib.score.opened import open_heads
from calib.settings import Nms, at_least, one_of
from calib.tables import Rows, Tables

KNOTS = 32
MOST_STRENGTH = 1e9  # maps of groups are then those of all
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Confidence:
    """How scores are calibrated: ``target`` precision (share of true detections at IoU 0.5) or iou (their mean overlap,
    which LaECE asks for); ``sizes``, ``score_bins``: of maps by size, and of the histogram."""

    method: str = "platt"
    by: str = "pooled"
    target: str = "precision"
    strength: float = 100.0
    sizes: int = 4
    score_bins: int = 10

    def __post_init__(self) -> None:
        one_of(self, "method", ("temperature", "platt", "isotonic", "histogram"))
        one_of(self, "by", ("pooled", "bin", "class", "size"))
        at_least(self, 1, "sizes", "score_bins")
        if self.method == "histogram" and self.by != "size":
            raise SettingError("a histogram's map may fall: it is for boxes by size", hint="--by size, or isotonic")
        one_of(self, "target", ("precision", "iou"))
        at_least(self, 0, "strength")
        if self.strength > MOST_STRENGTH:
            raise SettingError(f"strength is {self.strength:g}: expected at most {MOST_STRENGTH:g}", hint="--by pooled")


@dataclass(frozen=True)
class Before(Tables):
    """Metrics of a head on one cache without and with its maps: D-ECE, LaECE, AP ..., and reliability per score bin."""

    cache: str
    before: dict[str, float]
    after: dict[str, float]
    reliability_before: list[dict[str, Any]]
    reliability_after: list[dict[str, Any]]

    def tables(self) -> list[tuple[str, Rows]]:
        """Both in percent."""
        rows = [
            {"scores": name, **{k: "-" if v < 0 else f"{100 * v:.2f}" for k, v in metrics.items()}}
            for name, metrics in (("before", self.before), ("after", self.after))
        ]
        return [(f"{self.cache}, %", rows)]


def calibrate(
    head: Path,
    tune: Cache,
    out: Path,
    how: Confidence,
    *,
    judge: Cache | None = None,
    max_detections: int | None = None,
    overwrite: bool = False,
) -> tuple[Artifact, list[Before]]:
    """Fit maps for ``head`` on its detections on ``tune``, write head and maps to ``out``; what it did on ``tune`` and,
    if given, on ``judge``.

    Raises:
        InputError: a head of another detector, or without detections on ``tune``. UnsupportedError, MissingFileError: a
        cache of training mode or without annotations. ExistsError: ``out`` exists. FitError: the fit of a map does not
        converge.
    """
    check_free(out, overwrite=overwrite)
    caches = [tune, *([judge] if judge else [])]
    opened = [open_heads([head], cache, max_detections=max_detections) for cache in caches]
    (artifact,), nms = opened[0].artifacts, opened[0].nms
    assessments = [Assessment(cache) for cache in caches]
    mapped = fitted(artifact.head, assessments[0], nms, how)
    settings = {"confidence": vars(how), "head": {"method": artifact.info.method, "settings": artifact.info.settings}}
    info = replace(artifact.info, method="calibrate", settings=settings, losses=[], base=artifact.chain())
    result = Artifact(mapped, info)
    save(out, result, overwrite=overwrite)
    return result, [_change(a, artifact.head, mapped, nms) for a in assessments]


def fitted(head: Head, assessment: Assessment, nms: Nms, how: Confidence) -> Head:
    """``head`` with maps fitted on what it detects in the assessment's cache."""
    judged = outcomes(assessment.evaluator, assessment.found(head, nms), Caps(assessment.limit(nms)), 0.5)
    rows = np.flatnonzero((judged.is_true | judged.is_false) & (judged.ranked.score > 0))
    if not len(rows):
        raise InputError(f"the head detects nothing on {assessment.cache.path}", hint="a lower score threshold?")
    score = judged.ranked.score[rows]
    target = np.where(judged.is_true, 1.0 if how.target == "precision" else judged.iou, 0.0)[rows]
    maps = {"isotonic": _isotonic, "histogram": _histogram}.get(how.method, _logistic)
    form = "logistic" if maps is _logistic else "knots"
    if how.by == "size":
        edges, size = sizes_of(judged.ranked.area[rows], how.sizes)
        one, two, between = _tensors(*maps(score, target, size, len(edges) + 1, how), edges)
        return BySizeHead(head, form, between, one, two).eval().requires_grad_(False)
    label = assessment.class_of[judged.ranked.category[rows]]
    of_class = _groups(assessment.cache, how.by)
    one, two = _tensors(*maps(score, target, of_class[label], int(of_class.max()) + 1, how))
    return CalibratedHead(head, form, torch.from_numpy(of_class), one, two).eval().requires_grad_(False)


def _tensors(*arrays: Floats) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(x.astype(np.float32)) for x in arrays)


def sizes_of(area: Floats, sizes: int) -> tuple[Floats, NDArray[np.int64]]:
    """[K] box areas -> areas [S-1] that divide them into S <= ``sizes`` equal numbers, and the size [K] of each."""
    inner = np.percentile(area, np.linspace(0, 100, min(sizes, len(area)) + 1))[1:-1]
    edges: Floats = np.unique(inner[inner > 0])
    return edges, np.searchsorted(edges, area, side="right")


def _groups(cache: Cache, by: str) -> NDArray[np.int64]:
    """Group of every class. [C]"""
    counts = cache.categories.instance_count
    if by == "class":
        return np.arange(len(counts))
    return bin_index(counts, DEFAULT_BINS).astype(np.int64) if by == "bin" else np.zeros(len(counts), np.int64)


def _logistic(score: Floats, target: Floats, group: Any, groups: int, how: Confidence) -> tuple[Floats, Floats]:
    """Slopes and shifts, [G, 1] each."""
    s = np.clip(score, 1e-30, 1 - 2**-24)
    z = np.log(s) - np.log1p(-s)
    shifts = how.method == "platt"
    pooled, information = _fit_logistic(z, target, np.array([1.0, 0.0]), np.zeros((2, 2)), shifts)
    theta = pooled[None]
    if how.by != "pooled":
        prior = how.strength * information / len(z)
        order = np.argsort(group, kind="stable")
        parts = np.split(order, np.searchsorted(group[order], np.arange(1, groups)))
        fits = [_fit_logistic(z[own], target[own], pooled, prior, shifts)[0] if len(own) else pooled for own in parts]
        theta = np.stack(fits)
    return np.maximum(theta[:, :1], 1e-2), theta[:, 1:]  # a slope of 0 or less would lose or turn the order


def _fit_logistic(z: Floats, target: Floats, start: Floats, prior: Floats, shifts: bool) -> tuple[Floats, Floats]:
    """theta = (slope a, shift b) of least log loss of sigmoid(a z + b) plus (theta - start)' prior (theta - start) / 2.

    Targets are smoothed as Platt does it ("Probabilistic Outputs for Support Vector Machines", 1999, section 2.2): 1
    becomes (n + 1) / (n + 2), 0 becomes 1 / (m + 2) for n true and m false detections, so that scores which separate
    them have a finite slope. Also the information [2, 2] at the optimum.

    Raises:
        FitError: the optimiser does not converge.
    """
    from scipy.optimize import minimize

    true, false = target.sum(), (1 - target).sum()
    smoothed = target * (true + 1) / (true + 2) + (1 - target) / (false + 2)
    x = np.stack([z, np.ones_like(z) if shifts else np.zeros_like(z)], axis=1)
    fixed = np.diag([0.0, 0.0 if shifts else 1.0])  # holds the shift where it is

    def loss(theta: Floats) -> tuple[float, Floats]:
        logits, away = x @ theta, theta - start
        pulled = (prior + fixed) @ away
        value = np.logaddexp(0, logits).sum() - smoothed @ logits + away @ pulled / 2
        return float(value), x.T @ (expit(logits) - smoothed) + pulled

    def curvature(theta: Floats) -> Floats:
        p = expit(x @ theta)
        information: Floats = (x * (p * (1 - p))[:, None]).T @ x
        return information

    def hessian(theta: Floats) -> Floats:
        return curvature(theta) + prior + fixed

    found = minimize(loss, start, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-7 * (1 + len(z))})
    if not found.success:
        raise FitError(
            f"no map of {len(z)} detections: {found.message}", hint="fewer groups (--by pooled), or --method isotonic"
        )
    return found.x, curvature(found.x)


def _isotonic(score: Floats, target: Floats, group: Any, groups: int, how: Confidence) -> tuple[Floats, Floats]:
    """Knots, [G, K] each."""
    pooled = _knots(score, target, np.ones_like(score))
    if how.by == "pooled":
        return pooled[0][None], pooled[1][None]
    grid = np.quantile(score, (np.arange(100) + 0.5) / 100)
    usual = np.interp(grid, *pooled)
    weight = np.full(len(grid), how.strength / len(grid))
    maps = []
    for g in range(groups):
        own = group == g
        parts = ((score[own], grid), (target[own], usual), (np.ones(int(own.sum())), weight))
        maps.append(_knots(*(np.concatenate(p) for p in parts)) if own.any() and how.strength else pooled)
    return np.stack([m[0] for m in maps]), np.stack([m[1] for m in maps])


def _histogram(score: Floats, target: Floats, group: Any, groups: int, how: Confidence) -> tuple[Floats, Floats]:
    """Knots, [G, K] each: (0, 0), mean score and share of true detections of every score bin, (1, 1)."""
    pooled = _bins(score, target, how.score_bins)
    maps = []
    for g in range(groups):
        own = group == g
        x, y, n = _bins(score[own], target[own], how.score_bins) if own.any() else pooled
        weight = how.strength / len(x)
        maps.append(_between((x, (n * y + weight * _interpolated(x, pooled)) / (n + weight))))
    width = max(len(x) for x, _ in maps)
    return tuple(np.stack([_padded(m[k], width, k == 0) for m in maps]) for k in (0, 1))  # type: ignore[return-value]


def _bins(score: Floats, target: Floats, bins: int) -> tuple[Floats, Floats, Floats]:
    """Mean score, mean target and number of detections of ``bins`` equal numbers by score, where there is any."""
    edges = np.percentile(score, np.linspace(0, 100, min(bins, len(score)) + 1))
    edges[0], edges[-1] = 0, 1 + 1e-8
    edges = np.unique(np.maximum.accumulate(edges))
    at = np.clip(np.searchsorted(edges, score, side="right") - 1, 0, len(edges) - 2)
    n = np.bincount(at, minlength=len(edges) - 1).astype(np.float64)
    x, y = (np.bincount(at, v, minlength=len(n)) / np.maximum(n, 1) for v in (score, target))
    some = n > 0
    return x[some], y[some], n[some]


def _interpolated(x: Floats, pooled: tuple[Floats, Floats, Floats]) -> Floats:
    found: Floats = np.interp(x, *_between(pooled[:2]))
    return found


def _between(knots: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    """Knots with (0, 0) and (1, 1), without those that lie on them."""
    x, y = knots
    keep = (x > 0) & (x < 1 - 1e-6)
    return np.concatenate([[0], x[keep], [1]]), np.concatenate([[0], y[keep], [1]])


def _padded(values: Floats, width: int, rising: bool) -> Floats:
    beyond = np.arange(1, width + 1 - len(values))
    return np.concatenate([values, 1.0 + beyond if rising else np.ones(len(beyond))])


def _knots(score: Floats, target: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """Strictly increasing abscissae and ordinates from (0, 0) to 1; KNOTS + 2 of each, padded beyond 1."""
    from sklearn.isotonic import IsotonicRegression

    level = IsotonicRegression(y_min=0, y_max=1).fit_transform(score, target, sample_weight=weight)
    block = np.unique(level, return_inverse=True)[1]
    total = np.bincount(block, weight)
    x: Floats = np.bincount(block, weight * score) / total
    y: Floats = np.bincount(block, weight * level) / total
    keep = y > 0  # the lowest stretch is a line from the origin, never flat
    x, y, total = x[keep], y[keep], total[keep]
    if len(x) > KNOTS:
        part = np.arange(len(x)) * KNOTS // len(x)
        mass = np.bincount(part, total)
        x, y = np.bincount(part, total * x) / mass, np.bincount(part, total * y) / mass
    x, y = np.clip(x, 1e-6, 1 - 1e-6), np.minimum(y, 1 - 1e-3)
    last = (x[-1], y[-1]) if len(x) else (0.0, 0.0)
    x = np.concatenate([[0.0], x, [1.0]])
    y = np.concatenate([[0.0], y, [min(1.0, last[1] + 1 - last[0])]])
    y = np.maximum.accumulate(y - 1e-4 * x) + 1e-4 * x
    beyond = np.arange(1, KNOTS + 3 - len(x))
    return np.concatenate([x, 1.0 + beyond]), np.concatenate([y, np.full(len(beyond), y[-1])])


def _change(assessment: Assessment, head: Head, mapped: Head, nms: Nms) -> Before:
    metrics: list[dict[str, float]] = []
    tables: list[list[dict[str, Any]]] = []
    for one in (head, mapped):
        found = assessment.found(one, nms)
        evaluator, cap = assessment.evaluator, assessment.limit(nms)
        errors = calibration(evaluator, found, max_detections=cap)
        summary = evaluator.evaluate(found, max_detections=cap).summary()
        kept = {k: errors[k] for k in ("D-ECE", "LaECE", "LaECE_0", "LaACE_0")}
        metrics.append(kept | {k: float(summary[k]) for k in ("AP", "AP1", "AP2", "AP3", "AP4")})
        judged = outcomes(evaluator, found, Caps(cap), 0.5)
        tables.append(reliability(judged, evaluator.objects.n[:, 0]).records())
    return Before(str(assessment.cache.path), metrics[0], metrics[1], tables[0], tables[1])
