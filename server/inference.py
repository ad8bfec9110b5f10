"""``POST .../infer``, bytes to bytes, in the compute thread: parse -> scores -> outputs -> encode."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.boxes import Boxes, clip, decode
from calib.errors import NonFiniteError, ShapeError
from calib.heads.base import Head

from .compute import Compute
from .errors import BadRequestError, reason_of
from .formats.outputs import DETECTIONS, KNOWN, SCORES, TOP, Arrays, Wanted, detections, image_edges, top, wanted
from .formats.wire import Bounds, Expected, InferRequest, Reply, check_reply_size, encode_infer, parse_infer
from .models import Model
from .payload import Payload, body_limit
from .serve_settings import ServeSettings
from .statistics import Stopwatch

FEATURES, LOGITS, BOXES = "FEATURES", "LOGITS", "BOXES"
BOX_DELTAS, PROPOSALS, IMAGE_SHAPES, IMAGE_SIZES = "BOX_DELTAS", "PROPOSALS", "IMAGE_SHAPES", "IMAGE_SIZES"


def inputs_of(model: Model) -> dict[str, Expected]:
    """Inputs of a model; only FEATURES is required.

    For detections: BOXES as they are, or BOX_DELTAS with PROPOSALS (and IMAGE_SHAPES, height and width, to clip them).
    IMAGE_SIZES are the rows of each image where a request holds several.
    """
    head = model.head
    any_box = (4, 4 * head.num_classes) if head.num_classes > 1 else (4,)
    return {
        FEATURES: Expected((head.feature_size,)),
        LOGITS: Expected((model.info.logits_size,)),
        BOXES: Expected(any_box, ("FP32",)),
        BOX_DELTAS: Expected(any_box, ("FP32",)),
        PROPOSALS: Expected((4,), ("FP32",)),
        IMAGE_SHAPES: Expected((2,), ("INT32",)),
        IMAGE_SIZES: Expected((), ("INT32",)),
    }


def infer(model: Model, payload: Payload, settings: ServeSettings, compute: Compute) -> Reply:
    """Answer ``POST .../infer``.

    Raises:
        CalibError: whatever is wrong with the request.
    """
    watch = Stopwatch(payload.submitted_ns)
    try:
        bounds = Bounds(settings.max_rows, settings.max_json_header_bytes, settings.max_reply_bytes)
        payload.check_wanted()
        content = payload.content(body_limit(payload.header_length, settings))
        request = parse_infer(content, payload.header_length, inputs_of(model), bounds)
        payload.check_wanted(request.parameters.get("timeout"))
        question = _Question.of(model, request, settings, bounds)
        watch.lap()
        scores = compute.scores(model.head, question.features, question.logits)
        watch.lap()
        payload.check_wanted()
        found = question.answer(scores, payload.check_wanted)
        outputs = [(name, found[name], binary) for name, binary in question.outputs.items()]
        reply = encode_infer(model.name, model.version, request.request_id, outputs)
        watch.lap()
    except Exception as e:
        watch.failed(model.statistics, reason_of(e))
        raise
    rows = len(question.features)
    return replace(reply, record=record_of(model, rows, watch.succeeded(model.statistics, rows)))


def record_of(model: Model, rows: int, times: dict[str, float]) -> dict[str, Any]:
    """What the access log says of an answered request."""
    return {"model": model.name, "version": model.version, "rows": rows, **times}


@dataclass(frozen=True)
class _Question:
    """A request that fits its model."""

    head: Head
    features: Tensor
    logits: Tensor | None
    boxes: Boxes | None
    edges: NDArray[np.int64]
    outputs: dict[str, bool]
    asked: Wanted
    min_box_side: float

    @classmethod
    def of(cls, model: Model, request: InferRequest, settings: ServeSettings, bounds: Bounds) -> "_Question":
        outputs = request.outputs or {SCORES: request.binary}
        if set(outputs) == set(KNOWN) and not {BOXES, BOX_DELTAS, PROPOSALS} & set(request.tensors):
            # Who asks for everything that the metadata list, as perf_analyzer does, gets what can be computed.
            outputs = {name: binary for name, binary in outputs.items() if name not in DETECTIONS}
        unknown = next((name for name in outputs if name not in KNOWN), None)
        if unknown is not None:
            raise BadRequestError(f"output '{unknown[:64]}' is not known: expected {', '.join(KNOWN)}")
        asked = wanted(request.parameters, model.nms)
        if asked.score_dtype == "FP16" and not outputs.get(SCORES, True):
            raise BadRequestError("SCORES of score_dtype FP16 go out as binary only")
        if FEATURES not in request.tensors:
            raise BadRequestError(f"input '{FEATURES}' is missing")
        n, classes = len(request.tensors[FEATURES]), model.head.num_classes
        for name, tensor in request.tensors.items():
            if name not in (IMAGE_SIZES, IMAGE_SHAPES) and len(tensor) != n:
                raise ShapeError(f"input '{name}' has {len(tensor)} rows, {FEATURES} has {n}")
        sizes = request.tensors.get(IMAGE_SIZES)
        edges = image_edges(None if sizes is None else sizes.numpy(), n, settings.max_images)
        boxes = _boxes(model, request, edges) if any(name in DETECTIONS for name in outputs) else None
        entries = (len(edges) - 1) * (asked.topk if any(name in TOP for name in outputs) else asked.nms.max_detections)
        numbers = {name: n * classes if name == SCORES else 4 * min(entries, n * classes) for name in outputs}
        check_reply_size(((numbers[name], binary) for name, binary in outputs.items()), bounds)
        for name in (BOXES, BOX_DELTAS, PROPOSALS):
            if name in request.tensors and not bool(request.tensors[name].isfinite().all()):
                raise NonFiniteError(f"input '{name}' holds NaN or infinity")
        features, logits = request.tensors[FEATURES], request.tensors.get(LOGITS)
        return cls(model.head, features, logits, boxes, edges, outputs, asked, model.min_box_side)

    def answer(self, scores: NDArray[np.float32], check: Callable[[], None]) -> Arrays:
        """The arrays behind ``outputs``, from [N, C] scores; what ``check`` raises ends the work."""
        found: Arrays = {}
        if SCORES in self.outputs:
            half = self.asked.score_dtype == "FP16"  # torch rounds as NumPy does, many times faster
            found[SCORES] = torch.from_numpy(scores).half().numpy() if half else scores
        if any(name in TOP for name in self.outputs):
            found |= top(scores, self.edges, self.asked)
        if self.boxes is not None:
            found |= detections(self.head, scores, self.boxes, self.edges, self.asked, self.min_box_side, check)
        return found


def _boxes(model: Model, request: InferRequest, edges: NDArray[np.int64]) -> Boxes:
    """[N, 4] or [N, C, 4]: BOXES, or BOX_DELTAS applied to PROPOSALS and clipped to IMAGE_SHAPES."""
    given = {name: tensor.numpy() for name, tensor in request.tensors.items() if name not in (FEATURES, LOGITS)}
    if (BOXES in given) == (BOX_DELTAS in given):
        raise BadRequestError(f"detections need either {BOXES}, or {BOX_DELTAS} with {PROPOSALS}")
    if BOXES in given:
        boxes = given[BOXES]
        return np.ascontiguousarray(boxes if boxes.shape[1] == 4 else boxes.reshape(len(boxes), -1, 4))
    if PROPOSALS not in given:
        raise BadRequestError(f"input '{BOX_DELTAS}' needs '{PROPOSALS}'")
    weights = tuple(float(w) for w in model.info.detector.get("box_weights", (10.0, 10.0, 5.0, 5.0)))
    deltas = given[BOX_DELTAS]
    with np.errstate(over="ignore", invalid="ignore"):
        boxes = decode(deltas.reshape(len(deltas), -1, 4), given[PROPOSALS], weights)
    if not np.isfinite(boxes).all():
        raise NonFiniteError(f"'{BOX_DELTAS}' and '{PROPOSALS}' give boxes that are not finite")
    shapes = given.get(IMAGE_SHAPES)
    if shapes is not None:
        if len(shapes) != len(edges) - 1 or (shapes < 1).any():
            raise BadRequestError(f"'{IMAGE_SHAPES}' must be height and width of each of {len(edges) - 1} images")
        for (height, width), start, stop in zip(shapes.tolist(), edges[:-1], edges[1:], strict=True):
            boxes[start:stop] = clip(boxes[start:stop], height, width)
    return np.ascontiguousarray(boxes[:, 0] if boxes.shape[1] == 1 else boxes)
