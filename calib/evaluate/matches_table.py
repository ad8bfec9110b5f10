"""What became of every detection, as a table for analysis.

One row per detection that was judged, and per detection that was not (its category is not labelled in the image) but
covers an object of another category: those show what rare objects are taken for. The cap on detections per image is
not applied: ``rank`` says which detections it would cut. At IoU 0.5, objects of all sizes; ``kind`` is

- ``true``: found an object;
- ``duplicate``: covers an object of its category that a better detection has taken (IoU >= 0.5);
- ``poor_box``: overlaps one of its category by 0.1 to 0.5;
- ``wrong_class``: covers an object of another category (IoU >= 0.5);
- ``background``: overlaps no object of a labelled category by 0.1;
- ``other``: overlaps an object of another category by 0.1 to 0.5;
- ``ignored``: counts neither way (not exhaustively annotated, or matched to an ignored object);
- ``unjudged``: its category is not labelled in the image.

Paper: Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020, for the kinds.
Differs: a detection with both a wrong class and a poor box is ``other``; errors are counted, not weighed in AP.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.files import replacing

from .evaluation import Evaluator
from .ground_truth import NEGATIVE, POSITIVE
from .outcome import outcomes
from .overlaps import BoxSet
from .results import Detections
from .select import NO_CAP, Caps, rank_in_group

KINDS = ("true", "duplicate", "poor_box", "wrong_class", "background", "other", "ignored", "unjudged")
TRUE, DUPLICATE, POOR_BOX, WRONG_CLASS, BACKGROUND, OTHER, IGNORED, UNJUDGED = range(len(KINDS))
COVERS, TOUCHES = 0.5, 0.1


def write_matches(path: Path, evaluator: Evaluator, detections: Detections) -> int:
    """Write the table as Parquet, sorted as in the detections file; the number of rows.

    Columns: image_id, category_id, score, x, y, width, height, row (in the file), rank (in its image, from 1), kind;
    annotation_id and iou of the object of its category that it took or overlaps most; other_annotation_id,
    other_category_id and other_iou of the object of another category that it overlaps most (null below IoU 0.1).

    Raises:
        InputError: detections of images that the ground truth does not have.
        ExistsError: a folder stands at ``path``.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    truth = evaluator.truth
    rows = detections.rows(truth)
    row = np.flatnonzero((rows.category >= 0) & (rows.area > 0) & (rows.area < np.inf))
    boxes = BoxSet(truth, rows.image[row], detections.box[row], np.array([TOUCHES]))
    own, own_iou = _best(boxes, rows.category[row], same=True)
    other, other_iou = _best(boxes, rows.category[row], same=False)
    kind = _kinds(own_iou, other_iou)
    judged = np.ones(len(row), np.bool_)
    if truth.is_federated:
        judged = (truth.labels[rows.image[row], rows.category[row]] & (NEGATIVE | POSITIVE)) > 0
    found = outcomes(evaluator, detections, Caps(NO_CAP), COVERS)
    at = np.searchsorted(row, found.ranked.row)
    kind[at[~found.is_true & ~found.is_false]] = IGNORED
    kind[at[found.is_true]] = TRUE
    took = found.object >= 0
    own[at[took]], own_iou[at[took]] = found.object[took], found.iou[took]
    kind[~judged] = UNJUDGED
    kept = np.flatnonzero(judged | (other_iou >= COVERS))
    rank = rank_in_group(rows.image, rows.score)[row[kept]] + 1
    row, own, other = row[kept], own[kept], other[kept]
    box = detections.box[row]
    table = pa.table(
        {
            "image_id": detections.image_id[row],
            "category_id": detections.category_id[row],
            "score": detections.score[row],
            **{name: box[:, k] for k, name in enumerate(("x", "y", "width", "height"))},
            "row": row,
            "rank": rank.astype(np.int32),
            "kind": pa.DictionaryArray.from_arrays(kind[kept].astype(np.int8), pa.array(KINDS)).cast(pa.string()),
            "annotation_id": _ids(truth.annotation_id, own),
            "iou": own_iou[kept],
            "other_annotation_id": _ids(truth.annotation_id, other),
            "other_category_id": _ids(truth.category_ids[truth.category], other),
            "other_iou": other_iou[kept],
        }
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return len(table)


def _best(boxes: BoxSet, category: NDArray[np.int64], *, same: bool) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The object of the box's own category, or of another one, that it overlaps most, and by how much; -1 and 0."""
    box, index, iou = boxes.overlaps()
    wanted = (boxes.truth.category[index] == category[box]) == same
    box, index, iou = box[wanted], index[wanted], iou[wanted]
    first = np.flatnonzero(np.diff(box, prepend=-1))  # the best come first
    best, best_iou = np.full(len(category), -1), np.zeros(len(category))
    best[box[first]], best_iou[box[first]] = index[first], iou[first]
    return best, best_iou


def _kinds(own_iou: NDArray[np.float64], other_iou: NDArray[np.float64]) -> NDArray[np.int64]:
    """What a detection is if it is false. [N], [N] -> [N]"""
    return np.select(
        [own_iou >= COVERS, own_iou >= TOUCHES, other_iou >= COVERS, other_iou >= TOUCHES],
        [DUPLICATE, POOR_BOX, WRONG_CLASS, OTHER],
        BACKGROUND,
    )


def _ids(ids: NDArray[np.int64], index: NDArray[np.int64]) -> Any:
    import pyarrow as pa

    return pa.array(ids[index] if len(ids) else np.zeros(len(index), np.int64), pa.int64(), mask=index < 0)
