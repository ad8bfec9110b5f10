"""``calib score``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import path_or_url


def score(
    cache: Annotated[Path, typer.Option(parser=path_or_url, help="cache extracted with --mode test")],
    head: Annotated[
        list[Path],
        typer.Option(parser=path_or_url, help="head folder, MODELS/NAME/VERSION; repeat it for several"),
    ],
    out: Annotated[
        str, typer.Option(metavar="<path or URL>", help="detections to write (.parquet); of several heads, a folder")
    ],
    results_json: Annotated[
        str | None,
        typer.Option(metavar="<path or URL>", help="also write LVIS results json; of several heads, a folder"),
    ] = None,
    score_threshold: Annotated[float | None, typer.Option(help="keep greater scores [default: the detector's]")] = None,
    nms_iou: Annotated[float | None, typer.Option(help="class-wise NMS [default: the detector's]")] = None,
    max_detections: Annotated[int | None, typer.Option(help="per image [default: the detector's]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per head on stdout")] = False,
) -> None:
    """Rescore the cached proposals with one or several heads and write detections.

    Several heads share one pass over the cache; each writes OUT/NAME.parquet, or OUT/NAME-VERSION.parquet where a name
    comes twice. Interrupted, the same command goes on behind the images that are done.

    Example: calib score --cache caches/val --head models/bags/1 --out detections/bags.parquet
    """
    from contextlib import ExitStack
    from dataclasses import replace

    from calib.artifact import check_fits, load
    from calib.cache import Cache
    from calib.detections import Output, write_detections
    from calib.score import detector_nms
    from calib.storage import writing

    from .console import bar, named, report

    artifacts, opened = [load(path) for path in head], Cache(cache)
    for artifact, path in zip(artifacts, head, strict=True):
        check_fits(artifact, opened, path)
    given: dict[str, Any] = {"score_threshold": score_threshold, "nms_iou": nms_iou, "max_detections": max_detections}
    nms = replace(detector_nms(opened), **{k: v for k, v in given.items() if v is not None})
    with ExitStack() as stack:
        tables = stack.enter_context(writing(out, progress=bar))
        lists = stack.enter_context(writing(results_json, progress=bar)) if results_json else None
        if len(head) == 1:
            outputs = [Output(artifacts[0], nms, tables, lists)]
        else:
            outputs = [
                Output(artifact, nms, tables / f"{name}.parquet", lists and lists / f"{name}.json")
                for artifact, name in zip(artifacts, _names(head), strict=True)
            ]
        counts = write_detections(opened, outputs, progress=bar)
    for output, count in zip(outputs, counts, strict=True):
        report({"detections": named(output.parquet), "count": count, "images": len(opened.images)}, as_json)


def _names(heads: list[Path]) -> list[str]:
    """Names of the models; with their versions where a name comes twice."""
    paths = [path.resolve() for path in heads]
    names = [path.parent.name for path in paths]
    return [f"{n}-{p.name}" if names.count(n) > 1 else n for n, p in zip(names, paths, strict=True)]
