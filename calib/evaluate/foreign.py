"""Results as other frameworks leave them, read by the rules of the framework that wrote them. None is executed.

Detectron2's ``instances_predictions.pth``: a list of ``{image_id, instances: [{category_id, bbox, score, ...}]}``.
Classes go by ascending category id (``load_coco_json``); the size of a detection with a mask is that of the mask (both
evaluators drop the boxes first). mmdetection 3's ``results.pkl``: a list of ``{img_id, pred_instances: {labels, scores,
bboxes, masks, mask_scores}}``. Classes go in the order of the json's categories, whatever the order of the config's
names (``CocoDataset`` and ``CocoMetric`` take ``getCatIds``, LVIS's ``get_cat_ids``); masks have the score
``mask_scores`` where there is one; sizes are those of masks in ``CocoMetric``, of boxes in ``LVISMetric``. A results
json has category ids; sizes are those of boxes where it has boxes, as in pycocotools and lvis.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import FormatError, InputError, SettingError
from calib.files import read_json, require
from calib.pickles import read_pickle, read_torch

from .ground_truth import GroundTruth
from .results import Detections

ENDINGS = (".pth", ".pt", ".pkl")
# How class indices become categories: by ascending id; as the ground truth lists them; k has the id k + 1.
ORDERS = ("id", "json", "id-1")
SIZES = ("box", "mask")
_HINT = "instances_predictions.pth of Detectron2, results.pkl of mmdetection 3, or a results json of any tool"


@dataclass(frozen=True)
class Reading:
    """What the user knows of the files; empty: the rule of the framework that wrote them.

    ``classes``: one of ``ORDERS``, or a file with the name of class k on line k (or a JSON list). ``sizes``: whether a
    detection with a mask is as large as its box or as its mask.
    """

    classes: str = ""
    sizes: str = ""

    def __post_init__(self) -> None:
        if self.sizes not in ("", *SIZES):
            raise SettingError(f"sizes must be {' or '.join(SIZES)}, got '{self.sizes}'")


def read_results(path: Path, truth: GroundTruth, *, masks: bool = False, reading: Reading = Reading()) -> Detections:
    """Results of any kind.

    Raises:
        As ``Detections.read``; InputError: a class index, or a name, that is no category of ``truth``.
            SettingError: classes of a file that has category ids.
    """
    if path.suffix not in ENDINGS:
        if reading.classes:
            raise SettingError(
                f"{path} has category ids: no class index is to be named", hint="--classes goes with .pth and .pkl"
            )
        return _sized(Detections.read(path, masks=masks), "", reading.sizes)
    content = (read_torch if _is_zip(require(path, "results")) else read_pickle)(path, "results")
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise FormatError(f"{path} is no list of images", hint=_HINT)
    is_mmdetection = bool(content) and all("pred_instances" in entry for entry in content)
    try:
        if is_mmdetection:
            rows = [row for entry in content for row in _of_mmdetection(entry, masks=masks)]
        else:
            rows = [dict(row) for entry in content for row in entry["instances"]]
        label = np.asarray([int(row["category_id"]) for row in rows], np.int64)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise FormatError(f"{path} holds no results that are known: {e!r}", hint=_HINT) from e
    ids = category_ids(truth, reading.classes or ("json" if is_mmdetection else "id"))
    _name(rows, label, ids, path)
    found = Detections.from_document(rows, str(path), masks=masks)
    if not reading.classes:
        found = replace(found, rules_used=_other_orders(truth, "mmdetection" if is_mmdetection else "Detectron2"))
    return _sized(found, "box" if is_mmdetection and truth.style == "lvis" else "mask", reading.sizes)


def category_ids(truth: GroundTruth, classes: str) -> NDArray[np.int64]:
    """The category id of every class index; ``classes`` as in ``Reading``.

    Raises:
        MissingFileError, FormatError: no such file, or no names in it. InputError: a name that is not exactly one
            category of the ground truth, or is there twice.
    """
    if classes == "id":
        return truth.category_ids
    if classes == "json":
        return np.asarray(truth.listed or truth.category_ids, np.int64)
    if classes == "id-1":
        return np.arange(1, int(truth.category_ids.max(initial=0)) + 1)
    path = require(Path(classes), "list of classes", hint=f"--classes takes {', '.join(ORDERS)}, or a file of names")
    names = _names(path)
    ids = dict(zip(truth.names, truth.category_ids.tolist(), strict=True))
    wrong = next((n for n in names if truth.names.count(n) != 1 or names.count(n) != 1), None)
    if wrong is not None:
        raise InputError(
            f"{path}: the class '{wrong}' must stand once in it and once in the ground truth, stands "
            f"{names.count(wrong)} and {truth.names.count(wrong)} times",
            hint="a name per line, in the order of class indices",
        )
    return np.asarray([ids[n] for n in names], np.int64)


def _names(path: Path) -> Sequence[str]:
    if path.suffix == ".json":
        names = read_json(path, "list of classes")
    else:
        try:
            names = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as e:
            raise FormatError(f"list of classes {path} cannot be read: {e}", hint="a name per line, in UTF-8") from e
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise FormatError(f"{path} is no list of names", hint="a name per line, or a JSON list of strings")
    return names


def _name(rows: list[dict[str, Any]], label: NDArray[np.int64], ids: NDArray[np.int64], path: Path) -> None:
    """Category ids in the place of class indices."""
    strange = (label < 0) | (label >= len(ids))
    if strange.any():
        raise InputError(
            f"{path} has class index {label[strange].max()}: there are {len(ids)} classes, counted from 0",
            hint="results of another data set? or of other classes than the ground truth's: --classes FILE names them",
        )
    for row, category_id in zip(rows, ids[label].tolist(), strict=True):
        row["category_id"] = category_id


def _other_orders(truth: GroundTruth, framework: str) -> tuple[str, ...]:
    """Notices where the rule of the framework matters, as another would give other classes."""
    notices = []
    by_id, by_json = (category_ids(truth, order).tolist() for order in ("id", "json"))
    rules = {"id": "by ascending category id", "json": "in the order of the ground truth's categories"}
    own, other = ("json", "id") if framework == "mmdetection" else ("id", "json")
    if by_id != by_json:
        notices.append(f"classes are numbered {rules[own]}, as {framework} does; {rules[other]}: --classes {other}")
    if framework == "Detectron2" and truth.style == "lvis" and by_id != list(range(1, len(by_id) + 1)):
        notices.append(
            "classes are numbered by ascending category id; Detectron2's LVISEvaluator adds 1: --classes id-1"
        )
    return tuple(notices)


def _sized(found: Detections, own: str, chosen: str) -> Detections:
    """``found`` with sizes of boxes or of masks; ``own``: the framework's rule, empty for that of pycocotools."""
    if found.segmentation is None:
        return found
    if not found.has_boxes:
        if chosen == "box":
            raise InputError(f"{found.source} has no boxes", hint="leave --sizes box out")
        return found
    if not chosen and not own and len(found):
        notice = (
            "sizes (APs, APm, APl) are those of boxes, as in pycocotools where results have a bbox; Detectron2 and "
            "mmdetection's CocoMetric take those of masks: --sizes mask"
        )
        found = replace(found, rules_used=(*found.rules_used, notice))
    if (chosen or own) == "mask":
        return replace(found, has_boxes=False, box=np.zeros_like(found.box))
    return found


def _of_mmdetection(entry: dict[str, Any], *, masks: bool) -> list[dict[str, Any]]:
    found = entry["pred_instances"]
    corners = np.asarray(found["bboxes"]).astype(np.float64).reshape(-1, 4)  # a copy
    corners[:, 2:] -= corners[:, :2]
    scores = found.get("mask_scores", found["scores"]) if masks else found["scores"]
    columns = zip(np.asarray(found["labels"]).tolist(), np.asarray(scores).tolist(), corners.tolist(), strict=True)
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
