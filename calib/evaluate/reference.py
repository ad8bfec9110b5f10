"""The official evaluators, to check ours against: the lvis package and pycocotools.

They take minutes and gigabytes where ours takes seconds. The lvis package still uses ``np.float``, which numpy 2
removed: it is put back while the package runs.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Literal

import numpy as np

from calib.errors import InputError

from .evaluation import Evaluation
from .results import Detections

Engine = Literal["lvis", "coco"]


def reference(
    document: Any, detections: Detections, engine: Engine, iou_type: str, max_detections: int
) -> dict[str, Any]:
    """Metrics and arrays of the official evaluator.

    Returns ``metrics`` (AP, AP50, ..., as fractions), ``precision`` [T, R, C, A] and ``recall`` [T, C, A].

    Raises:
        InputError: the official evaluator refuses the input; no detections at all, for one.
    """
    rows = _rows(detections, iou_type)
    with _quietly():
        try:
            if engine == "lvis":
                return _lvis(deepcopy(document), rows, iou_type, max_detections)
            return _coco(deepcopy(document), rows, iou_type, max_detections)
        except (AssertionError, IndexError, KeyError, TypeError, ValueError) as e:
            raise InputError(
                f"the {engine} engine refuses this input: {type(e).__name__}: {e}", hint="evaluate without --engine"
            ) from e


def largest_difference(evaluation: Evaluation, theirs: dict[str, Any]) -> float:
    """Over all precision and recall values; 0 when they are equal to the last bit."""
    assert evaluation.precision is not None and evaluation.recall is not None
    pairs = ((evaluation.precision, theirs["precision"]), (evaluation.recall, theirs["recall"]))
    return max((float(np.abs(ours - other).max(initial=0)) for ours, other in pairs), default=0.0)


def _rows(detections: Detections, iou_type: str) -> list[dict[str, Any]]:
    d = detections
    columns = zip(d.image_id.tolist(), d.category_id.tolist(), d.score.tolist(), strict=True)
    rows: list[dict[str, Any]] = [{"image_id": i, "category_id": c, "score": s} for i, c, s in columns]
    if d.has_boxes:
        for row, box in zip(rows, d.box.tolist(), strict=True):
            row["bbox"] = box
    if iou_type == "segm":
        assert d.segmentation is not None
        for row, mask in zip(rows, d.segmentation, strict=True):
            row["segmentation"] = deepcopy(mask)
    return rows


def _lvis(document: Any, rows: list[dict[str, Any]], iou_type: str, max_detections: int) -> dict[str, Any]:
    from lvis import LVIS, LVISEval, LVISResults

    truth = LVIS.__new__(LVIS)  # its constructor takes a file name only
    truth.logger, truth.dataset = logging.getLogger("lvis"), document
    truth._create_index()
    judged = LVISEval(truth, LVISResults(truth, rows, max_dets=max_detections), iou_type)
    judged.params.max_dets = max_detections
    judged.run()
    metrics = {name.split("@")[0]: float(value) for name, value in judged.results.items()}
    return {"metrics": metrics, "precision": judged.eval["precision"], "recall": judged.eval["recall"]}


def _coco(document: Any, rows: list[dict[str, Any]], iou_type: str, max_detections: int) -> dict[str, Any]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    for row in document["annotations"]:
        row.setdefault("iscrowd", 0)  # the package cannot do without
    truth = COCO()
    truth.dataset = document
    truth.createIndex()
    judged = COCOeval(truth, truth.loadRes(rows), iou_type)
    judged.params.maxDets = [max_detections] * 3 if max_detections > 0 else [len(rows)] * 3
    judged.evaluate()
    judged.accumulate()
    precision, recall = judged.eval["precision"][..., -1], judged.eval["recall"][..., -1]
    return {"metrics": _coco_metrics(precision, recall), "precision": precision, "recall": recall}


def _coco_metrics(precision: Any, recall: Any) -> dict[str, float]:
    """As COCOeval's summary; that itself knows only its own three caps."""

    def mean(values: Any) -> float:
        return float(values[values > -1].mean()) if (values > -1).any() else -1.0

    metrics = {"AP": mean(precision[..., 0]), "AP50": mean(precision[0, ..., 0]), "AP75": mean(precision[5, ..., 0])}
    metrics |= {f"AP{letter}": mean(precision[..., a]) for a, letter in enumerate("sml", 1)}
    metrics["AR"] = mean(recall[..., 0])
    return metrics | {f"AR{letter}": mean(recall[..., a]) for a, letter in enumerate("sml", 1)}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the packages print and log, and with the name they miss."""
    had = hasattr(np, "float")
    if not had:
        np.float = float  # type: ignore[attr-defined]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        if not had:
            del np.float  # type: ignore[attr-defined]
