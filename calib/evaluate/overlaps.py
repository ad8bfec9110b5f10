"""Which detections and objects of one image and category overlap enough to be paired, best first.

Only pairs with an overlap of at least the lowest threshold can match. They depend on the boxes alone, not on the
scores: for detections read from a file they are found once per evaluation; for a fixed set of boxes that many heads
score (``BoxSet``) they are found once for all heads, without regard to the category, and looked up afterwards.

Source: overlaps as pycocotools ``bbIou`` and ``iou``, to the last bit.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.errors import SettingError, ShapeError
from calib.lookup import expand, positions

from .areas import N_AREAS
from .ground_truth import GroundTruth
from .masks import RunLengths
from .select import Ranked

IOU_THRESHOLDS: NDArray[np.float64] = np.linspace(0.5, 0.95, 10)  # not 0.05 * k: the last digits matter
NO_BITS = np.uint64(0)


@dataclass(frozen=True)
class Pairs:
    """Detections with candidates (M of them), and their P candidate objects, best first.

    The candidates of ``detection[m]`` are the entries ``first[m] : first[m] + count[m]`` of ``object`` and
    ``passes``. A *setting* is one of T thresholds with one of A areas, bit ``a * T + t`` of a uint64.
    """

    detection: NDArray[np.int64]  # [M], index into Ranked, ascending
    first: NDArray[np.int64]  # [M]
    count: NDArray[np.int64]  # [M], >= 1
    object: NDArray[np.int64]  # [P], index into the ground truth's annotations
    iou: NDArray[np.float64]  # [P]
    passes: NDArray[np.uint64]  # [P], settings whose IoU threshold the pair reaches

    @classmethod
    def group(
        cls,
        detection: NDArray[np.int64],
        index: NDArray[np.int64],
        iou: NDArray[np.float64],
        passes: NDArray[np.uint64],
    ) -> "Pairs":
        """From pairs that are sorted by detection, best first. [P] each."""
        first = np.flatnonzero(np.diff(detection, prepend=-1))
        return cls(detection[first], first, np.diff(first, append=len(detection)), index, iou, passes)


def check_thresholds(iou_thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``iou_thresholds`` [T] as float64.

    Raises:
        SettingError: none, more than 16 (4 areas x 16 fill the 64 bits), or one outside (0, 1].
    """
    thresholds = np.asarray(iou_thresholds, np.float64)
    if thresholds.ndim != 1 or not 1 <= len(thresholds) <= 64 // N_AREAS:
        raise SettingError(f"iou_thresholds must be 1 to {64 // N_AREAS} numbers, got shape {thresholds.shape}")
    if not ((thresholds > 0) & (thresholds <= 1)).all():
        raise SettingError(f"iou_thresholds must lie in (0, 1], got {thresholds.tolist()}")
    return thresholds


def box_iou(
    a: NDArray[np.float64], b: NDArray[np.float64], is_crowd: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Overlap of boxes x, y, width, height row by row, rounded as the reference does. [P, 4] x 2 -> [P]

    Args:
        is_crowd: [P] objects that stand for many: their overlap is the share of ``a`` that they cover.
    """
    # Column by column: most pairs do not overlap, and rows of four would be read many times over.
    ax, ay, aw, ah = (a[:, k] for k in range(4))
    bx, by, bw, bh = (b[:, k] for k in range(4))
    width = np.minimum(ax + aw, bx + bw) - np.maximum(ax, bx)
    height = np.minimum(ay + ah, by + bh) - np.maximum(ay, by)
    meet = np.flatnonzero((width > 0) & (height > 0))
    inter = width[meet] * height[meet]
    own = aw[meet] * ah[meet]
    union = own + bw[meet] * bh[meet] - inter
    if is_crowd is not None:
        union = np.where(is_crowd[meet], own, union)
    iou = np.zeros(len(a))
    iou[meet] = inter / union
    return iou


def box_pairs(truth: GroundTruth, box: NDArray[np.float64], ranked: Ranked, thresholds: NDArray[np.float64]) -> Pairs:
    """Pairs of ranked detections, whose boxes are ``box`` [K, 4] (x, y, width, height)."""
    detection, index = same_group(truth, ranked.image, ranked.category)
    crowd = truth.is_crowd[index] if truth.is_crowd.any() else None
    with np.errstate(over="ignore", invalid="ignore"):
        iou = box_iou(box[detection], truth.box[index], crowd)
    return _sorted_pairs(detection, index, iou, thresholds)


def mask_pairs(truth: GroundTruth, masks: list[RunLengths], ranked: Ranked, thresholds: NDArray[np.float64]) -> Pairs:
    """Pairs of ranked detections by the overlap of their masks [K]."""
    from pycocotools import mask as coco_mask

    assert truth.masks is not None
    detection, index = same_group(truth, ranked.image, ranked.category)
    iou = np.zeros(len(detection))
    # Pairs of one detection follow each other, so do their objects: one call per detection.
    for start, stop in _runs(detection):
        objects = index[start:stop]
        found = [masks[detection[start]]]
        crowd = truth.is_crowd[objects].astype(np.uint8).tolist()
        iou[start:stop] = coco_mask.iou(found, [truth.masks[g] for g in objects], crowd)[0]
    return _sorted_pairs(detection, index, iou, thresholds)


def _runs(group: NDArray[np.int64]) -> list[tuple[int, int]]:
    first = np.flatnonzero(np.diff(group, prepend=-1))
    return list(zip(first.tolist(), [*first[1:].tolist(), len(group)], strict=True)) if len(group) else []


def _sorted_pairs(
    detection: NDArray[np.int64], index: NDArray[np.int64], iou: NDArray[np.float64], thresholds: NDArray[np.float64]
) -> Pairs:
    # A threshold of exactly 1 would refuse perfect boxes that differ in the last bit.
    thresholds = np.minimum(thresholds, 1 - 1e-10)
    near = iou >= thresholds.min()
    detection, index, iou = detection[near], index[near], iou[near]
    order = np.lexsort((-index, -iou, detection))  # the later of equal overlaps first
    iou = iou[order]
    return Pairs.group(detection[order], index[order], iou, threshold_bits(iou, thresholds))


def same_group(
    truth: GroundTruth, image: NDArray[np.int64], category: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every detection with every object of its image and category: indices of both, by detection. [K], [K]"""
    n_categories = len(truth.category_ids)
    object_group = truth.image * n_categories + truth.category
    by_group = np.argsort(object_group, kind="stable")
    group, first, count = np.unique(object_group[by_group], return_index=True, return_counts=True)
    at = np.where(category >= 0, positions(group, image * n_categories + category), -1)
    detection = np.flatnonzero(at >= 0)
    which, entry = expand(first[at[detection]], count[at[detection]])
    return detection[which], by_group[entry]


def threshold_bits(iou: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.uint64]:
    """All settings whose threshold ``iou`` reaches. [P], [T] -> [P]"""
    reached = [0]
    for t in range(len(thresholds)):
        reached.append(reached[-1] | sum(1 << (a * len(thresholds) + t) for a in range(N_AREAS)))
    if (np.diff(thresholds) > 0).all():
        return np.array(reached, np.uint64)[np.searchsorted(thresholds, iou, side="right")]
    bits = np.zeros(len(iou), np.uint64)
    for t, threshold in enumerate(thresholds):
        bits |= np.where(iou >= threshold, np.uint64(reached[t + 1] & ~reached[t]), NO_BITS)
    return bits


class BoxSet:
    """Boxes of a split with their areas and their overlaps with objects: found once for all heads.

    B boxes in any order; ``image`` [B] are indices into the ground truth's images, ``box`` [B, 4] x, y, width, height.
    With ``category`` [B] each box can be a detection of that category only; otherwise of any.
    """

    def __init__(
        self,
        truth: GroundTruth,
        image: NDArray[np.int64],
        box: NDArray[np.float64],
        iou_thresholds: NDArray[np.float64] = IOU_THRESHOLDS,
        category: NDArray[np.int64] | None = None,
    ) -> None:
        if image.shape != (len(box),) or box.shape != (len(box), 4):
            raise ShapeError(f"expected image [B] and box [B, 4], got {image.shape} and {box.shape}")
        self.truth, self.image, self.box = truth, image, box
        self.thresholds = check_thresholds(iou_thresholds)
        with np.errstate(over="ignore"):
            self.area: NDArray[np.float64] = box[:, 2] * box[:, 3]
        least = float(min(self.thresholds.min(), 1 - 1e-10))
        which, index = self._meeting(least) if category is None else same_group(truth, image, category)
        crowd = truth.is_crowd[index] if truth.is_crowd.any() else None
        with np.errstate(over="ignore", invalid="ignore"):
            iou = box_iou(box[which], truth.box[index], crowd)
        near = np.flatnonzero(iou >= least)
        near = near[np.lexsort((-index[near], -iou[near], which[near]))]  # the later of equal overlaps first
        self._box, self._object, self._iou = which[near], index[near], iou[near]
        self._count = np.bincount(self._box, minlength=len(box))
        self._first = np.cumsum(self._count) - self._count
        self._category = truth.category[self._object]
        self._passes = threshold_bits(self._iou, np.minimum(self.thresholds, 1 - 1e-10))

    def _meeting(self, least: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Box and object of every pair in one image whose overlap may reach ``least``; it is computed later.

        Image by image, so that the many pairs that do not meet are never gathered.
        """
        by_image = [np.argsort(image, kind="stable") for image in (self.image, self.truth.image)]
        sides = []
        for box, order in zip((self.box, self.truth.box), by_image, strict=True):
            x, y, width, height = np.ascontiguousarray(box[order].T)
            with np.errstate(over="ignore"):
                sides.append((x, y, x + width, y + height, width * height))
        (x1, y1, x2, y2, area), (gx1, gy1, gx2, gy2, garea) = sides
        crowd = self.truth.is_crowd[by_image[1]] if self.truth.is_crowd.any() else None
        edges = np.arange(len(self.truth.image_ids) + 1)
        box_edge = np.searchsorted(self.image[by_image[0]], edges).tolist()
        object_edge = np.searchsorted(self.truth.image[by_image[1]], edges).tolist()
        slack = least * (1 - 1e-6)
        parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        with np.errstate(over="ignore", invalid="ignore"):
            for i in range(len(edges) - 1):
                b, g = slice(box_edge[i], box_edge[i + 1]), slice(object_edge[i], object_edge[i + 1])
                if b.start == b.stop or g.start == g.stop:
                    continue
                inter = np.minimum(x2[b, None], gx2[g]) - np.maximum(x1[b, None], gx1[g])
                height = np.minimum(y2[b, None], gy2[g]) - np.maximum(y1[b, None], gy1[g])
                np.maximum(inter, 0, out=inter)
                inter *= np.maximum(height, 0, out=height)
                union = area[b, None] + garea[g] - inter
                if crowd is not None:
                    union = np.where(crowd[g], area[b, None], union)
                near, which = np.nonzero((inter > 0) & (inter >= slack * union))
                parts.append((near + b.start, which + g.start))
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        box_index, object_index = (np.concatenate([part[k] for part in parts]) for k in range(2))
        return by_image[0][box_index], by_image[1][object_index]

    def overlaps(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Box, object and overlap of every pair that reaches the lowest threshold, by box, the best first."""
        return self._box, self._object, self._iou

    def pairs(self, ranked: Ranked, row: NDArray[np.int64]) -> Pairs:
        """Pairs of ranked detections; ``row`` [K] is the box of each."""
        which, entry = expand(self._first[row], self._count[row])
        same = self._category[entry] == ranked.category[which]
        which, entry = which[same], entry[same]
        return Pairs.group(which, self._object[entry], self._iou[entry], self._passes[entry])
