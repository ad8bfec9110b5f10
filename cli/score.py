"""``calib score``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import path_or_url
from .engine import Address, Cpus, Engine, Processes, check_shared
from .engine import engine as chosen


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
    shard: Annotated[
        str | None,
        typer.Option(
            help="i/N: score only part i (0 to N - 1) of the images; the same command without --shard joins all parts; "
            "env: the part of this process under torchrun or Slurm"
        ),
    ] = None,
    engine: Engine = "local",
    address: Address = None,
    processes: Processes = None,
    cpus: Cpus = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per head on stdout")] = False,
) -> None:
    """Rescore the cached proposals with one or several heads and write detections.

    Several heads share one pass over the cache; each writes OUT/NAME.parquet, or OUT/NAME-VERSION.parquet where a name
    comes twice. Interrupted, the same command goes on behind the images that are done.

    Examples:

    calib score --cache caches/val --head models/bags/1 --out detections/bags.parquet

    calib score ... --shard 3/16   (16 of these on any machines that share the folders; then the same without --shard)

    calib score ... --engine ray --address auto
    """
    from contextlib import ExitStack

    from calib.errors import SettingError
    from calib.parallel.part import Part
    from calib.score.detections import Output, write_detections, write_part
    from calib.score.opened import open_heads
    from calib.storage import writing

    from .console import bar, named, report

    given: dict[str, Any] = {"score_threshold": score_threshold, "nms_iou": nms_iou, "max_detections": max_detections}
    heads = open_heads(head, cache, **given)
    cluster = chosen(engine, address, processes, cpus)
    if shard is not None and cluster is not None:
        raise SettingError("--shard and --engine ray both divide the work", hint="choose one of them")
    if shard is not None or cluster is not None:
        check_shared(out, results_json)
    with ExitStack() as stack:
        tables = stack.enter_context(writing(out, progress=bar))
        lists = stack.enter_context(writing(results_json, progress=bar)) if results_json else None
        files = [(tables, lists)] if len(head) == 1 else _files(head, tables, lists)
        outputs = [Output(artifact, heads.nms, *pair) for artifact, pair in zip(heads.artifacts, files, strict=True)]
        if shard is not None:
            part = Part.parse(shard)
            images = write_part(heads.cache, outputs, part, progress=bar)
            report({"cache": named(cache), "shard": f"{part.index}/{part.count}", "images": images}, as_json)
            return
        counts = write_detections(heads.cache, outputs, cluster, progress=bar)
    for output, count in zip(outputs, counts, strict=True):
        report({"detections": named(output.parquet), "count": count, "images": len(heads.cache.images)}, as_json)


def _files(heads: list[Path], tables: Path, lists: Path | None) -> list[tuple[Path, Path | None]]:
    """Both files of every head, called by its model; with the version where a name comes twice."""
    paths = [path.resolve() for path in heads]
    names = [path.parent.name for path in paths]
    unique = [f"{n}-{p.name}" if names.count(n) > 1 else n for n, p in zip(names, paths, strict=True)]
    return [(tables / f"{n}.parquet", lists and lists / f"{n}.json") for n in unique]
