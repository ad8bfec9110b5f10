"""``calib evaluate``: exact AP of results files, or of heads on a cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from calib.evaluate.run import Options, Outcome

ROWS = (
    ("AP", "n", "mean over IoU 0.50:0.95"),
    ("AP50", "n", "IoU 0.50"),
    ("AP75", "n", "IoU 0.75"),
    ("APs", "ns", "objects below 32 x 32 pixels"),
    ("APm", "nm", "up to 96 x 96"),
    ("APl", "nl", "larger"),
    ("APr", "nr", "rare categories"),
    ("APc", "nc", "common"),
    ("APf", "nf", "frequent"),
    ("AR", "n", "recall of all detections that count"),
)


def evaluate(
    out: Annotated[Path, typer.Option(help="Folder to write per_category.parquet and summary.json to.")],
    annotations: Annotated[
        Path | None, typer.Option(help="Ground truth of the split: LVIS v0.5 or v1, or COCO, .json or .json.gz.")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Results: a LVIS/COCO list, .json or .json.gz, or Parquet of calib score; repeatable."),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Judge heads on this cache (of --mode test) instead.")] = None,
    head: Annotated[
        list[Path] | None, typer.Option(help="With --cache: a head folder, MODELS/NAME/VERSION; repeatable.")
    ] = None,
    style: Annotated[str, typer.Option(help="lvis, or coco (every category known in every image, crowds).")] = "lvis",
    iou_type: Annotated[str, typer.Option(help="bbox, or segm for mask AP (results in JSON).")] = "bbox",
    max_detections: Annotated[
        int | None,
        typer.Option(help="Best results kept per image [default: 300]; coco: per category too [100]; -1 keeps all."),
    ] = None,
    bins: Annotated[
        str, typer.Option(help="Edges of the bins of training instances behind AP1, AP2, ...")
    ] = "10,100,1000",
    counts: Annotated[
        Path | None,
        typer.Option(help="Parquet with category_id and instance_count, instead of the ground truth's counts."),
    ] = None,
    fixed_ap: Annotated[
        int | None,
        typer.Option(is_flag=False, flag_value=10_000, help="AP-fixed: K results per category, no cap per image."),
    ] = None,
    pooled_ap: Annotated[
        int | None,
        typer.Option(is_flag=False, flag_value=10_000, help="AP-pool: one curve over all categories, K of each."),
    ] = None,
    calibration: Annotated[bool, typer.Option("--calibration", help="D-ECE, LaECE, LaACE, LRP and oLRP.")] = False,
    proposals: Annotated[
        bool, typer.Option("--proposals", help="With --cache: accuracy and recall of proposals, AP of right labels.")
    ] = False,
    matches: Annotated[
        bool, typer.Option("--matches", help="Write matches.parquet too: what became of every detection.")
    ] = False,
    bootstrap: Annotated[
        int | None,
        typer.Option(is_flag=False, flag_value=1000, help="Intervals of differences to the first result."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="calib; or lvis or coco: run the official package too, and say how far we are from it.")
    ] = "calib",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")] = False,
) -> None:
    """Evaluate detections: AP exactly as the LVIS and COCO APIs compute it, per category and per bin.

    Examples:

    calib evaluate --annotations val.json --results detections.parquet --out results/tau-norm

    calib evaluate --annotations val.json --results a.json --results b.json --bootstrap --out results

    calib evaluate --cache caches/val --head models/softmax/1 --head models/crt/1 --out results

    The training counts behind AP1, AP2, ... are those in the ground truth's
    categories; a training cache has them too: --counts
    caches/train/categories.parquet. Figures in files and JSON are fractions,
    -1 where no category exists. Of several results each gets a folder of its
    name under --out, and JSON is an object by name. Compare runs with: calib
    analyze results/*
    """
    from calib.errors import SettingError
    from calib.evaluate.run import Options

    options = Options(
        style=_one_of(style, "--style", ("lvis", "coco")),
        iou_type=_one_of(iou_type, "--iou-type", ("bbox", "segm")),
        max_detections=max_detections,
        bins=_parse_bins(bins),
        fixed_ap=fixed_ap,
        pooled_ap=pooled_ap,
        calibration=calibration,
        matches=matches,
        bootstrap=bootstrap,
        engine=None if engine == "calib" else _one_of(engine, "--engine", ("calib", "lvis", "coco")),
    )
    if (cache is None) == (not results) or (cache is None) != (not head):
        raise SettingError(
            "nothing to evaluate, or two kinds of it",
            hint="give --annotations with --results, or --cache with --head",
        )
    if proposals and cache is None:
        raise SettingError("--proposals needs --cache and --head")
    if cache is not None:
        outcomes = _of_heads(cache, head or [], out, options, annotations, counts, proposals=proposals)
    elif annotations is None:
        raise SettingError("--results need --annotations", hint="the ground truth of the split")
    else:
        outcomes = _of_files(annotations, results or [], out, options, counts)
    _tell(outcomes, out, as_json=as_json)


def _of_files(
    annotations: Path, results: list[Path], out: Path, options: Options, counts: Path | None
) -> dict[str, Outcome]:
    from calib.errors import InputError
    from calib.evaluate.run import evaluate_files

    from .console import bar

    names = [path.name.removesuffix(".gz").rpartition(".")[0] or path.name for path in results]
    if len(set(names)) < len(names):
        raise InputError("two results files have one name", hint="their names tell the results apart: rename one")
    outs = [out] if len(results) == 1 else [out / name for name in names]
    outcomes = evaluate_files(annotations, results, outs, options, counts=counts, progress=bar)
    return dict(zip(names, outcomes, strict=True))


def _of_heads(
    cache: Path,
    heads: list[Path],
    out: Path,
    options: Options,
    annotations: Path | None,
    counts: Path | None,
    *,
    proposals: bool,
) -> dict[str, Outcome]:
    from dataclasses import replace

    from calib.artifact import check_fits, load
    from calib.assess import Assessment
    from calib.cache import Cache
    from calib.errors import InputError, SettingError
    from calib.evaluate import GroundTruth
    from calib.evaluate.run import Judged, evaluate_all, read_counts
    from calib.score import detector_nms

    from .console import bar

    if options.iou_type != "bbox" or options.matches or options.engine:
        raise SettingError(
            "heads on a cache have boxes only, and no file that others could read",
            hint="leave out --iou-type, --matches and --engine, or calib score first",
        )
    names = [_head_name(path, heads) for path in heads]
    if len(set(names)) < len(names):
        raise InputError("one head is given twice")
    opened = Cache(cache)
    artifacts = [load(path) for path in heads]
    for artifact, path in zip(artifacts, heads, strict=True):
        check_fits(artifact, opened, path)
    truth = None if annotations is None else GroundTruth.read(annotations, style=options.style)
    if truth is None and options.style == "coco":
        raise SettingError("a cache has no crowds", hint="add --annotations")
    assessment = Assessment(opened, truth)
    if counts is not None:
        truth = assessment.evaluator.truth
        assessment = Assessment(opened, truth, read_counts(counts, truth))
    nms = (
        replace(detector_nms(opened), max_detections=max(options.limit, 1))
        if options.limit > 0
        else detector_nms(opened)
    )
    judged = [
        Judged(
            name,
            assessment.found(artifact.head, nms, progress=bar),
            out if len(heads) == 1 else out / name,
            {"cache": str(cache), "head": str(path)},
            {"proposals": assessment.proposal_figures(artifact.head, nms, options.bins)} if proposals else {},
        )
        for name, artifact, path in zip(names, artifacts, heads, strict=True)
    ]
    outcomes = evaluate_all(assessment.evaluator, judged, options, progress=bar)
    return dict(zip(names, outcomes, strict=True))


def _head_name(path: Path, heads: list[Path]) -> str:
    """NAME of MODELS/NAME/VERSION, with the version where several of that name are given."""
    path = path.resolve()
    alone = sum(other.resolve().parent == path.parent for other in heads) == 1
    return path.parent.name if alone else f"{path.parent.name}-{path.name}"


def _one_of(value: str, option: str, choices: tuple[str, ...]) -> Any:
    from calib.errors import SettingError

    if value not in choices:
        raise SettingError(f"{option} must be {' or '.join(choices)}, got '{value}'")
    return value


def _parse_bins(text: str) -> tuple[int, ...]:
    from calib.errors import SettingError

    try:
        return tuple(int(edge) for edge in text.split(","))
    except ValueError:
        raise SettingError(f"--bins must be whole numbers with commas between, got '{text}'") from None


def _tell(outcomes: dict[str, Outcome], out: Path, *, as_json: bool) -> None:
    for notice in dict.fromkeys(notice for outcome in outcomes.values() for notice in outcome.notices):
        typer.echo(f"note: {notice}", err=True)
    if as_json:
        import json

        summaries = {name: outcome.summary for name, outcome in outcomes.items()}
        only = next(iter(summaries.values()))
        typer.echo(json.dumps(only if len(summaries) == 1 else summaries, allow_nan=False))
        return
    _print_table({name: outcome.summary for name, outcome in outcomes.items()})
    for name, outcome in outcomes.items():
        _print_more(name if len(outcomes) > 1 else "", outcome)
    typer.echo(f"written: {out}", err=True)


def _print_table(summaries: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    first = next(iter(summaries.values()))
    per = "image" if first["style"] == "lvis" else "image and category"
    cap = "all detections" if first["max_detections"] < 0 else f"at most {first['max_detections']} detections per {per}"
    table = Table(caption=cap, box=None)
    titles = ["%"] if len(summaries) == 1 else list(summaries)
    for header, justify in (("", "left"), *((t, "right") for t in titles), ("categories", "right"), ("", "left")):
        table.add_column(header, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for key, n, meaning in (*ROWS, *_bin_rows(first["bins"])):
        values = ["-" if s[key] < 0 else f"{100 * s[key]:.2f}" for s in summaries.values()]
        table.add_row(key, *values, str(first[n]) if n else "", meaning)
    Console().print(table)


def _bin_rows(bins: list[int]) -> list[tuple[str, str, str]]:
    edges = [0, *bins]
    rows = []
    for i, low in enumerate(edges):
        high = f" to {edges[i + 1] - 1}" if i < len(bins) else " or more"
        rows.append((f"AP{i + 1}", f"n{i + 1}", f"{low}{high} training instances"))
    return [*rows, ("bAP", "", "mean of the bins")]


def _print_more(name: str, outcome: Outcome) -> None:
    """What was asked for besides AP, a line each."""
    s, prefix = outcome.summary, f"{name}: " if name else ""
    if missing := s["never_detected"]:
        named = dict(zip(outcome.evaluation.category_ids.tolist(), outcome.evaluation.names, strict=True))
        shown = ", ".join(named[c] for c in missing[:10]) + (" ..." if len(missing) > 10 else "")
        typer.echo(f"{prefix}{len(missing)} categories with objects were never detected: {shown}")
    if "fixed" in s:
        keys = [k for k in ("AP", "APr", "APc", "APf") if s["fixed"][k] >= 0]
        typer.echo(f"{prefix}AP-fixed, {s['fixed']['per_category']} per category: {_percents(s['fixed'], keys)}")
    if "pooled" in s:
        keys = [k for k in ("all", "r", "c", "f") if s["pooled"][k] >= 0]
        typer.echo(f"{prefix}AP-pool, {s['pooled']['per_category']} per category: {_percents(s['pooled'], keys)}")
    for key in ("calibration", "proposals"):
        if key in s:
            keys = [k for k, v in s[key].items() if isinstance(v, float) and v >= 0]
            typer.echo(f"{prefix}{key}: {_percents(s[key], keys)}")
    if "oracle" in s.get("proposals", {}):
        oracle = s["proposals"]["oracle"]
        keys = [k for k in ("AP", "APr", "APc", "APf") if oracle[k] >= 0]
        typer.echo(f"{prefix}with the right label on every proposal: {_percents(oracle, keys)}")
    if "difference" in s:
        for key, d in ((k, d) for k, d in s["difference"].items() if k != "to"):
            low, high = 100 * d["low"], 100 * d["high"]
            typer.echo(
                f"{prefix}{key} {100 * d['difference']:+.2f} against {s['difference']['to']} (95 %: {low:+.2f} to {high:+.2f})"
            )
    if "reference" in s:
        r = s["reference"]
        typer.echo(
            f"{prefix}{r['engine']} package: AP {100 * r['figures']['AP']:.2f}; largest difference of a precision or "
            f"recall value {r['largest_difference']:.3g}, of a figure {r['largest_difference_of_figures']:.3g}"
        )


def _percents(figures: dict[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key} {100 * figures[key]:.2f}" for key in keys)
