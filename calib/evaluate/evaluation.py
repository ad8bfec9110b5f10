"""Box AP of one set of detections against one ground truth, as LVIS defines it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.errors import ShapeError

from .average_precision import Curves, compute_curves
from .bins import DEFAULT_BINS, bin_means, frequency_means, mean_present
from .ground_truth import GroundTruth
from .match import IOU_THRESHOLDS, check_thresholds, find_pairs, match
from .results import Detections
from .select import rank_detections


@dataclass(frozen=True)
class Evaluation:
    """Figures per category as fractions, -1 where the category has no object that counts. C categories.

    AP averages the IoU thresholds 0.50 to 0.95; AP50 and AP75 are at one; APs, APm and APl are for objects of
    less than 32^2 pixels, up to 96^2, and more; AR is the recall of all detections, averaged over thresholds.
    """

    category_ids: NDArray[np.int64]  # [C], ascending
    names: tuple[str, ...]
    frequency: tuple[str, ...] | None
    instance_count: NDArray[np.int64] | None  # [C], TRAIN annotations
    image_count: NDArray[np.int64] | None  # [C], TRAIN images
    n_gt: NDArray[np.int64]  # [C], objects that count
    n_det: NDArray[np.int64]  # [C], detections that count: within the cap, in images labelled for the category
    AP: NDArray[np.float64]  # [C], as all below
    AP50: NDArray[np.float64]
    AP75: NDArray[np.float64]
    APs: NDArray[np.float64]
    APm: NDArray[np.float64]
    APl: NDArray[np.float64]
    AR: NDArray[np.float64]
    ARs: NDArray[np.float64]
    ARm: NDArray[np.float64]
    ARl: NDArray[np.float64]
    max_detections: int
    precision: NDArray[np.float64] | None  # [T, R, C, A] if ``full``
    recall: NDArray[np.float64] | None  # [T, C, A] if ``full``

    def summary(self, bins: Sequence[int] = DEFAULT_BINS) -> dict[str, float | int]:
        """Means over categories, as fractions, -1 where no category exists; n.. is the number behind each.

        Keys: AP, AP50, AP75, n; APs, ns, APm, nm, APl, nl by object size; APr, nr, APc, nc, APf, nf by
        frequency; AR, ARs, ARm, ARl; AP1, n1, ... by training instances (-1 and 0 when their counts are
        unknown) and bAP.

        Raises:
            SettingError: ``bins`` are not ascending positive counts.
        """
        figures: dict[str, float | int] = {}
        figures["AP"], figures["n"] = mean_present(self.AP)
        figures["AP50"], figures["AP75"] = mean_present(self.AP50)[0], mean_present(self.AP75)[0]
        for letter, value in (("s", self.APs), ("m", self.APm), ("l", self.APl)):
            figures[f"AP{letter}"], figures[f"n{letter}"] = mean_present(value)
        figures |= frequency_means(self.AP, self.frequency)
        for key, value in (("AR", self.AR), ("ARs", self.ARs), ("ARm", self.ARm), ("ARl", self.ARl)):
            figures[key] = mean_present(value)[0]
        return figures | bin_means(self.AP, self.instance_count, bins)


def evaluate(
    truth: GroundTruth,
    detections: Detections,
    *,
    max_detections: int = 300,
    iou_thresholds: NDArray[np.float64] = IOU_THRESHOLDS,
    instance_count: NDArray[np.int64] | None = None,
    full: bool = False,
) -> Evaluation:
    """Evaluate as the LVIS API does: capped per image, federated, greedy matching, 101-point AP.

    Args:
        max_detections: best results kept per image over all categories; -1 keeps all.
        iou_thresholds: [T], at most 16. AP50 and AP75 are -1 unless 0.5 and 0.75 are among them.
        instance_count: [C] TRAIN annotations per category; the ground truth's own if not given.
        full: keep the whole precision [T, R, C, A] and recall [T, C, A].

    Raises:
        InputError: detections of images that ``truth`` does not have.
        ShapeError: ``instance_count`` is not one number per category.
        SettingError: ``max_detections`` or ``iou_thresholds`` out of range.
    """
    thresholds = check_thresholds(iou_thresholds)
    n_categories = len(truth.category_ids)
    if instance_count is not None and instance_count.shape != (n_categories,):
        raise ShapeError(f"instance_count has shape {instance_count.shape}, expected ({n_categories},)")
    ranked = rank_detections(truth, detections, max_detections)
    pairs = find_pairs(truth, ranked, thresholds)
    matches = match(truth, ranked, pairs, len(thresholds))
    curves = compute_curves(truth, ranked, matches, len(thresholds), full=full)
    return Evaluation(
        category_ids=truth.category_ids,
        names=truth.names,
        frequency=truth.frequency,
        instance_count=truth.instance_count if instance_count is None else instance_count,
        image_count=truth.image_count,
        n_gt=curves.n_objects[:, 0],
        n_det=np.bincount(ranked.category, minlength=n_categories),
        **_per_category(curves, thresholds),
        max_detections=max_detections,
        precision=curves.precision,
        recall=curves.recall if full else None,
    )


def _per_category(curves: Curves, thresholds: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """AP, AP50, ... ARl, each [C]."""
    ap, ar = curves.average_precision.mean(axis=0), curves.recall.mean(axis=0)  # [C, A]
    figures = {f"AP{suffix}": ap[:, a] for a, suffix in enumerate(("", "s", "m", "l"))}
    figures |= {f"AR{suffix}": ar[:, a] for a, suffix in enumerate(("", "s", "m", "l"))}
    for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        at = np.flatnonzero(thresholds == threshold)
        figures[name] = curves.average_precision[at[0], :, 0] if len(at) else np.full(len(ap), -1.0)
    return figures
