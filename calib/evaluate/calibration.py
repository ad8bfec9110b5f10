"""Do scores say how good detections are? Calibration errors, and the localisation-recall-precision error.

N detections of categories that have objects, at one IoU threshold tau, TP or FP (ignored ones are left out unless
said otherwise); iou is the overlap with the object found, 0 for an FP. B bins of the score: [0, 1/B], (1/B, 2/B], ...

Papers: Kueppers et al., "Multivariate Confidence Calibration for Object Detection", CVPRW 2020 (D-ECE); Oksuz et al.,
"Towards Building Self-Aware Object Detectors via Reliable Uncertainty Quantification and Calibration", CVPR 2023
(LaECE, LRP as used here); Kuzucu et al., "On Calibration of Object Detectors: Pitfalls, Evaluation and Baselines",
ECCV 2024 (tau = 0: LaECE_0, LaACE_0); Oksuz et al., "One Metric to Measure Them All", TPAMI 2021 (LRP, oLRP).
Differs: nothing from fiveai/detection_calibration @bf59c92, two of whose habits are kept: a category whose error is
exactly 0 is left out of the mean, and LaACE averages over ignored detections too.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import SettingError

from .bins import mean_present
from .evaluation import Evaluator, Rescored
from .outcome import Outcomes, outcomes
from .results import Detections
from .select import Caps

LAECE_BINS = 25
DECE_BINS = 10


@dataclass(frozen=True)
class Reliability:
    """B bins of the score, all categories together: what a reliability diagram draws."""

    low: NDArray[np.float64]  # [B]
    high: NDArray[np.float64]  # [B]
    n: NDArray[np.int64]  # [B], detections
    mean_score: NDArray[np.float64]  # [B], NaN without detections
    precision: NDArray[np.float64]  # [B], share of TP
    mean_iou: NDArray[np.float64]  # [B], FP counting 0

    def records(self) -> list[dict[str, float | int | None]]:
        """One JSON object per bin; null where there is no detection."""
        columns = {name: value.tolist() for name, value in vars(self).items()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [{name: None if value != value else value for name, value in row.items()} for row in rows]


def calibration(
    evaluator: Evaluator, detections: Detections | Rescored, *, max_detections: int = 300, tau: float = 0.5
) -> dict[str, float]:
    """All calibration metrics: ``D-ECE``, ``LaECE``, ``LRP`` and its parts at ``tau``, ``LaECE_0`` and ``LaACE_0`` at
    0, ``oLRP`` and its parts and, where the ground truth has frequencies, oLRPr, oLRPc, oLRPf; -1 where no category
    has objects.

    Raises:
        InputError: detections of images that the ground truth does not have.
        SettingError: scores outside [0, 1].
    """
    if len(detections.score) and not 0 <= detections.score.min() <= detections.score.max() <= 1:
        raise SettingError(
            f"calibration needs scores in [0, 1], got {detections.score.min():.4g} to {detections.score.max():.4g}",
            hint="give probabilities, not logits",
        )
    caps = Caps(max_detections)
    at_tau, at_zero = (outcomes(evaluator, detections, caps, t) for t in (tau, 0.0))
    n_gt = evaluator.objects.n[:, 0]
    return {
        "D-ECE": d_ece(at_tau, n_gt),
        "LaECE": la_ece(at_tau, n_gt),
        "LaECE_0": la_ece(at_zero, n_gt),
        "LaACE_0": la_ace(at_zero, n_gt),
        **lrp(at_tau, n_gt, tau),
        **optimal_lrp(at_tau, n_gt, tau, evaluator.truth.frequency),
    }


def _counted(found: Outcomes, n_gt: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows that are TP or FP of a category with objects."""
    return np.flatnonzero((found.is_true | found.is_false) & (n_gt[found.ranked.category] > 0))


def _bin(score: NDArray[np.float64], bins: int) -> NDArray[np.int64]:
    """Bin of each score; the first one is closed at 0. [N] -> [N]"""
    edges = np.linspace(0, 1, bins + 1)
    return np.clip(np.searchsorted(edges, score, side="left") - 1, 0, bins - 1)


def reliability(found: Outcomes, n_gt: NDArray[np.int64], bins: int = DECE_BINS) -> Reliability:
    """Score against precision and overlap, per bin of the score."""
    row = _counted(found, n_gt)
    score = found.ranked.score[row]
    index = _bin(score, bins)
    n = np.bincount(index, minlength=bins)
    iou = np.where(found.is_true, found.iou, 0.0)[row]
    with np.errstate(invalid="ignore"):
        means = [np.bincount(index, w, minlength=bins) / n for w in (score, found.is_true[row].astype(float), iou)]
    edges = np.linspace(0, 1, bins + 1)
    return Reliability(edges[:-1], edges[1:], n, *means)


def d_ece(found: Outcomes, n_gt: NDArray[np.int64], bins: int = DECE_BINS) -> float:
    """sum_b N_b / N |TP_b / N_b - mean score_b| over all categories together; -1 without detections."""
    table = reliability(found, n_gt, bins)
    full = table.n > 0
    if not full.any():
        return -1.0
    gap = np.abs(table.precision[full] - table.mean_score[full])
    return float((table.n[full] / table.n.sum() * gap).sum())


def la_ece(found: Outcomes, n_gt: NDArray[np.int64], bins: int = LAECE_BINS) -> float:
    """Mean over categories of sum_b N_cb / N_c |sum iou_cb / N_cb - mean score_cb|, eq. 4 of Oksuz et al. 2023."""
    row = _counted(found, n_gt)
    category, score = found.ranked.category[row], found.ranked.score[row]
    iou = np.where(found.is_true, found.iou, 0.0)[row]
    cell = category * bins + _bin(score, bins)
    size = len(n_gt) * bins
    # N_cb |a / N_cb - b / N_cb| is |a - b|.
    gap = np.abs(np.bincount(cell, iou, minlength=size) - np.bincount(cell, score, minlength=size))
    per_category = gap.reshape(-1, bins).sum(axis=1)
    n = np.bincount(category, minlength=len(n_gt))
    return _mean_of_nonzero(per_category, n)


def la_ace(found: Outcomes, n_gt: NDArray[np.int64]) -> float:
    """Mean over categories of the mean |iou - score| of their detections, ignored ones too."""
    row = np.flatnonzero(n_gt[found.ranked.category] > 0)
    category = found.ranked.category[row]
    gap = np.abs(np.where(found.is_true, found.iou, 0.0)[row] - found.ranked.score[row])
    n = np.bincount(category, minlength=len(n_gt))
    return _mean_of_nonzero(np.bincount(category, gap, minlength=len(n_gt)), n)


def _mean_of_nonzero(total: NDArray[Any], n: NDArray[np.int64]) -> float:
    present = (n > 0) & (total != 0)
    return float((total[present] / n[present]).mean()) if present.any() else -1.0


def lrp(found: Outcomes, n_gt: NDArray[np.int64], tau: float) -> dict[str, float]:
    """LRP = ((TP - sum iou) / (1 - tau) + FP + FN) / (TP + FP + FN), eq. 3 of Oksuz et al. 2021, 1 without a TP.

    Parts: LRP_loc = (TP - sum iou) / TP, LRP_fp = FP / (TP + FP), LRP_fn = FN / objects. Means over the categories with
    objects where the part is defined.
    """
    row = _counted(found, n_gt)
    category, size = found.ranked.category[row], len(n_gt)
    true = found.is_true[row]
    tp = np.bincount(category, true, minlength=size)
    fp = np.bincount(category, ~true, minlength=size)
    inexact = np.bincount(category, np.where(true, 1 - found.iou[row], 0.0), minlength=size)
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = {
            "LRP": np.where(tp > 0, (inexact / (1 - tau) + fp + n_gt - tp) / (fp + n_gt), 1.0),
            "LRP_loc": inexact / tp,
            "LRP_fp": np.where(tp > 0, fp / (tp + fp), np.nan),
            "LRP_fn": (n_gt - tp) / n_gt,
        }
    return {name: _mean_defined(part, n_gt > 0) for name, part in parts.items()}


def optimal_lrp(
    found: Outcomes, n_gt: NDArray[np.int64], tau: float, frequency: tuple[str, ...] | None = None
) -> dict[str, float]:
    """oLRP: the least LRP over all score cut-offs of a category, and its parts there; means over categories."""
    row = _counted(found, n_gt)
    category = found.ranked.category[row]
    true, size = found.is_true[row], len(n_gt)
    first = np.searchsorted(category, np.arange(size))

    def so_far(value: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.concatenate([[0.0], np.cumsum(value)])
        return np.asarray(total[1:] - total[first[category]])

    tp, fp = so_far(true.astype(float)), so_far((~true).astype(float))
    inexact = so_far(np.where(true, 1 - found.iou[row], 0.0))
    n = n_gt[category]
    error = np.where(tp > 0, (inexact / (1 - tau) + fp + n - tp) / (fp + n), 1.0)
    order = np.lexsort((np.arange(len(row)), error, category))  # of equal errors the higher cut-off
    has = np.flatnonzero(np.bincount(category, minlength=size))
    at = order[first[has]]
    parts = {name: np.full(size, np.nan) for name in ("oLRP", "oLRP_loc", "oLRP_fp", "oLRP_fn")}
    parts["oLRP"][:], parts["oLRP_fn"][:] = 1.0, 1.0  # without detections every object is missed
    with np.errstate(invalid="ignore", divide="ignore"):
        parts["oLRP"][has], parts["oLRP_loc"][has] = error[at], inexact[at] / tp[at]
        parts["oLRP_fp"][has] = np.where(tp[at] > 0, fp[at] / (tp[at] + fp[at]), np.nan)
        parts["oLRP_fn"][has] = (n[at] - tp[at]) / n[at]
    metrics = {name: _mean_defined(part, n_gt > 0) for name, part in parts.items()}
    for letter in "rcf" if frequency is not None else "":
        members = np.array([f == letter for f in frequency or ()], np.bool_)
        metrics[f"oLRP{letter}"] = mean_present(parts["oLRP"][members & (n_gt > 0)])[0]
    return metrics


def _mean_defined(value: NDArray[np.float64], present: NDArray[np.bool_]) -> float:
    defined = value[present & ~np.isnan(value)]
    return float(defined.mean()) if len(defined) else -1.0
