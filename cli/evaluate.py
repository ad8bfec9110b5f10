"""``calib evaluate``: exact LVIS box AP of a results file."""

from pathlib import Path
from typing import Annotated, Any

import typer

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
    annotations: Annotated[Path, typer.Option(help="Ground truth of the split: LVIS v0.5 or v1, .json or .json.gz.")],
    results: Annotated[
        Path, typer.Option(help="Results: a LVIS/COCO list, .json or .json.gz, or Parquet of calib score.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write per_category.parquet and summary.json to.")],
    max_detections: Annotated[
        int, typer.Option(help="Best results kept per image, over all categories; -1 keeps all.")
    ] = 300,
    bins: Annotated[
        str, typer.Option(help="Edges of the bins of training instances behind AP1, AP2, ...")
    ] = "10,100,1000",
    counts: Annotated[
        Path | None,
        typer.Option(help="Parquet with category_id and instance_count, instead of the ground truth's counts."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")] = False,
) -> None:
    """Evaluate detections: box AP exactly as the LVIS API computes it, per category and per bin.

    Example: calib evaluate --annotations val.json --results detections.parquet --out results/tau-norm

    The training counts behind AP1, AP2, ... are those in the ground truth's
    categories; a training cache has them too: --counts
    caches/train/categories.parquet. Figures in files and JSON are fractions,
    -1 where no category exists. Compare runs with: calib analyze results/*
    """
    from calib.evaluate.run import evaluate_files

    outcome = evaluate_files(
        annotations, results, out, max_detections=max_detections, bins=_parse_bins(bins), counts=counts
    )
    for notice in outcome.notices:
        typer.echo(f"note: {notice}", err=True)
    if as_json:
        import json

        typer.echo(json.dumps(outcome.summary, allow_nan=False))
    else:
        _print_table(outcome.summary)
        typer.echo(f"written: {out}", err=True)


def _parse_bins(text: str) -> list[int]:
    from calib.errors import SettingError

    try:
        return [int(edge) for edge in text.split(",")]
    except ValueError:
        raise SettingError(f"--bins must be whole numbers with commas between, got '{text}'") from None


def _print_table(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=f"at most {summary['max_detections']} detections per image", box=None)
    for header, justify in (("", "left"), ("%", "right"), ("categories", "right"), ("", "left")):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]
    for key, n, meaning in (*ROWS, *_bin_rows(summary["bins"])):
        value = "-" if summary[key] < 0 else f"{100 * summary[key]:.2f}"
        table.add_row(key, value, str(summary[n]) if n else "", meaning)
    Console().print(table)


def _bin_rows(bins: list[int]) -> list[tuple[str, str, str]]:
    edges = [0, *bins]
    rows = []
    for i, low in enumerate(edges):
        high = f" to {edges[i + 1] - 1}" if i < len(bins) else " or more"
        rows.append((f"AP{i + 1}", f"n{i + 1}", f"{low}{high} training instances"))
    return [*rows, ("bAP", "", "mean of the bins")]
