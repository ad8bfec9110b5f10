"""``calib serve``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import path_or_url


def serve(
    models: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url, help="Folder of models, NAME/VERSION/ below it, as calib train writes them; or its URL."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default 127.0.0.1).")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on (default 8000); 0 takes a free one.", min=0, max=65535)
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Processes on the port (default 1).", min=1)] = None,
    threads: Annotated[int | None, typer.Option(help="Threads per operation (default 1).", min=1)] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 (default) or bf16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (default), cpu, cuda ...")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, name=value; repeat it for several.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Load all models, list them, and exit.")] = False,
) -> None:
    """Serve heads over HTTP: scores by the Open Inference Protocol, detections by POST /v1/rescore.

    Settings are taken from flags, from environment variables (CALIB_SERVE_MAX_BODY_BYTES=...), and from --config, in
    this order; docs/service.md lists them. --check exits with 1 when a model cannot be loaded.

    Example: calib serve --models demo/models --port 8000 --set access_log=true, then open http://127.0.0.1:8000/docs
    """
    from calib.registry import load
    from calib.settings import parse_assignments

    flags: dict[str, Any] = {
        "models": models,
        "host": host,
        "port": port,
        "processes": processes,
        "torch_threads": threads,
    }
    flags |= {"precision": precision, "device": device, **parse_assignments(assignments or [])}
    settings = load("calib.server.serve_settings:read_settings")(flags, config)
    if check:
        _check(settings)
        return
    load("calib.server.serve:serve")(
        settings, lambda url: typer.echo(f"listening on {url} (see /docs), loading {settings.models}", err=True)
    )


def _check(settings: Any) -> None:
    from calib.registry import load

    settings.check_files()
    compute = load("calib.server.compute:Compute")(settings.device, settings.precision)
    repository = load("calib.server.models:Repository")(settings.models, settings.pinned, compute)
    index: list[dict[str, str]] = repository.index()
    for row in index:
        typer.echo("  ".join(row[key] for key in ("name", "version", "state", "reason")).rstrip())
    left_out: list[str] = load("calib.server.folders:left_out")(settings.models)
    for line in left_out:
        typer.echo(f"not served: {line}")
    if left_out or any(row["state"] != "READY" for row in index):
        raise typer.Exit(1)
