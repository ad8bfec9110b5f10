"""``calib train``."""

from pathlib import Path
from typing import Annotated, Any

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
    tune: Annotated[Path | None, typer.Option(help="labelled cache extracted with --mode test, for --choose")] = None,
    choose: Annotated[
        str | None, typer.Option(help="key=a,b,c: take the value with the highest AP on the --tune cache")
    ] = None,
    seed: Annotated[int, typer.Option(help="of initialisation and sampling")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing head")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Fit a calibration head on a feature cache.

    Examples:

    calib train bags --cache caches/train --out models/bags/1

    calib train tau-norm --cache caches/train --out models/tau/1 --tune caches/tune --choose tau=0.3,0.5,0.7,0.9

    An interrupted training goes on from its last checkpoint when the same command is run again.
    """
    from dataclasses import asdict

    from calib.devices import choose_device
    from calib.settings import parse_assignments, read_toml
    from calib.train import train as run

    from .console import bar, report

    overrides = (read_toml(config) if config else {}) | parse_assignments(assignments or [])
    tried = _chosen(method, cache, tune, choose, overrides, seed)
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
            **tried,
        },
        as_json,
    )


def _chosen(
    method: str, cache: Path, tune: Path | None, choose: str | None, overrides: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Put the best value of --choose into ``overrides``; what was tried, for the report."""
    from calib.errors import SettingError

    if (tune is None) != (choose is None):
        raise SettingError("--tune and --choose belong together", hint="--tune CACHE --choose tau=0.3,0.5,0.7")
    if tune is None or choose is None:
        return {}
    from calib.cache import Cache
    from calib.choose import choose as run
    from calib.settings import parse_assignments

    key, values = next(iter(parse_assignments([choose]).items()))
    choice = run(method, Cache(cache), Cache(tune), key, [v for v in values.split(",") if v], overrides, seed=seed)
    overrides[key] = choice.value
    return {"chosen": {key: choice.value}, "AP_on_tune": choice.tried}
