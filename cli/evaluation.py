"""What ``calib evaluate`` prints: a table of AP, and a line for everything else that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from calib.evaluate.evaluate_files import Outcome

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


def tell(outcomes: dict[str, Outcome], out: str, *, as_json: bool) -> None:
    """Print ``outcomes`` by name: tables, or with ``as_json`` one object (of several results, by name)."""
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
    from rich.table import Table

    from .console import print_table

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
    print_table(table)


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
            metrics = "{:+.2f} against {} (95 %: {:+.2f} to {:+.2f})".format(
                100 * d["difference"], s["difference"]["to"], 100 * d["low"], 100 * d["high"]
            )
            typer.echo(f"{prefix}{key} {metrics}")
    if "reference" in s:
        r = s["reference"]
        typer.echo(
            f"{prefix}{r['engine']} package: AP {_percent(r['metrics']['AP'])}; largest difference of a precision or "
            f"recall value {r['largest_difference']:.3g}, of a metric {r['largest_difference_of_metrics']:.3g}"
        )


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.2f}"


def _percents(metrics: dict[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key} {100 * metrics[key]:.2f}" for key in keys)
