"""Runs the service: one process, or several workers on one port. Imports no torch; the processes that serve do."""

import asyncio
import os
import signal
import socket
import ssl
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import multiprocess
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from calib.errors import CalibError, InputError

from .errors import text_of
from .folders import scan_some
from .layers.protocol import GuardedConfig
from .serve_settings import ServeSettings

# How long requests under way may take once the server was asked to stop.
DRAIN_S = 30
_MARGIN_S = 5  # until workers that do not end are killed; both fit the TimeoutStopSec of docs/calib.service
_PING_S = 0.2
_BACKLOG = 2048


class StartError(CalibError):
    """No worker could start; each has said why."""


def serve(settings: ServeSettings, announce: Any) -> None:
    """Serve until SIGTERM or Ctrl-C; accepted requests are answered first. ``announce`` is called with the address.

    Raises:
        CalibError: nothing can be served, or not at this address.
    """
    settings.check_files()
    scan_some(settings.models)  # before anybody hears of an address
    _allow_files(settings.max_connections)
    listener = _bind(settings.host, settings.port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    announce(f"{'https' if settings.ssl_certfile else 'http'}://{host}:{listener.getsockname()[1]}")
    try:
        if settings.processes == 1:
            _serve_alone(settings, listener)
        else:
            _serve_together(settings, listener)
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()


def _serve_alone(settings: ServeSettings, listener: socket.socket) -> None:
    # uvicorn drains, then raises the signal that stopped it once more: for a service that is the normal end.
    signal.signal(signal.SIGTERM, _stop)
    _Server(_config(settings, partial(application, settings))).run(sockets=[listener])


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """A TLS handshake has as much time as a head."""
        if isinstance(self.config, GuardedConfig) and self.config.is_ssl:
            loop, seconds = asyncio.get_running_loop(), self.config.settings.header_timeout_s
            loop.create_server = partial(loop.create_server, ssl_handshake_timeout=seconds)  # type: ignore[method-assign]
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take in what has connected already: closing the port would reset it."""
        for _ in range(3):
            await asyncio.sleep(0)
        await super().shutdown(sockets)


def _serve_together(settings: ServeSettings, listener: socket.socket) -> None:
    with tempfile.TemporaryDirectory(prefix="calib-serve-") as shared:
        config = _config(settings, partial(_worker, settings, Path(shared)))
        supervisor = _Supervisor(config, [listener])
        supervisor.run()
    if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
        raise StartError("the workers could not start")


class _Process(Process):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._heard = self._end = time.monotonic()

    @property
    def server(self) -> uvicorn.Server:
        """Made where it runs."""
        if self._server is None:
            self._server = _Server(self.config)
        return self._server

    def is_alive(self, timeout: float = 5) -> bool:
        """Silent for less than ``timeout``. Asked again and again: one long wait would hold up a server that stops."""
        if self.ping(_PING_S):
            self._heard = time.monotonic()
        return self.process.is_alive() and time.monotonic() - self._heard < timeout

    def terminate(self) -> None:
        """From now on it has as long as its requests may take."""
        self._end = time.monotonic() + DRAIN_S + _MARGIN_S
        super().terminate()

    def join(self) -> None:
        """Kill what does not end, for example because it was stopped in the middle (SIGSTOP)."""
        self.process.join(max(0.0, self._end - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
        super().join()

    def start(self) -> None:
        """Keep only the parent's end of the pipe: a worker that ends while it is asked for its health is noticed."""
        super().start()
        self.child_conn.close()


class _Supervisor(Multiprocess):
    def __init__(self, config: GuardedConfig, sockets: list[socket.socket]) -> None:
        super().__init__(config, sockets=sockets)
        multiprocess.Process = _Process  # type: ignore[assignment,misc]  # for those that replace others, too

    def handle_hup(self) -> None:
        """Pass the signal on: the first worker that looks at the model folder does so for all."""
        # Those that are not ready would end by the signal.
        ready = [p.pid for p in self.processes if p.pid is not None and p.is_ready()]
        for pid in ready:
            os.kill(pid, signal.SIGHUP)
        if not ready:
            self.signal_queue.append(signal.SIGHUP)  # asked again in a moment

    def terminate_all(self) -> None:
        """Let go of the port first: what connects while workers stop is refused then, instead of waiting for nobody."""
        for listener in self.sockets:
            listener.close()
        super().terminate_all()


def application(settings: ServeSettings, shared: Path | None = None) -> Any:
    """The ASGI application; torch is imported here."""
    from .app import create_app

    return create_app(settings, shared)


def _worker(settings: ServeSettings, shared: Path) -> Any:
    """``application`` in a process of its own: an error ends all workers instead of being tried again and again."""
    try:
        return application(settings, shared)
    except CalibError as e:
        sys.stderr.write(f"error: {text_of(e)}\n")
        raise SystemExit(STARTUP_FAILURE) from None


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _config(settings: ServeSettings, factory: Any) -> GuardedConfig:
    paths = {name: getattr(settings, name) for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")}
    return GuardedConfig(
        factory,
        settings,
        factory=True,
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=list(settings.proxies),
        workers=settings.processes,
        ws="none",
        access_log=False,  # ours says more, see access_log
        log_config=_logging(uvicorn.config.LOGGING_CONFIG),
        ssl_cert_reqs=ssl.CERT_NONE if settings.ssl_ca_certs is None else ssl.CERT_REQUIRED,
        **{name: str(path) for name, path in paths.items() if path},
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
        timeout_worker_healthcheck=60,  # loading many models takes its time
    )


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port in use is an ordinary error before any model is loaded.

    Raises:
        InputError: no such address, or the port is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)  # now: of two servers started at once one must be refused
    except OSError as e:
        raise InputError(f"cannot listen on {host} port {port}: {e}", hint="choose another --host or --port") from e
    return listener


def _logging(defaults: dict[str, Any]) -> dict[str, Any]:
    """uvicorn's logging with everything on stderr (stdout is for results), and nobody waiting for it."""
    handler = {"class": "calib.server.layers.access_log.Lines", "formatter": "default"}
    loggers = {"uvicorn": {"handlers": ["default"], "level": "INFO", "propagate": False}}
    root = {"handlers": ["default"], "level": "WARNING"}
    return {**defaults, "handlers": {"default": handler}, "loggers": loggers, "root": root}


def _allow_files(connections: int) -> None:
    """As many open files as twice the connections may need, where the system lets us."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2 * connections + 1024)), hard))
