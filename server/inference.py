"""One request, bytes to bytes, in the compute thread: parse -> ``head.scores`` -> ``detect`` -> encode."""

import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.detect import Detections, detect
from calib.errors import NonFiniteError, ShapeError
from calib.settings import Nms

from .errors import BadRequestError
from .limits import decompress
from .models import Model, Repository
from .schemas import RescoreRequest, parse_rescore
from .settings import ServeSettings
from .statistics import Stopwatch
from .wire import Bounds, InferRequest, Reply, check_reply_size, encode_infer, parse_infer

FEATURES, LOGITS = "FEATURES", "LOGITS"


@dataclass(frozen=True)
class Payload:
    """A body as it arrived, not yet decompressed."""

    body: bytearray
    coding: str | None
    header_length: str | None = None
    submitted_ns: int = field(default_factory=time.perf_counter_ns)

    def content(self, limit: int) -> bytearray:
        """The decompressed body."""
        return decompress(self.body, self.coding, limit)


def input_widths(model: Model) -> dict[str, int]:
    """Inputs of a model and the length of their rows; only FEATURES is required."""
    head = model.artifact.head
    return {FEATURES: head.feature_size, LOGITS: head.num_classes + 1}


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
        content = payload.content(body_limit(payload.header_length, settings))
        request = parse_infer(content, payload.header_length, input_widths(model), bounds)
        features, logits = _inputs(request)
        check_reply_size(len(features), model.artifact.head.num_classes, request.binary_scores, bounds)
        watch.lap()
        scores = _scores(model, features, logits)
        watch.lap()
        reply = encode_infer(model.name, model.version, request.request_id, scores, request.binary_scores)
        watch.lap()
    except Exception:
        watch.failed(model.statistics)
        raise
    watch.succeeded(model.statistics, len(features))
    return reply


def _inputs(request: InferRequest) -> tuple[Tensor, Tensor | None]:
    if FEATURES not in request.tensors:
        raise BadRequestError(f"input '{FEATURES}' is missing")
    features = _usable(request.tensors[FEATURES], FEATURES)
    logits = request.tensors.get(LOGITS)
    return features, None if logits is None else _usable(logits, LOGITS)


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


def rescore(repository: Repository, payload: Payload, settings: ServeSettings) -> bytes:
    """Answer ``POST /v1/rescore``: detections of one image as JSON.

    Raises:
        CalibError: whatever is wrong with the request.
    """
    watch = Stopwatch(payload.submitted_ns)
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
    except Exception:
        watch.failed(model.statistics)
        raise
    watch.succeeded(model.statistics, len(features))
    return reply


def _arrays(request: RescoreRequest, model: Model, max_rows: int) -> tuple[Tensor, Tensor | None, NDArray[np.float32]]:
    n, widths = len(request.features), input_widths(model)
    if n > max_rows:
        raise BadRequestError(f"features has {n} rows: at most {max_rows} are accepted")
    if len(request.boxes) != n or (request.logits is not None and len(request.logits) != n):
        raise ShapeError(f"features has {n} rows: boxes (and logits) must have as many")
    features = torch.from_numpy(_matrix(request.features, "features", widths[FEATURES]))
    logits = None
    if request.logits is not None:
        logits = torch.from_numpy(_matrix(request.logits, "logits", widths[LOGITS]))
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
