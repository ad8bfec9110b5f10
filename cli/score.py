"""``calib score``."""

from pathlib import Path
from typing import Annotated, Any

import typer


def score(
    cache: Annotated[Path, typer.Option(help="cache extracted with --mode test")],
    head: Annotated[Path, typer.Option(help="head folder, MODELS/NAME/VERSION")],
    out: Annotated[Path, typer.Option(help="detections to write (.parquet)")],
    results_json: Annotated[Path | None, typer.Option(help="also write LVIS results json")] = None,
    score_threshold: Annotated[float | None, typer.Option(help="keep greater scores [default: the detector's]")] = None,
    nms_iou: Annotated[float | None, typer.Option(help="class-wise NMS [default: the detector's]")] = None,
    max_detections: Annotated[int | None, typer.Option(help="per image [default: the detector's]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Rescore the cached proposals with a head and write detections.

    Example: calib score --cache caches/val --head models/bags/1 --out detections/bags.parquet
    """
    from dataclasses import replace

    from calib.artifact import check_fits, load
    from calib.cache import Cache
    from calib.score import detector_nms, write_detections
    from calib.score import score as run

    from .console import bar, report

    artifact, opened = load(head), Cache(cache)
    check_fits(artifact, opened, head)
    given: dict[str, Any] = {"score_threshold": score_threshold, "nms_iou": nms_iou, "max_detections": max_detections}
    nms = replace(detector_nms(opened), **{k: v for k, v in given.items() if v is not None})
    found = run(opened, artifact.head, nms, progress=bar)
    count = write_detections(found, opened, artifact, nms, out, results_json=results_json)
    report({"detections": str(out), "count": count, "images": len(opened.images)}, as_json)
