"""``POST /v1/rescore``: proposals in, detections after NMS out, as JSON or as an Arrow IPC stream either way.

Letters: N proposals, B images, C foreground classes, K detections.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.boxes import Boxes
from calib.errors import NonFiniteError, ShapeError
from calib.score.by_size import by_size
from calib.score.detect import detect
from calib.settings import Nms

from .compute import Compute
from .errors import BadRequestError, TooLargeError, reason_of
from .formats import arrow
from .formats.schemas import RescoreOptions, RescoreRequest, parse_options, parse_rescore
from .formats.wire import Reply
from .inference import record_of
from .models import Model, Repository
from .payload import Payload
from .serve_settings import ServeSettings
from .statistics import Stopwatch

JSON = "application/json"
FORMS = (JSON, arrow.MEDIA_TYPE)
_BYTES_PER_DETECTION = {JSON: 256, arrow.MEDIA_TYPE: 48}


@dataclass(frozen=True)
class Proposals:
    """Proposals that fit their model. ``edges`` [B + 1] are the first rows of images, ``images`` [B] their names."""

    features: Tensor
    logits: Tensor | None
    boxes: Boxes
    edges: NDArray[np.int64]
    images: NDArray[np.int64] | None


def rescore(
    repository: Repository, payload: Payload, settings: ServeSettings, compute: Compute, forms: tuple[str, str]
) -> Reply:
    """Detections of every image; ``forms`` are the media types of the request and of the reply.

    Raises:
        CalibError: whatever is wrong with the request.
    """
    watch = Stopwatch(payload.submitted_ns)
    payload.check_wanted()
    stream = request = None
    options: RescoreOptions
    if forms[0] == JSON:
        options = request = parse_rescore(payload.content(settings.max_json_bytes))
    else:
        content = payload.content(settings.max_body_bytes)
        stream = arrow.read_stream(content, settings.max_rows, settings.max_json_header_bytes)
        options = parse_options(stream.metadata)
    model = repository.find(options.model, None if options.version is None else str(options.version))
    try:
        if request is not None:
            proposals = _from_json(request, model, settings.max_rows)
        else:
            assert stream is not None
            proposals = _from_arrow(stream, model, settings.max_images)
        nms = _nms(model.nms, options)
        watch.lap()
        scores = compute.scores(model.head, proposals.features, proposals.logits)
        found = _detections(model, proposals, scores, nms, payload.check_wanted)
        watch.lap()
        size = len(found["row"]) * _BYTES_PER_DETECTION[forms[1]]
        if size > settings.max_reply_bytes:
            raise TooLargeError(
                f"the reply would have about {size} bytes: at most {settings.max_reply_bytes} are sent",
                hint="ask for fewer detections",
            )
        body = (_as_json if forms[1] == JSON else _as_arrow)(model, found)
        watch.lap()
    except Exception as e:
        watch.failed(model.statistics, reason_of(e))
        raise
    rows = len(proposals.features)
    record = record_of(model, rows, watch.succeeded(model.statistics, rows))
    return Reply(body, media_type=forms[1], record=record)


def _from_json(request: RescoreRequest, model: Model, max_rows: int) -> Proposals:
    n, head = len(request.features), model.head
    if n > max_rows:
        raise BadRequestError(f"features has {n} rows: at most {max_rows} are accepted")
    if len(request.boxes) != n or (request.logits is not None and len(request.logits) != n):
        raise ShapeError(f"features has {n} rows: boxes (and logits) must have as many")
    features = torch.from_numpy(_matrix(request.features, "features", head.feature_size))
    logits = None
    if request.logits is not None:
        logits = torch.from_numpy(_matrix(request.logits, "logits", model.info.logits_size))
    return Proposals(features, logits, _matrix(request.boxes, "boxes", 4), np.array([0, n]), None)


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


def _from_arrow(stream: arrow.Stream, model: Model, max_images: int) -> Proposals:
    head = model.head
    features = torch.from_numpy(stream.matrix("features", [head.feature_size]))
    logits = torch.from_numpy(stream.matrix("logits", [model.info.logits_size])) if stream.has("logits") else None
    boxes = stream.matrix("boxes", [4, 4 * head.num_classes], [pa.float32()])
    if not np.isfinite(boxes).all():
        raise NonFiniteError("column 'boxes' holds NaN or infinity")
    if boxes.shape[1] != 4:
        boxes = boxes.reshape(len(boxes), -1, 4)
    n = len(features)
    if not stream.has("image"):
        return Proposals(features, logits, boxes, np.array([0, n]), None)
    image = stream.integers("image")
    edges = np.concatenate([[0], np.flatnonzero(np.diff(image)) + 1, [n]]) if n else np.zeros(1, np.int64)
    names = image[edges[:-1]]
    if len(names) > max_images:
        raise BadRequestError(f"the stream holds {len(names)} images: at most {max_images} are accepted")
    if len(np.unique(names)) != len(names):
        raise BadRequestError("proposals of one image must follow each other", hint="sort by image")
    return Proposals(features, logits, boxes, edges, names)


def _nms(defaults: Nms, options: RescoreOptions) -> Nms:
    asked = {name: getattr(options, name) for name in Nms.__dataclass_fields__}
    return replace(defaults, **{name: value for name, value in asked.items() if value is not None})


def _detections(
    model: Model, proposals: Proposals, scores: NDArray[np.float32], nms: Nms, check: Callable[[], None]
) -> dict[str, NDArray[Any]]:
    """Columns of [K] or [K, 4], image after image, best first; what ``check`` raises ends the work."""
    parts: list[Sequence[NDArray[Any]]] = []
    for k, (start, stop) in enumerate(pairwise(proposals.edges.tolist())):
        part = np.ascontiguousarray(scores[start:stop])
        one = detect(part, proposals.boxes[start:stop], nms, min_box_side=model.min_box_side, check=check)
        one = by_size(model.head, one)
        image = np.full(len(one.score), k if proposals.images is None else proposals.images[k])
        parts.append((image, one.row + start, one.category, one.score, one.box.reshape(-1, 4)))
    types = (np.int64, np.int32, np.int32, np.float32, np.float32)
    empty = [np.zeros((0, 4) if k == 4 else 0, dtype) for k, dtype in enumerate(types)]
    columns = [np.concatenate([empty[k], *(p[k] for p in parts)]).astype(types[k]) for k in range(5)]
    image, row, category, score, box = columns
    named = {} if proposals.images is None else {"image": image}
    ids = np.asarray(model.info.category_ids, np.int64)[category]
    return named | {"row": row, "category_id": ids, "category_index": category, "score": score, "box": box}


def _as_json(model: Model, found: dict[str, NDArray[Any]]) -> bytes:
    lists = {name: array.tolist() for name, array in found.items() if name not in ("score", "box")}
    # float32 as they are: orjson writes the shortest digits that give the same float32.
    lists |= {"score": found["score"], "box": np.ascontiguousarray(found["box"])}
    names = model.info.category_names
    detections = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    for one in detections:
        one["category_name"] = names[one["category_index"]]
    reply = {"model_name": model.name, "model_version": str(model.version), "detections": detections}
    return orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)


def _as_arrow(model: Model, found: dict[str, NDArray[Any]]) -> memoryview:
    return arrow.write_stream(found, {"model_name": model.name, "model_version": str(model.version)})
