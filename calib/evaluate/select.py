"""Which detections count, and in which order: everything that happens before an overlap is looked at.

LVIS:

1. Cap: of an image with more than ``max_detections`` results the best are kept, over all categories together,
   also those that are dropped later.
2. Categories that the ground truth does not list vanish, and boxes without 0 < width * height < infinity.
   (Two negative sides give a positive area: such a box stays, and overlaps nothing.)
3. Federated filter: a detection counts only where its category is labelled in its image, present or absent.
4. Order: category, then score down, then image id up, then the order in the file.

COCO: every category is labelled in every image, boxes of any area stay, and the cap holds per image and category.

Source: lvis-api 7d7f07d, results.py and eval.py; pycocotools 2.0.11, cocoeval.py.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.errors import SettingError

from .ground_truth import NEGATIVE, NOT_EXHAUSTIVE, POSITIVE, GroundTruth

NO_CAP = -1


@dataclass(frozen=True)
class Rows:
    """N detections as given, with ids replaced by indices."""

    image: NDArray[np.int64]  # [N]
    category: NDArray[np.int64]  # [N], -1 for categories that the ground truth does not list
    score: NDArray[np.float64]  # [N]
    area: NDArray[np.float64]  # [N]


@dataclass(frozen=True)
class Caps:
    """How many results are kept, the best by score, ties in file order; -1 keeps all.

    ``per_image``: of an image (LVIS: over all categories; COCO: of each category). ``per_category``: of a category
    over the whole split, before anything else (AP-fixed: Dave et al., "Evaluating Large-Vocabulary Object Detectors:
    The Devil is in the Details", 2021, with 10,000).
    """

    per_image: int = 300
    per_category: int = NO_CAP

    def __post_init__(self) -> None:
        for name, value in (("max_detections", self.per_image), ("detections per category", self.per_category)):
            if value < 1 and value != NO_CAP:
                raise SettingError(f"{name} must be at least 1, or -1 for no cap, got {value}")


@dataclass(frozen=True)
class Ranked:
    """The K detections that count, sorted by category, score down, image, file order."""

    image: NDArray[np.int64]  # [K], index into the ground truth's images
    category: NDArray[np.int64]  # [K], index, ascending
    score: NDArray[np.float64]  # [K]
    area: NDArray[np.float64]  # [K]
    is_open: NDArray[np.bool_]  # [K], the category is not exhaustively annotated in the image
    row: NDArray[np.int64]  # [K], position in the file

    def __len__(self) -> int:
        return len(self.row)


def best_of_each(group: NDArray[np.int64], score: NDArray[np.float64], limit: int) -> NDArray[np.int64]:
    """Rows of the ``limit`` best of each group, ascending; ties in file order; all if ``limit`` is -1.

    [N], [N] -> [M]
    """
    if limit == NO_CAP or np.bincount(group).max(initial=0) <= limit:
        return np.arange(len(group))
    return np.flatnonzero(rank_in_group(group, score) < limit)


def rank_in_group(group: NDArray[np.int64], score: NDArray[np.float64]) -> NDArray[np.int64]:
    """Place of each row among those of its group by score, from 0; ties in file order. [N], [N] -> [N]"""
    order = np.lexsort((-score, group))
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
    return rank


def rank_detections(truth: GroundTruth, rows: Rows, caps: Caps) -> Ranked:
    """Cap, filter and order detections."""
    n_categories = len(truth.category_ids)
    row = np.arange(len(rows.score))
    if caps.per_category != NO_CAP:
        # Unknown categories compete for nothing here, and vanish below.
        row = best_of_each(rows.category + 1, rows.score, caps.per_category)
    if truth.is_federated:
        row = row[best_of_each(rows.image[row], rows.score[row], caps.per_image)]
        area, category = rows.area[row], rows.category[row]
        # Unknown categories have index -1 and read the last one's label: they are dropped by the same mask.
        label = truth.labels[rows.image[row], category] if n_categories else np.zeros(len(row), np.uint8)
        counts = (category >= 0) & (area > 0) & (area < np.inf) & ((label & (NEGATIVE | POSITIVE)) > 0)
        kept = np.flatnonzero(counts)
        row, is_open = row[kept], (label[kept] & NOT_EXHAUSTIVE) > 0
    else:
        row = row[rows.category[row] >= 0]
        row = row[best_of_each(rows.image[row] * n_categories + rows.category[row], rows.score[row], caps.per_image)]
        is_open = np.zeros(len(row), np.bool_)
    order = _order(rows.category[row], rows.score[row], rows.image[row])
    row = row[order]
    return Ranked(
        image=rows.image[row],
        category=rows.category[row],
        score=rows.score[row],
        area=rows.area[row],
        is_open=is_open[order],
        row=row,
    )


def _order(category: NDArray[np.int64], score: NDArray[np.float64], image: NDArray[np.int64]) -> NDArray[np.int64]:
    # lexsort is stable: what its keys leave equal stays in file order.
    return np.lexsort((image, -score, category))
