"""Is one head better than another, or was the split kind to it? Paired bootstrap over images.

Images are drawn with replacement, the same for both heads; AP of every category is computed on the drawn images, where
an image drawn w times counts w times: its objects w-fold, its true and false positives w-fold. Matching happens inside
images and does not change, so a replicate costs sums over detections only. The interval is that of percentiles of the
differences; both heads' metrics come from the same draws, which is what makes small differences visible.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 13 and 16.
Differs: of detections of one image with equal scores in one category, copies stand together (w true ones, then w false
ones) instead of in turn. Categories without an object in the drawn images are left out of that replicate's means.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import SettingError
from calib.progress import Progress, silent

from .average_precision import EPS, RECALL_POINTS, best_beyond
from .bins import DEFAULT_BINS, bin_means, frequency_means, mean_present
from .evaluation import Evaluator, Matched, Rescored
from .outcome import settle
from .results import Detections
from .select import Caps


@dataclass(frozen=True)
class Interval:
    """A metric, or a difference of two heads, with its percentile interval, as fractions."""

    difference: float
    low: float
    high: float


class Resampled:
    """One head's detections that count, per threshold, ready to be weighted by images."""

    def __init__(self, evaluator: Evaluator, matched: Matched) -> None:
        self._n_categories = len(evaluator.truth.category_ids)
        ranked = matched.ranked
        self._rows = []
        for t in range(len(evaluator.thresholds)):
            is_true, is_false = settle(matched, t)
            row = np.flatnonzero(is_true | is_false)
            self._rows.append((ranked.category[row], ranked.image[row], is_true[row]))

    def average_precision(self, weight: NDArray[np.float64], n_objects: NDArray[Any]) -> NDArray[np.float64]:
        """AP of every category when image i counts ``weight[i]`` times, -1 without objects. [I], [C] -> [C]"""
        total = np.zeros(self._n_categories)
        for category, image, is_true in self._rows:
            w = weight[image]
            true, false = np.where(is_true, w, 0.0), np.where(is_true, 0.0, w)
            start = np.searchsorted(category, np.arange(self._n_categories))
            before_true = np.concatenate([[0.0], np.cumsum(true)])
            before_false = np.concatenate([[0.0], np.cumsum(false)])
            at = np.flatnonzero(true)
            group = category[at]
            found = before_true[at + 1] - before_true[start[group]]  # after all copies of this detection
            precision = found / (found + before_false[at + 1] - before_false[start[group]] + EPS)
            recall, recall_before = found / n_objects[group], (found - true[at]) / n_objects[group]
            points = np.searchsorted(RECALL_POINTS, recall, side="right").astype(np.float64)
            # The point 0 belongs to the first true positive.
            points -= np.where(recall_before > 0, np.searchsorted(RECALL_POINTS, recall_before, side="right"), 0)
            total += np.bincount(group, points * best_beyond(precision, group), minlength=self._n_categories)
        return np.where(n_objects > 0, total / (len(RECALL_POINTS) * len(self._rows)), -1.0)


def check_replicates(n: int) -> None:
    """Raise SettingError for fewer than 10."""
    if n < 10:
        raise SettingError(f"expected replicates >= 10, got {n}", hint="--bootstrap 1000; fewer give no interval")


def draw(
    evaluator: Evaluator,
    found: Sequence[Detections | Rescored],
    *,
    replicates: int = 1000,
    max_detections: int = 300,
    bins: Sequence[int] = DEFAULT_BINS,
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, NDArray[np.float64]]]:
    """AP, APr, APc, APf, AP1, ..., bAP of every head: [1 + replicates], on the images as they are and on each draw.

    All heads have the same draws; NaN where no category has an object.

    Raises:
        InputError: detections of images that the ground truth does not have. SettingError: fewer than 10 replicates.
    """
    check_replicates(replicates)
    heads = [Resampled(evaluator, evaluator.match(one, Caps(max_detections))) for one in found]
    truth = evaluator.truth
    n_images, n_categories = len(truth.image_ids), len(truth.category_ids)
    counts = np.flatnonzero(~truth.is_ignored)
    rng = np.random.default_rng(seed)
    drawn: list[list[dict[str, float]]] = [[] for _ in heads]
    with progress("bootstrap", total=replicates, unit="replicates") as bar:
        for k in range(replicates + 1):
            weight = np.ones(n_images)
            if k > 0:
                weight = np.bincount(rng.integers(0, n_images, n_images), minlength=n_images).astype(np.float64)
                bar.advance()
            n = np.bincount(truth.category[counts], weight[truth.image[counts]], minlength=n_categories)
            for head, metrics in zip(heads, drawn, strict=True):
                metrics.append(_summary(head.average_precision(weight, n), evaluator, bins))
    return [{key: _defined([f[key] for f in metrics]) for key in metrics[0]} for metrics in drawn]


def interval(values: NDArray[np.float64], confidence: float = 0.95, *, centred: bool = False) -> Interval | None:
    """Percentile interval of a metric (or of a difference) from ``draw``; None where it does not exist.

    Drawn splits repeat some images and lack others, which lifts AP itself by about a point; ``centred`` takes the mean
    of that shift away.

    Raises:
        SettingError: a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise SettingError(f"expected 0 < confidence < 1, got {confidence}")
    drawn = values[1:][~np.isnan(values[1:])]
    if np.isnan(values[0]) or not len(drawn):
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) - (drawn.mean() - values[0] if centred else 0.0)
    return Interval(float(values[0]), float(low), float(high))


def compare(
    evaluator: Evaluator,
    one: Detections | Rescored,
    other: Detections | Rescored,
    *,
    replicates: int = 1000,
    confidence: float = 0.95,
    max_detections: int = 300,
    bins: Sequence[int] = DEFAULT_BINS,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Interval]:
    """Differences ``other`` - ``one`` of the metrics of ``draw``, with intervals; those that exist.

    Raises:
        InputError, SettingError: as ``draw`` and ``interval``.
    """
    first, second = draw(
        evaluator,
        (one, other),
        replicates=replicates,
        max_detections=max_detections,
        bins=bins,
        seed=seed,
        progress=progress,
    )
    found = {key: interval(second[key] - first[key], confidence) for key in first}
    return {key: value for key, value in found.items() if value is not None}


def _defined(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.array(values)
    return np.where(array > -1, array, np.nan)


def _summary(ap: NDArray[np.float64], evaluator: Evaluator, bins: Sequence[int]) -> dict[str, float]:
    metrics = {"AP": mean_present(ap)[0]} | frequency_means(ap, evaluator.truth.frequency)
    metrics |= bin_means(ap, evaluator.instance_count, bins)
    return {key: value for key, value in metrics.items() if not key.startswith("n")}
