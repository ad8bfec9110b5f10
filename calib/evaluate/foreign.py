"""Results as other frameworks leave them, with class indices in place of category ids.

Detectron2's ``instances_predictions.pth``: a list of ``{image_id, instances: [{category_id, bbox, score, ...}]}``.
mmdetection 3's ``results.pkl``: a list of ``{img_id, pred_instances: {labels, scores, bboxes, masks}}``. Neither is
executed. Class k is the k-th category in ascending id, as both frameworks number LVIS and COCO.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import FormatError, InputError
from calib.files import require
from calib.pickles import read_pickle

from .ground_truth import GroundTruth
from .results import Detections

ENDINGS = (".pth", ".pt", ".pkl")
_HINT = "instances_predictions.pth of Detectron2, results.pkl of mmdetection 3, or a results json of any tool"


def read_results(path: Path, truth: GroundTruth, *, masks: bool = False) -> Detections:
    """Results of any kind.

    Raises:
        As ``Detections.read``; InputError: a class index that is no category of ``truth``.
    """
    if path.suffix not in ENDINGS:
        return Detections.read(path, masks=masks)
    content = _torch(path) if _is_zip(require(path, "results")) else read_pickle(path, "results")
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise FormatError(f"{path} is no list of images", hint=_HINT)
    try:
        if all("pred_instances" in entry for entry in content) and content:
            rows = [row for entry in content for row in _of_mmdetection(entry, masks=masks)]
        else:
            rows = [dict(row) for entry in content for row in entry["instances"]]
        label = np.asarray([int(row["category_id"]) for row in rows], np.int64)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise FormatError(f"{path} holds no results that are known: {e!r}", hint=_HINT) from e
    return Detections.from_document(_named(rows, label, truth, path), str(path), masks=masks)


def _named(
    rows: list[dict[str, Any]], label: NDArray[np.int64], truth: GroundTruth, path: Path
) -> list[dict[str, Any]]:
    classes = len(truth.category_ids)
    if len(label) and not (label.min() >= 0 and label.max() < classes):
        raise InputError(
            f"{path} has class index {label.max()}: the ground truth lists {classes} categories",
            hint="results of another data set?",
        )
    for row, category_id in zip(rows, truth.category_ids[label].tolist(), strict=True):
        row["category_id"] = category_id
    return rows


def _of_mmdetection(entry: dict[str, Any], *, masks: bool) -> list[dict[str, Any]]:
    found = entry["pred_instances"]
    corners = np.asarray(found["bboxes"]).astype(np.float64).reshape(-1, 4)  # a copy
    corners[:, 2:] -= corners[:, :2]
    columns = zip(
        np.asarray(found["labels"]).tolist(), np.asarray(found["scores"]).tolist(), corners.tolist(), strict=True
    )
    rows = [
        {"image_id": int(entry["img_id"]), "category_id": c, "score": score, "bbox": box} for c, score, box in columns
    ]
    if masks:
        for row, mask in zip(rows, found["masks"], strict=True):
            row["segmentation"] = mask
    return rows


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _torch(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as e:
        said = str(e).partition("Re-running")[0].partition("(1) In PyTorch")[0].strip()[:200]
        raise FormatError(
            f"results {path} cannot be read: {said}", hint="it is read without running what it holds"
        ) from e
