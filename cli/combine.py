"""``calib combine``."""

from pathlib import Path
from typing import Annotated

import typer


def combine(
    kind: Annotated[str, typer.Argument(help="dual (by class), average, or select (by row)")],
    one: Annotated[Path, typer.Option(help="head folder; dual: of the frequent classes")],
    other: Annotated[Path, typer.Option(help="head folder; dual: of the rare classes")],
    out: Annotated[Path, typer.Option(help="head folder to write, MODELS/NAME/VERSION")],
    threshold: Annotated[
        int | None, typer.Option(help="training instances up to which a class is rare [default: dual 300, select none]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing head")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Make one head of two fitted ones of the same detector.

    Example: calib combine dual --one models/softmax/1 --other models/crt/1 --threshold 100 --out models/mine/1
    """
    from calib.decide.compose import combine as run

    from .console import report

    artifact = run(kind, one, other, out, threshold=threshold, overwrite=overwrite)
    settings = artifact.info.settings
    report({"head": str(out), **settings, "classes": artifact.head.num_classes}, as_json)
