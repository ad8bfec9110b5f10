"""``calib calibrate``."""

from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    head: Annotated[Path, typer.Option(help="head folder, MODELS/NAME/VERSION")],
    cache: Annotated[Path, typer.Option(help="labelled tune cache extracted with --mode test")],
    out: Annotated[Path, typer.Option(help="head folder to write: the head with its maps")],
    method: Annotated[str, typer.Option(help="temperature, platt, isotonic or histogram (by size)")] = "platt",
    by: Annotated[str, typer.Option(help="pooled (one map), bin (of training instances), class or size")] = "pooled",
    target: Annotated[str, typer.Option(help="what scores shall say: precision at IoU 0.5, or mean iou")] = "precision",
    strength: Annotated[float, typer.Option(help="detections that the map of all counts in each bin or class")] = 100.0,
    sizes: Annotated[int, typer.Option(help="by size: how many, equal numbers of detections by box area")] = 4,
    score_bins: Annotated[int, typer.Option(help="of the histogram")] = 10,
    judge: Annotated[Path | None, typer.Option(help="another labelled cache to report on, val for one")] = None,
    max_detections: Annotated[int | None, typer.Option(help="per image [default: the detector's]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing head")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout, reliability too")] = False,
) -> None:
    """Make a head's scores say how often its detections are right.

    Every map increases, so the order within a class and its AP stay; maps of bins and classes shift classes against
    each other, which can move a little AP at the cap per image. Maps by box size change the order where small boxes
    score too high for what they are. Prints errors and AP before and after.

    Example: calib calibrate --head models/crt/1 --cache caches/tune --judge caches/val --out models/crt-calibrated/1
    """
    from calib.cache import Cache
    from calib.decide.confidence import Confidence
    from calib.decide.confidence import calibrate as run

    from .console import show

    how = Confidence(method, by, target, strength, sizes, score_bins)
    other = None if judge is None else Cache(judge)
    _, changes = run(head, Cache(cache), out, how, judge=other, max_detections=max_detections, overwrite=overwrite)
    show(changes, {"head": str(out), "caches": [vars(c) for c in changes]}, as_json)
