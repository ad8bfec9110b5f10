"""``calib select``."""

from pathlib import Path
from typing import Annotated

import typer


def select(
    heads: Annotated[list[Path], typer.Argument(metavar="HEAD HEAD...", help="head folders, MODELS/NAME/VERSION")],
    cache: Annotated[Path, typer.Option(help="labelled tune cache extracted with --mode test")],
    out: Annotated[Path, typer.Option(help="head folder to write")],
    strength: Annotated[float, typer.Option(help="objects that the mean gain of its bin counts in a class")] = 20.0,
    max_detections: Annotated[int | None, typer.Option(help="per image [default: the detector's]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing head")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Make one head of several: every class is scored by the one that serves it best on a tune split.

    A class moves away from the best head of all only for what its own objects and its bin of training instances
    together say: three objects alone decide nothing. The heads' scores should be comparable (calib calibrate).

    Example: calib select models/crt/1 models/bags/1 --cache caches/tune --out models/selected/1
    """
    from calib.cache import Cache
    from calib.decide.per_class import select as run

    from .console import show

    _, found = run(heads, Cache(cache), out, strength=strength, max_detections=max_detections, overwrite=overwrite)
    show([found], {"head": str(out), **vars(found)}, as_json)
