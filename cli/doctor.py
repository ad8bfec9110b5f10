"""``calib doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import bar, named, path_or_url

if TYPE_CHECKING:
    from calib.doctor import Report
    from calib.doctor.findings import Finding

_STYLE = {"error": typer.colors.RED, "warning": typer.colors.YELLOW, "note": typer.colors.CYAN}


def doctor(
    annotations: Annotated[Path, typer.Option(parser=path_or_url, help="TRAIN json (LVIS or COCO, .json or .json.gz)")],
    val: Annotated[Path | None, typer.Option(parser=path_or_url, help="json to judge on")] = None,
    tune: Annotated[Path | None, typer.Option(parser=path_or_url, help="json to choose on")] = None,
    images: Annotated[
        Path | None, typer.Option(help="folder of pictures; without it names and sizes go unchecked")
    ] = None,
    val_images: Annotated[Path | None, typer.Option(help="folder of the pictures of --val, if another")] = None,
    tune_images: Annotated[Path | None, typer.Option(help="folder of the pictures of --tune, if another")] = None,
    detector: Annotated[str, typer.Option(help="as for calib extract; without it data alone are looked at")] = "",
    weights: Annotated[Path | None, typer.Option(help="of the detector (.safetensors or .pth)")] = None,
    detector_args: Annotated[str, typer.Option(help="JSON object, as for calib extract")] = "",
    classes_by_id: Annotated[bool, typer.Option("--classes-by-id", help="as for calib extract")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    sample: Annotated[int, typer.Option(min=1, help="pictures of each split that the detector looks at")] = 100,
    seconds: Annotated[
        float, typer.Option(min=0, help="after which no more of them are begun, per split; 0: all of them")
    ] = 30.0,
    check_images: Annotated[
        int, typer.Option(min=0, help="pictures on which rows must give the detector's own detections; 0: none")
    ] = 2,
    bins: Annotated[
        str, typer.Option(help="edges of training instances; below the first one categories are rare")
    ] = "10,100,1000",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Look at detector and data before any long work: one page of what is wrong, where, and what mends it.

    Classes out of order or one too many, boxes in another format or scale, missing pictures, val in train, objects
    without proposals, and more: docs/extraction.md lists the codes. Nothing is written. Exit code 1 if any finding is
    an error, 0 otherwise, 2 where the input cannot be looked at.

    Example: calib doctor --annotations train.json --val val.json --images images
    --detector torchvision:detector.safetensors

    Example: calib doctor --annotations lvis_v1_train.json --val lvis_v1_val.json --images coco
    --detector torchvision:fasterrcnn_resnet50_fpn --detector-args '{"num_classes": 1204}' --weights w.pth --json
    """
    import json

    from calib.doctor import Case, Examination, examine

    how = Examination(sample, seconds, check_images, _edges(bins))
    adapter = None
    if detector:
        from calib.extract.opener import Opener

        adapter = Opener(detector, device, weights, detector_args)(0)
    elif weights is not None or detector_args:
        from calib.errors import SettingError

        raise SettingError("--weights and --detector-args go with --detector", hint="calib doctor --help")
    case = Case(annotations, val, tune, images, val_images, tune_images, adapter, classes_by_id)
    report = examine(case, how, progress=bar)
    typer.echo(named(json.dumps(report.record())) if as_json else named(_page(report)))
    if report.has_errors:
        raise typer.Exit(1)


def _edges(bins: str) -> tuple[int, ...]:
    from calib.errors import SettingError

    try:
        return tuple(int(edge) for edge in bins.split(","))
    except ValueError:
        raise SettingError(f"bins are '{bins}': expected whole numbers", hint="--bins 10,100,1000") from None


def _page(report: Report) -> str:
    """One paragraph per finding, then the splits in a line each, then how many there are."""
    parts = [_paragraph(f) for f in report.findings]
    parts.append("\n".join(_line(name, details) for name, details in report.data.items()))
    counts = [(len(report.of(s)), s) for s in _STYLE]
    parts.append(", ".join(f"{n} {s}{'' if n == 1 else 's'}" for n, s in counts))
    return "\n\n".join(filter(None, parts))


def _paragraph(finding: Finding) -> str:
    import textwrap

    head = f"{typer.style(finding.severity, fg=_STYLE[finding.severity], bold=True)} {finding.code}  {finding.where}"
    lines = textwrap.wrap(finding.message, 110, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
    if finding.remedy:
        lines += textwrap.wrap(
            finding.remedy, 110, initial_indent="  -> ", subsequent_indent="     ", break_long_words=False
        )
    return "\n".join([head, *lines])


def _line(name: str, s: dict[str, object]) -> str:
    text = f"{name:5} {s['images']:,} images, {s['annotations']:,} annotations, {s['categories']} categories"
    if not isinstance(edges := s.get("bins"), list) or not isinstance(n := s.get("categories_per_bin"), list):
        return text
    names = [f"below {edges[0]}", *(f"from {e}" for e in edges)]
    return f"{text} (by training instances: {', '.join(f'{k} {of}' for k, of in zip(n, names, strict=True))})"
