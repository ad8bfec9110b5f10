"""``calib train``."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    method: Annotated[str, typer.Argument(help="a method of `calib methods`")],
    cache: Annotated[Path, typer.Option(help="cache extracted with --mode train")],
    out: Annotated[Path, typer.Option(help="head folder to write, MODELS/NAME/VERSION")],
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value, repeatable; `calib methods METHOD` lists keys"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings; --set goes before it")] = None,
    seed: Annotated[int, typer.Option(help="of initialisation and sampling")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing head")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Fit a calibration head on a feature cache.

    Examples:

    calib train bags --cache caches/train --out models/bags/1

    calib train tau-norm --cache caches/train --out models/tau/1 --set tau=0.7

    An interrupted training goes on from its last checkpoint when the same command is run again.
    """
    from dataclasses import asdict

    from calib.settings import parse_assignments, read_toml
    from calib.train import train as run

    from .console import bar, choose_device, report

    overrides = (read_toml(config) if config else {}) | parse_assignments(assignments or [])
    artifact = run(
        method,
        cache,
        out,
        overrides,
        seed=seed,
        device=choose_device(device),
        overwrite=overwrite,
        progress=bar,
    )
    losses = artifact.info.losses
    report(
        {
            "head": str(out),
            "method": method,
            "seed": seed,
            "classes": artifact.head.num_classes,
            "final_loss": losses[-1][1] if losses else None,
            "settings": asdict(artifact.info)["settings"],
        },
        as_json,
    )
