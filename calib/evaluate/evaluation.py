"""AP of one set of detections against one ground truth, as LVIS and COCO define it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.errors import SettingError, ShapeError

from .average_precision import Curves, Objects, compute_curves
from .bins import DEFAULT_BINS, bin_means, frequency_means, mean_present
from .ground_truth import GroundTruth
from .match import Matches, match
from .overlaps import IOU_THRESHOLDS, BoxSet, Pairs, box_pairs, check_thresholds, mask_pairs
from .results import Detections
from .select import Caps, Ranked, Rows, rank_detections

MAX_DETECTIONS = {"lvis": 300, "coco": 100}


@dataclass(frozen=True)
class Rescored:
    """N detections of a fixed set of boxes, as another head scores them, in file order."""

    boxes: BoxSet
    box: NDArray[np.int64]  # [N], index into ``boxes``
    category: NDArray[np.int64]  # [N], index into the ground truth's categories
    score: NDArray[np.float64]  # [N]

    def __post_init__(self) -> None:
        n = len(self.score)
        if self.box.shape != (n,) or self.category.shape != (n,):
            raise ShapeError(
                f"expected box [N], category [N] and score [N], got {self.box.shape}, {self.category.shape} and {n}"
            )

    def __len__(self) -> int:
        return len(self.score)


@dataclass(frozen=True)
class Matched:
    """Detections in evaluation order with their candidate objects and what they found."""

    ranked: Ranked
    pairs: Pairs
    matches: Matches


@dataclass(frozen=True)
class Evaluation:
    """Metrics per category as fractions, -1 where the category has no object that counts. C categories.

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

    @property
    def never_detected(self) -> NDArray[np.int64]:
        """Category ids with objects but without a single detection that counts."""
        return np.asarray(self.category_ids[(self.n_gt > 0) & (self.n_det == 0)])

    def summary(self, bins: Sequence[int] = DEFAULT_BINS) -> dict[str, float | int]:
        """Means over categories, as fractions, -1 where no category exists; n.. is the number behind each.

        Keys: AP, AP50, AP75, n; APs, ns, APm, nm, APl, nl by object size; APr, nr, APc, nc, APf, nf by
        frequency; AR, ARs, ARm, ARl; AP1, n1, ... by training instances (-1 and 0 when their counts are
        unknown) and bAP.

        Raises:
            SettingError: ``bins`` are not ascending positive counts.
        """
        metrics: dict[str, float | int] = {}
        metrics["AP"], metrics["n"] = mean_present(self.AP)
        metrics["AP50"], metrics["AP75"] = mean_present(self.AP50)[0], mean_present(self.AP75)[0]
        for letter, value in (("s", self.APs), ("m", self.APm), ("l", self.APl)):
            metrics[f"AP{letter}"], metrics[f"n{letter}"] = mean_present(value)
        metrics |= frequency_means(self.AP, self.frequency)
        for key, value in (("AR", self.AR), ("ARs", self.ARs), ("ARm", self.ARm), ("ARl", self.ARl)):
            metrics[key] = mean_present(value)[0]
        return metrics | bin_means(self.AP, self.instance_count, bins)


class Evaluator:
    """One ground truth, prepared once for any number of detections."""

    def __init__(
        self,
        truth: GroundTruth,
        *,
        iou_thresholds: NDArray[np.float64] = IOU_THRESHOLDS,
        instance_count: NDArray[np.int64] | None = None,
    ) -> None:
        """Prepare ``truth``; with masks if it was read with masks.

        Args:
            iou_thresholds: [T], at most 16. AP50 and AP75 are -1 unless 0.5 and 0.75 are among them.
            instance_count: [C] TRAIN annotations per category; the ground truth's own if not given.

        Raises:
            ShapeError: ``instance_count`` is not one number per category.
            SettingError: ``iou_thresholds`` out of range.
        """
        n_categories = len(truth.category_ids)
        if instance_count is not None and instance_count.shape != (n_categories,):
            raise ShapeError(f"instance_count has shape {instance_count.shape}, expected ({n_categories},)")
        self.truth = truth
        self.thresholds = check_thresholds(iou_thresholds)
        self.instance_count = truth.instance_count if instance_count is None else instance_count
        self.objects = Objects(truth)

    def boxes(self, image_id: NDArray[np.int64], corners: NDArray[np.float32]) -> BoxSet:
        """A fixed set of boxes for many heads: ``corners`` [B, 4] x1, y1, x2, y2 of images ``image_id`` [B].

        Raises:
            InputError: an image that the ground truth does not have.
            ShapeError, NonFiniteError: arrays that do not fit, or NaN in a box.
        """
        zeros = np.zeros(len(image_id))
        as_rows = Detections.from_arrays(image_id, zeros.astype(np.int64), zeros, corners, "boxes")
        return BoxSet(self.truth, as_rows.image_index(self.truth), as_rows.box, self.thresholds)

    def evaluate(
        self,
        detections: Detections | Rescored,
        *,
        max_detections: int | None = None,
        per_category: int = -1,
        full: bool = False,
    ) -> Evaluation:
        """AP of ``detections``.

        Args:
            max_detections: best results kept per image over all categories (LVIS, 300 unless given) or per image
                and category (COCO, 100); -1 keeps all.
            per_category: best results kept per category over the split, before anything else; -1 keeps all.
            full: keep the whole precision [T, R, C, A] and recall [T, C, A].

        Raises:
            InputError: detections of images that the ground truth does not have.
            SettingError: a cap out of range.
        """
        limit = MAX_DETECTIONS[self.truth.style] if max_detections is None else max_detections
        matched = self.match(detections, Caps(limit, per_category))
        curves = compute_curves(self.objects, matched.ranked, matched.matches, len(self.thresholds), full=full)
        return Evaluation(
            category_ids=self.truth.category_ids,
            names=self.truth.names,
            frequency=self.truth.frequency,
            instance_count=self.instance_count,
            image_count=self.truth.image_count,
            n_gt=self.objects.n[:, 0],
            n_det=np.bincount(matched.ranked.category, minlength=len(self.truth.category_ids)),
            **_per_category(curves, self.thresholds),
            max_detections=limit,
            precision=curves.precision,
            recall=curves.recall if full else None,
        )

    def match(
        self, detections: Detections | Rescored, caps: Caps, thresholds: NDArray[np.float64] | None = None
    ) -> Matched:
        """Rank and match ``detections``, at other thresholds than the evaluator's if given.

        Raises:
            InputError: detections of images that the ground truth does not have.
        """
        at = self.thresholds if thresholds is None else thresholds
        if isinstance(detections, Rescored):
            if detections.boxes.truth is not self.truth:
                raise SettingError("the boxes were prepared for another ground truth")
            boxes = detections.boxes
            rows = Rows(boxes.image[detections.box], detections.category, detections.score, boxes.area[detections.box])
            ranked = rank_detections(self.truth, rows, caps)
            row = detections.box[ranked.row]
            prepared = np.array_equal(boxes.thresholds, at)
            pairs = boxes.pairs(ranked, row) if prepared else box_pairs(self.truth, boxes.box[row], ranked, at)
        else:
            ranked = rank_detections(self.truth, detections.rows(self.truth), caps)
            if self.truth.masks is None:
                pairs = box_pairs(self.truth, detections.box[ranked.row], ranked, at)
            else:
                masks = detections.masks(self.truth)
                pairs = mask_pairs(self.truth, [masks[i] for i in ranked.row.tolist()], ranked, at)
        return Matched(ranked, pairs, match(self.truth, ranked, pairs, len(at)))


def evaluate(
    truth: GroundTruth,
    detections: Detections,
    *,
    max_detections: int | None = None,
    iou_thresholds: NDArray[np.float64] = IOU_THRESHOLDS,
    instance_count: NDArray[np.int64] | None = None,
    full: bool = False,
) -> Evaluation:
    """Evaluate once; see ``Evaluator``.

    Raises:
        InputError, ShapeError, SettingError: as ``Evaluator``.
    """
    evaluator = Evaluator(truth, iou_thresholds=iou_thresholds, instance_count=instance_count)
    return evaluator.evaluate(detections, max_detections=max_detections, full=full)


def _per_category(curves: Curves, thresholds: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """AP, AP50, ... ARl, each [C]."""
    ap, ar = curves.average_precision.mean(axis=0), curves.recall.mean(axis=0)  # [C, A]
    metrics = {f"AP{suffix}": ap[:, a] for a, suffix in enumerate(("", "s", "m", "l"))}
    metrics |= {f"AR{suffix}": ar[:, a] for a, suffix in enumerate(("", "s", "m", "l"))}
    for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        at = np.flatnonzero(thresholds == threshold)
        metrics[name] = curves.average_precision[at[0], :, 0] if len(at) else np.full(len(ap), -1.0)
    return metrics
