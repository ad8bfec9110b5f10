"""The HTTP surface: Open Inference Protocol V2 with its repository, configuration and statistics extensions,
and ``/v1/rescore``.

Handlers take the raw request: Triton's clients send no Content-Type, and bodies are bounded before they are
read. Health is answered by the event loop, everything that computes or parses by the compute thread.
"""

import asyncio
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from calib import __version__
from calib.errors import UnsupportedError

from . import openapi
from .describe import config, metadata, statistics
from .errors import BadRequestError, NotServedError
from .exchange import HEADER_LENGTH, computed, json_object, service_of
from .formats import arrow
from .formats.schemas import ErrorReply, RescoreReply
from .formats.wire import parameters_of
from .inference import infer
from .layers.metrics import text
from .models import Model
from .payload import body_limit
from .rescore import FORMS, JSON, rescore

# The page's own policy narrows scripts to those it was written with; here it also loses the origin, so that nothing on
# it could ever speak for whoever looks at it.
REPORT_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox allow-scripts",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
EXTENSIONS = ["binary_tensor_data", "model_repository", "model_configuration", "statistics"]

router = APIRouter(responses={"default": {"model": ErrorReply, "description": "what was wrong"}})


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``value`` as JSON."""
    return Response(orjson.dumps(value), status, headers, "application/json")


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus metrics: requests, failures by reason, times, bytes, loaded versions."""
    if not service_of(request).settings.metrics:
        raise NotServedError("metrics are switched off")
    return Response(text(request.app.state.metrics), media_type=CONTENT_TYPE_LATEST)


# Not by response_class: errors would be described as HTML too.
@router.get("/report", responses={200: {"content": {"text/html": {}}}})
async def report(request: Request) -> Response:
    """The page of `calib report` that the setting `report` names."""
    path = service_of(request).settings.report
    if path is None or not path.is_file():
        raise NotServedError("no report is offered: the setting report names a page of calib report")
    return FileResponse(path, media_type="text/html", headers=REPORT_HEADERS)


@router.get("/v2")
async def server_metadata() -> dict[str, Any]:
    """Name, version, extensions."""
    return {"name": "calib", "version": __version__, "extensions": EXTENSIONS}


@router.head("/v2/health/live", include_in_schema=False)
@router.get("/v2/health/live")
async def live() -> dict[str, bool]:
    """The process answers."""
    return {"live": True}


@router.head("/v2/health/ready", include_in_schema=False)
@router.get("/v2/health/ready")
async def ready(request: Request) -> dict[str, bool]:
    """At least one model is loaded."""
    service_of(request).repository.check_ready()
    return {"ready": True}


# Before /v2/models/{model}: "stats" is no model's name here.
@router.get("/v2/models/stats")
async def all_statistics(request: Request) -> dict[str, Any]:
    """Counts and times of all loaded models."""
    return statistics(service_of(request), service_of(request).repository.loaded())


@router.get("/v2/models/{model}")
async def model_metadata(request: Request, model: str) -> dict[str, Any]:
    """Inputs, outputs, categories of the default version."""
    return metadata(service_of(request), service_of(request).repository.find(model))


@router.get("/v2/models/{model}/versions/{version}")
async def version_metadata(request: Request, model: str, version: str) -> dict[str, Any]:
    """Inputs, outputs, categories."""
    return metadata(service_of(request), service_of(request).repository.find(model, version))


@router.get("/v2/models/{model}/ready")
async def model_ready(request: Request, model: str) -> dict[str, Any]:
    """A version of the model is loaded."""
    return {"name": service_of(request).repository.find(model).name, "ready": True}


@router.get("/v2/models/{model}/versions/{version}/ready")
async def version_ready(request: Request, model: str, version: str) -> dict[str, Any]:
    """The version is loaded."""
    return {"name": service_of(request).repository.find(model, version).name, "ready": True}


@router.get("/v2/models/{model}/config")
async def model_config(request: Request, model: str) -> dict[str, Any]:
    """Triton's model configuration of the default version."""
    return config(service_of(request).repository.find(model))


@router.get("/v2/models/{model}/versions/{version}/config")
async def version_config(request: Request, model: str, version: str) -> dict[str, Any]:
    """Triton's model configuration."""
    return config(service_of(request).repository.find(model, version))


@router.get("/v2/models/{model}/stats")
async def model_statistics(request: Request, model: str) -> dict[str, Any]:
    """Counts and times of all loaded versions."""
    return statistics(service_of(request), service_of(request).repository.loaded(model))


@router.get("/v2/models/{model}/versions/{version}/stats")
async def version_statistics(request: Request, model: str, version: str) -> dict[str, Any]:
    """Counts and times."""
    return statistics(service_of(request), [service_of(request).repository.find(model, version)])


@router.post("/v2/models/{model}/infer", openapi_extra=openapi.INFER)
async def model_infer(request: Request, model: str) -> Response:
    """Scores [N, C], or the best of them, or detections, by the default version."""
    return await _infer(request, service_of(request).repository.find(model))


@router.post("/v2/models/{model}/versions/{version}/infer", openapi_extra=openapi.INFER)
async def version_infer(request: Request, model: str, version: str) -> Response:
    """Scores [N, C], or the best of them, or detections."""
    return await _infer(request, service_of(request).repository.find(model, version))


async def _infer(request: Request, model: Model) -> Response:
    service = service_of(request)
    limit = body_limit(request.headers.get(HEADER_LENGTH), service.settings)
    return await computed(request, limit, partial(infer, model, settings=service.settings, compute=service.compute))


@router.post("/v1/rescore", openapi_extra=openapi.RESCORE, response_model=RescoreReply)
async def rescore_image(request: Request) -> Response:
    """Detections after NMS, from the features and boxes of proposals: JSON of one image, or an Arrow IPC stream of
    several. The reply has the form of the request, or what Accept names."""
    service = service_of(request)
    forms = _forms(request)
    limit = service.settings.max_json_bytes if forms[0] == JSON else service.settings.max_body_bytes
    work = partial(rescore, service.repository, settings=service.settings, compute=service.compute, forms=forms)
    return await computed(request, limit, work)


def _forms(request: Request) -> tuple[str, str]:
    """Media types of the request and of the reply; without a Content-Type it is JSON."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    form = arrow.MEDIA_TYPE if given == arrow.MEDIA_TYPE else JSON
    accepted = [part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")]
    return form, next((name for name in accepted if name in FORMS), form)


@router.post("/v2/repository/index", openapi_extra=openapi.INDEX)
async def repository_index(request: Request) -> list[dict[str, str]]:
    """What the model folder held when it was last read: name, version, state, reason."""
    ready_only = (await json_object(request)).get("ready", False)
    if not isinstance(ready_only, bool):
        raise BadRequestError("'ready' must be true or false")
    return service_of(request).repository.index(ready_only=ready_only)


@router.post("/v2/repository/models/{model}/load", openapi_extra=openapi.LOAD)
async def load_model(request: Request, model: str) -> dict[str, Any]:
    """Read all versions of a model from disk again."""
    return await _change(request, "load", model)


@router.post("/v2/repository/models/{model}/versions/{version}/load", openapi_extra=openapi.LOAD)
async def load_version(request: Request, model: str, version: str) -> dict[str, Any]:
    """Read one version of a model from disk again; Triton's clients have no call for it."""
    return await _change(request, "load", model, version)


@router.post("/v2/repository/models/{model}/unload", openapi_extra=openapi.LOAD)
async def unload_model(request: Request, model: str) -> dict[str, Any]:
    """Stop serving a model."""
    return await _change(request, "unload", model)


@router.post("/v2/repository/models/{model}/versions/{version}/unload", openapi_extra=openapi.LOAD)
async def unload_version(request: Request, model: str, version: str) -> dict[str, Any]:
    """Stop serving one version of a model."""
    return await _change(request, "unload", model, version)


async def _change(request: Request, action: str, model: str, version: str | None = None) -> dict[str, Any]:
    parameters = parameters_of(await json_object(request))
    if action == "load" and parameters:
        raise BadRequestError("load takes no parameters: neither configuration nor files are uploaded")
    # Not in the compute thread: reading files must not hold requests up.
    repository = service_of(request).repository
    await asyncio.to_thread(repository.load if action == "load" else repository.unload, model, version)
    return {}


@router.api_route("/v2/logging", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/v2/trace/setting", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/v2/models/{model}/trace/setting", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/v2/systemsharedmemory/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
@router.api_route("/v2/cudasharedmemory/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
async def not_offered(request: Request) -> Response:
    """Parts of Triton's interface that this server does not have."""
    raise UnsupportedError(f"{request.url.path[:128]} is not offered by this server")
