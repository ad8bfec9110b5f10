"""``calib compare``."""

from pathlib import Path
from typing import Annotated

import typer


def compare(
    heads: Annotated[list[Path], typer.Argument(metavar="HEAD HEAD...", help="head folders, MODELS/NAME/VERSION")],
    cache: Annotated[Path, typer.Option(help="labelled cache extracted with --mode test")],
    max_detections: Annotated[int | None, typer.Option(help="per image [default: the detector's]")] = None,
    bootstrap: Annotated[int, typer.Option(help="replicates behind the 95 % intervals")] = 1000,
    seed: Annotated[int, typer.Option(help="of the bootstrap")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Set heads side by side: AP per bin with intervals, categories gained and lost, agreement with the first head.

    Intervals come from a paired bootstrap over images: a difference is surer than two metrics beside each other.

    Example: calib compare models/natural/1 models/crt/1 --cache caches/val
    """
    from calib.decide.compare import compare as run

    from .console import bar, show

    found = run(heads, cache, max_detections=max_detections, replicates=bootstrap, seed=seed, progress=bar)
    show([found], found.record(), as_json)
