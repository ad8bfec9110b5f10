"""One request, bytes to bytes, in the compute thread: parse -> ``head.scores`` -> outputs -> encode."""

import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.boxes import Boxes, clip, decode
from calib.detect import Detections, detect
from calib.errors import NonFiniteError, ShapeError
from calib.settings import Nms

from .errors import BadRequestError, DeadlineError, reason_of
from .limits import decompress
from .models import Model, Repository
from .outputs import DETECTIONS, KNOWN, SCORES, TOP, Arrays, Wanted, detections, image_edges, top, wanted
from .schemas import RescoreRequest, parse_rescore
from .settings import ServeSettings
from .statistics import Stopwatch
from .wire import Bounds, Expected, InferRequest, Reply, check_reply_size, encode_infer, parse_infer

FEATURES, LOGITS, BOXES = "FEATURES", "LOGITS", "BOXES"
BOX_DELTAS, PROPOSALS, IMAGE_SHAPES, IMAGE_SIZES = "BOX_DELTAS", "PROPOSALS", "IMAGE_SHAPES", "IMAGE_SIZES"


@dataclass(frozen=True)
class Payload:
    """A body as it arrived, not yet decompressed."""

    body: bytearray
    coding: str | None
    header_length: str | None = None
    deadline_s: float = float("inf")
    submitted_ns: int = field(default_factory=time.perf_counter_ns)

    def check_deadline(self, timeout_us: Any = None) -> None:
        """Refuse what is already too late: by the server's deadline, or by the client's own.

        Raises:
            DeadlineError: it is. BadRequestError: the client's is no whole number of microseconds.
        """
        if timeout_us is not None and (type(timeout_us) is not int or timeout_us < 0):
            raise BadRequestError("parameter 'timeout' must be a whole number of microseconds")
        allowed = min(self.deadline_s, timeout_us / 1e6 if timeout_us else float("inf"))  # 0: none, as Triton has it
        waited = (time.perf_counter_ns() - self.submitted_ns) / 1e9
        if waited > allowed:
            raise DeadlineError(f"the request waited {waited:.3f} s, {allowed:g} s are allowed", hint="try again later")

    def content(self, limit: int) -> bytearray:
        """The decompressed body."""
        return decompress(self.body, self.coding, limit)


def inputs_of(model: Model) -> dict[str, Expected]:
    """Inputs of a model; only FEATURES is required.

    For detections: BOXES as they are, or BOX_DELTAS with PROPOSALS (and IMAGE_SHAPES, height and width, to clip them).
    IMAGE_SIZES are the rows of each image where a request holds several.
    """
    head = model.artifact.head
    any_box = (4, 4 * head.num_classes) if head.num_classes > 1 else (4,)
    return {
        FEATURES: Expected((head.feature_size,)),
        LOGITS: Expected((head.logits_size or head.num_classes + 1,)),
        BOXES: Expected(any_box, ("FP32",)),
        BOX_DELTAS: Expected(any_box, ("FP32",)),
        PROPOSALS: Expected((4,), ("FP32",)),
        IMAGE_SHAPES: Expected((2,), ("INT32",)),
        IMAGE_SIZES: Expected((), ("INT32",)),
    }


def body_limit(header_length: str | None, settings: ServeSettings) -> int:
    """Bytes of an inference body: JSON takes many times its size once parsed, tensors do not."""
    return settings.max_json_bytes if header_length is None else settings.max_body_bytes


def infer(model: Model, payload: Payload, settings: ServeSettings) -> Reply:
    """Answer ``POST .../infer``.

    Raises:
        CalibError: whatever is wrong with the request.
    """
    watch = Stopwatch(payload.submitted_ns)
    try:
        bounds = Bounds(settings.max_rows, settings.max_json_header_bytes, settings.max_reply_bytes)
        payload.check_deadline()
        content = payload.content(body_limit(payload.header_length, settings))
        request = parse_infer(content, payload.header_length, inputs_of(model), bounds)
        payload.check_deadline(request.parameters.get("timeout"))
        question = _Question.of(model, request, settings, bounds)
        watch.lap()
        scores = _scores(model, question.features, question.logits)
        watch.lap()
        found = question.answer(scores.numpy())
        outputs = [(name, found[name], binary) for name, binary in question.outputs.items()]
        reply = encode_infer(model.name, model.version, request.request_id, outputs)
        watch.lap()
    except Exception as e:
        watch.failed(model.statistics, reason_of(e))
        raise
    rows = len(question.features)
    return replace(reply, record=_record(model, rows, watch.succeeded(model.statistics, rows)))


def _record(model: Model, rows: int, times: dict[str, float]) -> dict[str, Any]:
    return {"model": model.name, "version": model.version, "rows": rows, **times}


@dataclass(frozen=True)
class _Question:
    """A request that fits its model."""

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
        unknown = next((name for name in outputs if name not in KNOWN), None)
        if unknown is not None:
            raise BadRequestError(f"output '{unknown[:64]}' is not known: expected {', '.join(KNOWN)}")
        asked = wanted(request.parameters, model.nms)
        if asked.score_dtype == "FP16" and not outputs.get(SCORES, True):
            raise BadRequestError("SCORES of score_dtype FP16 go out as binary only")
        if FEATURES not in request.tensors:
            raise BadRequestError(f"input '{FEATURES}' is missing")
        n, classes = len(request.tensors[FEATURES]), model.artifact.head.num_classes
        for name, tensor in request.tensors.items():
            if name not in (IMAGE_SIZES, IMAGE_SHAPES) and len(tensor) != n:
                raise ShapeError(f"input '{name}' has {len(tensor)} rows, {FEATURES} has {n}")
        sizes = request.tensors.get(IMAGE_SIZES)
        edges = image_edges(None if sizes is None else sizes.numpy(), n, settings.max_images)
        boxes = _boxes(model, request, edges) if any(name in DETECTIONS for name in outputs) else None
        entries = (len(edges) - 1) * (asked.topk if any(name in TOP for name in outputs) else asked.nms.max_detections)
        numbers = {name: n * classes if name == SCORES else 4 * min(entries, n * classes) for name in outputs}
        for name, binary in outputs.items():
            check_reply_size(numbers[name], binary, bounds)
        features = _usable(request.tensors[FEATURES], FEATURES)
        logits = request.tensors.get(LOGITS)
        usable = None if logits is None else _usable(logits, LOGITS)
        return cls(features, usable, boxes, edges, outputs, asked, model.min_box_side)

    def answer(self, scores: NDArray[np.float32]) -> Arrays:
        """The arrays behind ``outputs``, from [N, C] scores."""
        found: Arrays = {}
        if SCORES in self.outputs:
            found[SCORES] = scores if self.asked.score_dtype == "FP32" else scores.astype(np.float16)
        if any(name in TOP for name in self.outputs):
            found |= top(scores, self.edges, self.asked)
        if self.boxes is not None:
            found |= detections(scores, self.boxes, self.edges, self.asked, self.min_box_side)
        return found


def _boxes(model: Model, request: InferRequest, edges: NDArray[np.int64]) -> Boxes:
    """[N, 4] or [N, C, 4]: BOXES, or BOX_DELTAS applied to PROPOSALS and clipped to IMAGE_SHAPES."""
    given = {name: tensor.numpy() for name, tensor in request.tensors.items() if name not in (FEATURES, LOGITS)}
    if (BOXES in given) == (BOX_DELTAS in given):
        raise BadRequestError(f"detections need either {BOXES}, or {BOX_DELTAS} with {PROPOSALS}")
    for name in (BOXES, BOX_DELTAS, PROPOSALS):
        if name in given and not np.isfinite(given[name]).all():
            raise NonFiniteError(f"input '{name}' holds NaN or infinity")
    if BOXES in given:
        boxes = given[BOXES]
        return np.ascontiguousarray(boxes if boxes.shape[1] == 4 else boxes.reshape(len(boxes), -1, 4))
    if PROPOSALS not in given:
        raise BadRequestError(f"input '{BOX_DELTAS}' needs '{PROPOSALS}'")
    weights = tuple(float(w) for w in model.artifact.info.detector.get("box_weights", (10.0, 10.0, 5.0, 5.0)))
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


def _usable(tensor: Tensor, name: str) -> Tensor:
    """[N, width] of any float type at any address -> finite float32 on an aligned one.

    Rounding inside a matrix product may depend on the address of its operands: aligned as torch aligns, the
    same numbers give the same scores whatever the length of the JSON in front of them.
    """
    if tensor.numel():
        low, high = tensor.aminmax()  # NaN passes through to both
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise NonFiniteError(f"input '{name}' holds NaN or infinity")
    return torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)


def _scores(model: Model, features: Tensor, logits: Tensor | None) -> Tensor:
    """[N, D], [N, C+1] -> [N, C] float32."""
    with torch.inference_mode():
        scores = model.artifact.head.scores(features, logits)
        if scores.numel() and not bool(torch.isfinite(scores.sum())):
            raise NonFiniteError("the scores are not finite: features or logits are too large for this head")
    return scores


def rescore(repository: Repository, payload: Payload, settings: ServeSettings) -> Reply:
    """Answer ``POST /v1/rescore``: detections of one image as JSON.

    Raises:
        CalibError: whatever is wrong with the request.
    """
    watch = Stopwatch(payload.submitted_ns)
    payload.check_deadline()
    request = parse_rescore(payload.content(settings.max_json_bytes))
    version = None if request.version is None else str(request.version)
    model = repository.find(request.model, version)
    try:
        features, logits, boxes = _arrays(request, model, settings.max_rows)
        nms = _nms(model.nms, request)
        watch.lap()
        scores = _scores(model, features, logits)
        found = detect(scores.contiguous().numpy(), boxes, nms, min_box_side=model.min_box_side)
        watch.lap()
        reply = _detections_json(model, found)
        watch.lap()
    except Exception as e:
        watch.failed(model.statistics, reason_of(e))
        raise
    times = watch.succeeded(model.statistics, len(features))
    return Reply(reply, record=_record(model, len(features), times))


def _arrays(request: RescoreRequest, model: Model, max_rows: int) -> tuple[Tensor, Tensor | None, NDArray[np.float32]]:
    n, head = len(request.features), model.artifact.head
    if n > max_rows:
        raise BadRequestError(f"features has {n} rows: at most {max_rows} are accepted")
    if len(request.boxes) != n or (request.logits is not None and len(request.logits) != n):
        raise ShapeError(f"features has {n} rows: boxes (and logits) must have as many")
    features = torch.from_numpy(_matrix(request.features, "features", head.feature_size))
    logits = None
    if request.logits is not None:
        logits = torch.from_numpy(_matrix(request.logits, "logits", head.num_classes + 1))
    return features, logits, _matrix(request.boxes, "boxes", 4)


def _matrix(rows: list[list[float]], name: str, width: int) -> NDArray[np.float32]:
    """Rows of numbers -> [N, width] finite float32."""
    for i, row in enumerate(rows):
        if len(row) != width:
            raise ShapeError(f"{name}.{i} has {len(row)} numbers: expected {width}")
    with np.errstate(over="ignore"):
        matrix = np.array(rows, dtype=np.float32).reshape(len(rows), width)
    if not np.isfinite(matrix).all():
        raise NonFiniteError(f"{name} holds numbers too large for float32")
    return matrix


def _nms(defaults: Nms, request: RescoreRequest) -> Nms:
    asked = {name: getattr(request, name) for name in Nms.__dataclass_fields__}
    return replace(defaults, **{name: value for name, value in asked.items() if value is not None})


def _detections_json(model: Model, found: Detections) -> bytes:
    info = model.artifact.info
    detections: list[dict[str, Any]] = [
        {
            "row": row,
            "category_id": info.category_ids[category],
            "category_index": category,
            "category_name": info.category_names[category],
            "score": score,
            "box": box,
        }
        for row, category, score, box in zip(
            found.row.tolist(),
            found.category.tolist(),
            found.score,
            np.ascontiguousarray(found.box),
            strict=True,
        )
    ]
    reply = {"model_name": model.name, "model_version": str(model.version), "detections": detections}
    return orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)
