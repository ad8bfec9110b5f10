"""The application factory. ``uvicorn --factory calib.server.app:create_app`` reads ``CALIB_SERVE_*``."""

import asyncio
import logging
import os
import shutil
import signal
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from calib import __version__
from calib.errors import CalibError

from .errors import text_of
from .layers.access import OPEN_PATHS, Access, Buckets, Hosts, Keys, is_loopback
from .layers.access_log import AccessLog, enable
from .layers.asgi import Application, Receive, Scope, Send, refuse
from .layers.metrics import Counting, registry
from .layers.telemetry import trace
from .models import Repository
from .routes import json_response, router
from .serve_settings import ServeSettings, read_settings
from .service import Service
from .shared import EVERY_S, Snapshots

_log = logging.getLogger("uvicorn.error")


def create_app(settings: ServeSettings | None = None, shared: Path | None = None) -> FastAPI:
    """An application with all models loaded; without ``settings`` they are read from the environment.

    ``shared`` is a folder that all workers of one service share.

    Raises:
        SettingError: no or wrong settings. MissingFileError: no model. FormatError: none that can be loaded.
    """
    settings = settings or read_settings()
    service = Service(settings, shared)
    app = FastAPI(
        title="calib",
        version=__version__,
        summary="Rescores the proposals of long-tailed detectors.",
        docs_url="/docs" if settings.docs else None,
        openapi_url="/openapi.json" if settings.docs else None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.service = service
    app.state.metrics = registry(service)
    app.include_router(router)
    _answer_errors_in_json(app)
    if shared is not None:
        app.add_middleware(UpToDate, repository=service.repository)
    keys = Keys.of(*([key.get_secret_value() for key in of] for of in (settings.api_keys, settings.admin_keys)))
    buckets = None if settings.rate is None else Buckets(settings.rate, settings.burst)
    hosts = Hosts(is_loopback(settings.host), settings.allowed_hosts)
    app.add_middleware(Access, keys=keys, buckets=buckets, hosts=hosts)
    for line in _who_may(settings, hosts):
        _log.info(line)
    app.add_middleware(Unforeseen)
    # Outside of them, so that what is refused or goes wrong is counted and logged as well.
    app.add_middleware(Counting, answers=service.answers)
    app.add_middleware(AccessLog, enabled=settings.access_log)
    if settings.access_log:
        enable()
    app.state.closing = [service.close]
    if settings.telemetry:
        app.state.closing.append(trace(app))
    return app


def _who_may(settings: ServeSettings, hosts: Hosts) -> list[str]:
    """What the log says at the start about who may ask for what."""
    others = "programs of this machine" if hosts.loopback else "nobody (give admin_keys, or listen on loopback)"
    control = "holders of an admin key" if settings.admin_keys else others
    if settings.api_keys and not settings.admin_keys:
        control = "nobody (give admin_keys)"
    names = ", ".join(["addresses", "localhost", *settings.allowed_hosts])
    anything = not hosts.loopback and not settings.allowed_hosts
    return [f"models are loaded and unloaded by {control}", f"names in Host: {'any' if anything else names}"]


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    tasks = [asyncio.create_task(_watch(service.repository, service.settings.watch_s))]
    if service.snapshots is not None:
        tasks.append(asyncio.create_task(_accompany(service.snapshots)))

    def hang_up() -> None:
        tasks.append(asyncio.create_task(_look(service.repository)))

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)
    yield
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    for close in app.state.closing:
        close()


async def _accompany(snapshots: Snapshots) -> None:
    """Let the other workers know this one's counters; end with the process that watches over all."""
    parent = os.getppid()
    while os.getppid() == parent:
        try:
            await asyncio.to_thread(snapshots.write)
        except OSError as e:
            _log.warning("counters cannot be shared with the other workers: %s", e)
        await asyncio.sleep(EVERY_S)
    _log.error("the parent process is gone: stopping")
    shutil.rmtree(snapshots.folder, ignore_errors=True)
    signal.raise_signal(signal.SIGTERM)


async def _watch(repository: Repository, seconds: float | None) -> None:
    """Look at the model folder now and then; what goes wrong is logged and tried again."""
    while seconds is not None:
        await asyncio.sleep(seconds)
        await _look(repository)


async def _look(repository: Repository) -> None:
    try:
        changed = await asyncio.to_thread(repository.refresh)
    except (CalibError, OSError) as e:
        _log.warning("the model folder cannot be read: %s", text_of(e) if isinstance(e, CalibError) else e)
    else:
        if changed:
            _log.info("loaded again: %s", ", ".join(changed))


class UpToDate:
    """An ASGI layer that follows what other workers loaded and unloaded before a request is looked at."""

    def __init__(self, app: Application, repository: Repository) -> None:
        self._app, self._repository = app, repository

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Health never waits for models, nor depends on files.
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and self._repository.is_behind():
            await asyncio.to_thread(self._repository.catch_up)
        await self._app(scope, receive, send)


def _answer_errors_in_json(app: FastAPI) -> None:
    """Every error leaves as ``{"error": text}``: clients of the protocol read that key and nothing else."""
    app.exception_handler(CalibError)(_calib_error)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(RequestValidationError)(_validation_error)
    app.exception_handler(ClientDisconnect)(_disconnected)


async def _calib_error(request: Request, error: CalibError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return json_response({"error": text_of(error)}, error.status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    path, headers = request.url.path[:128], dict(error.headers or {})
    texts = {
        404: f"nothing is served at {path}",
        405: f"{request.method} is not allowed at {path}: use {headers.get('Allow', 'another method')}",
    }
    return json_response({"error": texts.get(error.status_code, error.detail)}, error.status_code, headers)


async def _validation_error(request: Request, error: RequestValidationError) -> Response:
    return json_response({"error": str(error.errors()[0]["msg"])}, 422)


async def _disconnected(request: Request, error: ClientDisconnect) -> Response:
    return json_response({"error": "the client left before its body was complete"}, 400)


class Unforeseen:
    """An ASGI layer: the client gets an id to ask for, the log the trace with the same id."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            if scope["type"] != "http" or started:
                raise
            error_id = scope["state"]["request_id"]
            _log.exception("internal error %s at %s %s", error_id, scope["method"], scope["path"])
            await refuse(send, 500, f"internal error {error_id}")
