"""Which detections count, and in which order: everything that LVIS does before it looks at an overlap.

1. Cap: of an image with more than ``max_detections`` results the best are kept, over all categories together,
   also those that are dropped later.
2. Categories that the ground truth does not list vanish, and boxes without 0 < width * height < infinity.
   (Two negative sides give a positive area: such a box stays, and overlaps nothing.)
3. Federated filter: a detection counts only where its category is labelled in its image, present or absent.
4. Order: category, then score down, then image id up, then the order in the file.

Source: lvis-api 7d7f07d, results.py and eval.py.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.errors import SettingError

from .ground_truth import NEGATIVE, NOT_EXHAUSTIVE, POSITIVE, GroundTruth, positions
from .results import Detections


@dataclass(frozen=True)
class Ranked:
    """The K detections that count, sorted by category, score down, image, file order."""

    image: NDArray[np.int64]  # [K], index into the ground truth's images
    category: NDArray[np.int64]  # [K], index, ascending
    box: NDArray[np.float64]  # [K, 4], x, y, width, height
    area: NDArray[np.float64]  # [K]
    is_open: NDArray[np.bool_]  # [K], the category is not exhaustively annotated in the image
    row: NDArray[np.int64]  # [K], position in the file

    def __len__(self) -> int:
        return len(self.row)


def best_per_image(image: NDArray[np.int64], score: NDArray[np.float64], limit: int) -> NDArray[np.int64]:
    """Rows of the ``limit`` best of each image, ascending; ties in file order; all if ``limit`` is -1.

    [N], [N] -> [M]
    """
    count = np.bincount(image)
    if limit < 0 or count.max(initial=0) <= limit:
        return np.arange(len(image))
    order = np.lexsort((-score, image))
    first = np.cumsum(count) - count
    rank = np.arange(len(order)) - first[image[order]]
    return np.sort(order[rank < limit])


def rank_detections(truth: GroundTruth, detections: Detections, max_detections: int) -> Ranked:
    """Cap, filter and order ``detections``.

    Raises:
        InputError: a detection of an image that ``truth`` does not have.
        SettingError: ``max_detections`` is neither positive nor -1.
    """
    if max_detections < 1 and max_detections != -1:
        raise SettingError(f"max_detections must be at least 1, or -1 for no cap, got {max_detections}")
    every_image = detections.image_index(truth)
    row = best_per_image(every_image, detections.score, max_detections)
    every_category = positions(truth.category_ids, detections.category_id)
    with np.errstate(over="ignore"):
        every_area = detections.box[:, 2] * detections.box[:, 3]

    area = every_area[row]
    row = row[(every_category[row] >= 0) & (area > 0) & (area < np.inf)]
    label = truth.labels[every_image[row], every_category[row]]
    is_judged = (label & (NEGATIVE | POSITIVE)) > 0
    row, label = row[is_judged], label[is_judged]

    image, category = every_image[row], every_category[row]
    # lexsort is stable: what its keys leave equal stays in file order.
    order = np.lexsort((image, -detections.score[row], category))
    row = row[order]
    return Ranked(
        image=image[order],
        category=category[order],
        box=detections.box[row],
        area=every_area[row],
        is_open=(label[order] & NOT_EXHAUSTIVE) > 0,
        row=row,
    )
