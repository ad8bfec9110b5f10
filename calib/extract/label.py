"""Labels of proposals by IoU, and the choice of proposals that detectors train on."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from calib.boxes import Boxes, pairwise_iou
from calib.cache.schema import IGNORE
from calib.extract.adapter import Sampling


@dataclass(frozen=True)
class GroundTruth:
    """Objects of one image: boxes [M, 4] xyxy in the pixels of the original image, class index and annotation id."""

    boxes: Boxes
    label: NDArray[np.int64]
    annotation_id: NDArray[np.int64]


@dataclass(frozen=True)
class Labels:
    """Per proposal: class index (C = background, -1 = ignore), best IoU, position of the best object (-1 = none)."""

    label: NDArray[np.int32]
    max_iou: NDArray[np.float32]
    best: NDArray[np.int64]


def assign(
    proposals: Boxes, objects: Boxes, object_label: NDArray[np.int64], background: int, sampling: Sampling
) -> Labels:
    """[N, 4], [M, 4], [M] -> labels [N]: the best object's class from ``foreground_iou`` up, background below
    ``background_iou``, ignored between."""
    n = len(proposals)
    if len(objects) == 0:
        return Labels(np.full(n, background, np.int32), np.zeros(n, np.float32), np.full(n, -1))
    iou = pairwise_iou(proposals, objects)  # [N, M]
    best = iou.argmax(axis=1)
    max_iou = iou[np.arange(n), best]
    label = np.where(max_iou >= sampling.foreground_iou, object_label[best], IGNORE)
    label[max_iou < sampling.background_iou] = background
    return Labels(label.astype(np.int32), max_iou.astype(np.float32), best)


def one_to_one(labels: Labels, logits: NDArray[np.float32], background: int) -> Labels:
    """[N], [N, C+1] -> [N]: of an object's foreground proposals the one with the highest logit of its class stays, the
    others become background."""
    rows = np.flatnonzero((labels.label >= 0) & (labels.label < background))
    by_logit = rows[np.argsort(-logits[rows, labels.label[rows]], kind="stable")]
    _, first = np.unique(labels.best[by_logit], return_index=True)
    label = labels.label.copy()
    label[np.setdiff1d(rows, by_logit[first])] = background
    return replace(labels, label=label)


def choose(labels: Labels, background: int, sampling: Sampling, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions of the proposals a training step would see: at most ``foreground_share`` of ``rows_per_image``
    foreground, background for the rest; foreground sorted by class, background shuffled behind it."""
    foreground = np.flatnonzero((labels.label >= 0) & (labels.label < background))
    negative = np.flatnonzero(labels.label == background)
    most = int(sampling.rows_per_image * sampling.foreground_share)
    foreground = rng.permutation(foreground)[:most]
    negative = rng.permutation(negative)[: sampling.rows_per_image - len(foreground)]
    by_class = np.lexsort((foreground, labels.label[foreground]))
    return np.concatenate([foreground[by_class], negative])
