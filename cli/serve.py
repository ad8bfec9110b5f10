"""``calib serve``."""

import os
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

APP = "calib.server.app:create_app"
PROTOCOL = "calib.server.protocol:JsonErrorProtocol"
# How long requests under way may take once the server was told to stop.
DRAIN_S = 30


def serve(
    models: Annotated[Path, typer.Option(help="Folder of models, NAME/VERSION/ below it, as calib train writes them.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    threads: Annotated[int | None, typer.Option(help="Threads per operation (default 1).", min=1)] = None,
    check: Annotated[bool, typer.Option("--check", help="Load all models, list them, and exit.")] = False,
) -> None:
    """Serve heads over HTTP: scores by the Open Inference Protocol, detections by POST /v1/rescore.

    Further settings are read from the environment, for example CALIB_SERVE_MAX_BODY_BYTES.
    --check exits with 1 when a model cannot be loaded.

    Example: calib serve --models demo/models --port 8000, then open http://127.0.0.1:8000/docs
    """
    if check:
        _check(models)
        return
    # The application is named by a string, so its settings travel as uvicorn's workers will need them.
    os.environ["CALIB_SERVE_MODELS"] = str(models)
    if threads is not None:
        os.environ["CALIB_SERVE_TORCH_THREADS"] = str(threads)
    from calib.registry import load

    settings: Any = load("calib.server.settings:from_environment")()
    certificates = {
        name: None if getattr(settings, name) is None else str(getattr(settings, name))
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
    }
    _run(models, host, port, {name: path for name, path in certificates.items() if path})


def _check(models: Path) -> None:
    from calib.registry import load

    index: list[dict[str, str]] = load("calib.server.models:Repository")(models).index()
    for row in index:
        typer.echo("  ".join(row[key] for key in ("name", "version", "state", "reason")).rstrip())
    if any(row["state"] != "READY" for row in index):
        raise typer.Exit(1)


def _run(models: Path, host: str, port: int, certificates: dict[str, str]) -> None:
    import ssl

    import uvicorn

    from calib.errors import SettingError
    from calib.files import require

    for name, path in certificates.items():
        require(Path(path), f"CALIB_SERVE_{name.upper()}")
    if certificates and not {"ssl_certfile", "ssl_keyfile"} <= set(certificates):
        raise SettingError("TLS needs CALIB_SERVE_SSL_CERTFILE and CALIB_SERVE_SSL_KEYFILE")
    config = uvicorn.Config(
        APP,
        factory=True,
        host=host,
        port=port,
        http=PROTOCOL,
        ws="none",
        log_config=_logging(uvicorn.config.LOGGING_CONFIG),
        ssl_cert_reqs=ssl.CERT_REQUIRED if "ssl_ca_certs" in certificates else ssl.CERT_NONE,
        **certificates,  # type: ignore[arg-type]
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
    )
    # uvicorn drains, then raises the signal that stopped it once more: for a service that is the normal end.
    signal.signal(signal.SIGTERM, _stop)
    listener = _bind(host, port)
    url_host = f"[{host}]" if ":" in host else host
    url = f"{'https' if certificates else 'http'}://{url_host}:{listener.getsockname()[1]}"
    typer.echo(f"serving {models} on {url} (see /docs)", err=True)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket, so that a port in use is an ordinary error before any model is loaded.

    Raises:
        InputError: no such address, or the port is in use.
    """
    from calib.errors import InputError

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as e:
        raise InputError(f"cannot listen on {host} port {port}: {e}", hint="choose another --host or --port") from e
    return listener


def _logging(defaults: dict[str, Any]) -> dict[str, Any]:
    """uvicorn's logging with the access log on stderr: stdout is for results."""
    handlers = {name: {**handler, "stream": "ext://sys.stderr"} for name, handler in defaults["handlers"].items()}
    return {**defaults, "handlers": handlers}
