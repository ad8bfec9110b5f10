"""``calib threshold``."""

from pathlib import Path
from typing import Annotated

import typer


def threshold(
    head: Annotated[Path, typer.Option(help="head folder, MODELS/NAME/VERSION")],
    cache: Annotated[Path, typer.Option(help="labelled tune cache extracted with --mode test")],
    out: Annotated[Path, typer.Option(help="head folder to write: the head with its thresholds")],
    precision: Annotated[float | None, typer.Option(help="lowest thresholds that reach it")] = None,
    recall: Annotated[float | None, typer.Option(help="highest thresholds that keep it")] = None,
    strength: Annotated[float, typer.Option(help="detections (recall: objects) that a class's bin counts")] = 20.0,
    max_detections: Annotated[int | None, typer.Option(help="per image [default: the detector's]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing head")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object with all thresholds on stdout")
    ] = False,
) -> None:
    """Give every class a score threshold for a precision or a recall on a tune split, at IoU 0.5.

    Thresholds are part of the head: scores up to a class's threshold become 0 wherever it is used, calib score and the
    service included.

    Example: calib threshold --head models/crt/1 --cache caches/tune --precision 0.7 --out models/crt-precise/1
    """
    from calib.cache import Cache
    from calib.decide.per_class import set_thresholds

    from .console import show

    _, found = set_thresholds(
        head,
        Cache(cache),
        out,
        precision=precision,
        recall=recall,
        strength=strength,
        max_detections=max_detections,
        overwrite=overwrite,
    )
    show([found], {"head": str(out), **vars(found)}, as_json)
