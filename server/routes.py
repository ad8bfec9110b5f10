"""The HTTP surface: Open Inference Protocol V2 with its repository, configuration and statistics extensions,
and ``/v1/rescore``.

Handlers take the raw request: Triton's clients send no Content-Type, and bodies are bounded before they are
read. Health is answered by the event loop, everything that computes or parses by the compute thread.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from calib import __version__
from calib.errors import UnsupportedError

from .engine import Engine
from .errors import BadRequestError, DeadlineError, NotServedError, SlowBodyError
from .inference import FEATURES, Payload, body_limit, infer, inputs_of, rescore
from .limits import content_coding, decompress, read_body
from .metrics import text
from .models import Model, Repository, description
from .outputs import DETECTIONS, SCORES, TOP
from .schemas import ErrorReply, RescoreReply, RescoreRequest
from .settings import ServeSettings
from .wire import FLOATS, Expected, Reply, parse_json

T = TypeVar("T")

HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ["binary_tensor_data", "model_repository", "model_configuration", "statistics"]
PLATFORM = "calib"

router = APIRouter(responses={"default": {"model": ErrorReply, "description": "what was wrong"}})

_INFER_BODY: dict[str, Any] = {
    "description": f"JSON, and behind it the binary inputs; {HEADER_LENGTH} is then the length of the JSON.",
    "required": True,
    "content": {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "properties": {"inputs": {"type": "array", "items": {"type": "object"}}},
            },
        },
    },
}
_INFER = {"openapi_extra": {"requestBody": _INFER_BODY}, "summary": "Scores of proposals"}
_RESCORE = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": RescoreRequest.model_json_schema()}},
    }
}


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``value`` as JSON."""
    return Response(orjson.dumps(value), status, headers, "application/json")


def _repository(request: Request) -> Repository:
    repository: Repository = request.app.state.repository
    return repository


def _settings(request: Request) -> ServeSettings:
    settings: ServeSettings = request.app.state.settings
    return settings


async def _body(request: Request, limit: int) -> bytearray:
    """The body as sent, within ``limit`` bytes and the time allowed."""
    seconds = _settings(request).body_timeout_s
    try:
        async with asyncio.timeout(seconds):
            return await read_body(request.headers, request.stream(), limit)
    except TimeoutError:
        raise SlowBodyError(f"the body did not arrive within {seconds:g} seconds") from None


async def _compute(request: Request, limit: int, work: Callable[[Payload], T]) -> T:
    """Wait for a place, read the body, work on it in the compute thread."""
    engine: Engine = request.app.state.engine
    coding = content_coding(request.headers)
    with engine.place():
        body = await _body(request, limit)
        request.app.state.answers.bytes_in += len(body)
        payload = Payload(body, coding, request.headers.get(HEADER_LENGTH), _settings(request).deadline_s)
        try:
            async with asyncio.timeout(payload.deadline_s):
                return await engine.run(partial(work, payload))
        except TimeoutError:  # still queued, it will be dropped when its turn comes
            raise DeadlineError(f"no answer within {payload.deadline_s:g} s", hint="try again later") from None


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus metrics: requests, failures by reason, times, bytes, loaded versions."""
    if not _settings(request).metrics:
        raise NotServedError("metrics are switched off")
    return Response(text(request.app.state.metrics), media_type=CONTENT_TYPE_LATEST)


@router.get("/v2")
async def server_metadata() -> dict[str, Any]:
    """Name, version, extensions."""
    return {"name": "calib", "version": __version__, "extensions": EXTENSIONS}


@router.get("/v2/health/live")
async def live() -> dict[str, bool]:
    """The process answers."""
    return {"live": True}


@router.get("/v2/health/ready")
async def ready(request: Request) -> dict[str, bool]:
    """At least one model is loaded."""
    _repository(request).check_ready()
    return {"ready": True}


# Before /v2/models/{model}: "stats" is no model's name here.
@router.get("/v2/models/stats")
async def all_statistics(request: Request) -> dict[str, Any]:
    """Counts and times of all loaded models."""
    return _statistics(_repository(request).loaded())


@router.get("/v2/models/{model}")
async def model_metadata(request: Request, model: str) -> dict[str, Any]:
    """Inputs, outputs, categories of the highest loaded version."""
    return _metadata(request, _repository(request).find(model))


@router.get("/v2/models/{model}/versions/{version}")
async def version_metadata(request: Request, model: str, version: str) -> dict[str, Any]:
    """Inputs, outputs, categories."""
    return _metadata(request, _repository(request).find(model, version))


@router.get("/v2/models/{model}/ready")
async def model_ready(request: Request, model: str) -> dict[str, Any]:
    """A version of the model is loaded."""
    return {"name": _repository(request).find(model).name, "ready": True}


@router.get("/v2/models/{model}/versions/{version}/ready")
async def version_ready(request: Request, model: str, version: str) -> dict[str, Any]:
    """The version is loaded."""
    return {"name": _repository(request).find(model, version).name, "ready": True}


@router.get("/v2/models/{model}/config")
async def model_config(request: Request, model: str) -> dict[str, Any]:
    """Triton's model configuration of the highest loaded version."""
    return _config(_repository(request).find(model))


@router.get("/v2/models/{model}/versions/{version}/config")
async def version_config(request: Request, model: str, version: str) -> dict[str, Any]:
    """Triton's model configuration."""
    return _config(_repository(request).find(model, version))


@router.get("/v2/models/{model}/stats")
async def model_statistics(request: Request, model: str) -> dict[str, Any]:
    """Counts and times of all loaded versions."""
    return _statistics(_repository(request).loaded(model))


@router.get("/v2/models/{model}/versions/{version}/stats")
async def version_statistics(request: Request, model: str, version: str) -> dict[str, Any]:
    """Counts and times."""
    return _statistics([_repository(request).find(model, version)])


def _metadata(request: Request, model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "versions": [str(m.version) for m in _repository(request).loaded(model.name)],
        "platform": PLATFORM,
        "inputs": [{"name": n, "datatype": e.datatypes[0], "shape": _dims(e)} for n, e in inputs_of(model).items()],
        "outputs": [{"name": n, "datatype": d, "shape": shape} for n, (d, shape) in _outputs(model).items()],
        "parameters": {"version": str(model.version), "datatypes": list(FLOATS), **description(model)},
    }


def _dims(expected: Expected) -> list[int]:
    """-1 where any length will do; a box input may be [N, 4 C] as well."""
    return [-1, *expected.widths[:1]]


def _outputs(model: Model) -> dict[str, tuple[str, list[int]]]:
    """Datatype and shape of every output; without names in a request SCORES is answered."""
    integers = ("TOP_ROWS", "TOP_CLASSES", "TOP_OFFSETS", "DET_CLASSES", "DET_ROWS", "DET_OFFSETS")
    outputs = {name: ("INT32" if name in integers else "FP32", [-1]) for name in (*TOP, *DETECTIONS)}
    outputs["DET_BOXES"] = ("FP32", [-1, 4])
    return {SCORES: ("FP32", [-1, model.artifact.head.num_classes])} | outputs


def _config(model: Model) -> dict[str, Any]:
    inputs: list[dict[str, Any]] = []
    for name, expected in inputs_of(model).items():
        one = {"name": name, "data_type": f"TYPE_{expected.datatypes[0]}", "dims": _dims(expected)}
        inputs.append(one if name == FEATURES else one | {"optional": True})
    outputs = [{"name": n, "data_type": f"TYPE_{d}", "dims": shape} for n, (d, shape) in _outputs(model).items()]
    config: dict[str, Any] = {
        "name": model.name,
        "platform": PLATFORM,
        "backend": "calib",
        "max_batch_size": 0,
    }
    return config | {"input": inputs, "output": outputs}


def _statistics(models: list[Model]) -> dict[str, Any]:
    return {"model_stats": [{"name": m.name, "version": str(m.version), **m.statistics.as_json()} for m in models]}


@router.post("/v2/models/{model}/infer", **_INFER)  # type: ignore[arg-type]
async def model_infer(request: Request, model: str) -> Response:
    """Scores [N, C] by the highest loaded version."""
    return await _infer(request, _repository(request).find(model))


@router.post("/v2/models/{model}/versions/{version}/infer", **_INFER)  # type: ignore[arg-type]
async def version_infer(request: Request, model: str, version: str) -> Response:
    """Scores [N, C]."""
    return await _infer(request, _repository(request).find(model, version))


async def _infer(request: Request, model: Model) -> Response:
    settings = _settings(request)
    limit = body_limit(request.headers.get(HEADER_LENGTH), settings)
    return _reply(request, await _compute(request, limit, partial(infer, model, settings=settings)))


def _reply(request: Request, reply: Reply) -> Response:
    request.state.record = reply.record
    if reply.header_length is None:
        return Response(bytes(reply.body), media_type="application/json")
    headers = {HEADER_LENGTH: str(reply.header_length)}
    return Response(memoryview(reply.body), 200, headers, "application/octet-stream")


@router.post("/v1/rescore", openapi_extra=_RESCORE, response_model=RescoreReply)
async def rescore_image(request: Request) -> Response:
    """Detections of one image after NMS, from the features and boxes of its proposals."""
    settings = _settings(request)
    work = partial(rescore, _repository(request), settings=settings)
    return _reply(request, await _compute(request, settings.max_json_bytes, work))


async def _json_object(request: Request) -> dict[str, Any]:
    """A small JSON object; an empty body is an empty one."""
    coding, limit = content_coding(request.headers), _settings(request).max_json_header_bytes
    return parse_json(decompress(await _body(request, limit), coding, limit))


@router.post("/v2/repository/index")
async def repository_index(request: Request) -> list[dict[str, str]]:
    """What the model folder held when it was last read: name, version, state, reason."""
    ready_only = (await _json_object(request)).get("ready", False)
    if not isinstance(ready_only, bool):
        raise BadRequestError("'ready' must be true or false")
    return _repository(request).index(ready_only=ready_only)


@router.post("/v2/repository/models/{model}/load")
async def load_model(request: Request, model: str) -> dict[str, Any]:
    """Read all versions of a model from disk again."""
    parameters = (await _json_object(request)).get("parameters") or {}
    if parameters:
        raise BadRequestError("load takes no parameters: neither configuration nor files are uploaded")
    # Not in the compute thread: reading files must not hold requests up.
    await asyncio.to_thread(_repository(request).load, model)
    return {}


@router.post("/v2/repository/models/{model}/versions/{version}/load")
async def load_version(request: Request, model: str, version: str) -> dict[str, Any]:
    """Read one version of a model from disk again; Triton's clients have no call for it."""
    await _json_object(request)
    await asyncio.to_thread(_repository(request).load, model, version)
    return {}


@router.post("/v2/repository/models/{model}/versions/{version}/unload")
async def unload_version(request: Request, model: str, version: str) -> dict[str, Any]:
    """Stop serving one version of a model."""
    await _json_object(request)
    await asyncio.to_thread(_repository(request).unload, model, version)
    return {}


@router.post("/v2/repository/models/{model}/unload")
async def unload_model(request: Request, model: str) -> dict[str, Any]:
    """Stop serving a model."""
    await _json_object(request)
    await asyncio.to_thread(_repository(request).unload, model)
    return {}


@router.api_route("/v2/logging", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/v2/trace/setting", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/v2/models/{model}/trace/setting", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/v2/systemsharedmemory/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/v2/cudasharedmemory/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
async def not_offered(request: Request) -> Response:
    """Parts of Triton's interface that this server does not have."""
    raise UnsupportedError(f"{request.url.path[:128]} is not offered by this server")
