"""``calib demo``."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    out: Annotated[Path, typer.Option(help="folder to fill")] = Path("demo"),
    seeds: Annotated[int, typer.Option(help="train learned heads with so many seeds, for a spread")] = 1,
    scale: Annotated[
        float, typer.Option(help="below 1: a quick look with fewer images and steps; its metrics mean nothing")
    ] = 1.0,
    every_method: Annotated[bool, typer.Option("--all", help="every method: about fifteen minutes")] = False,
    data_seed: Annotated[int, typer.Option(help="of the rendered images")] = 2718,
    detector: Annotated[
        Path | None,
        typer.Option(help="checkpoint of data/train_detector.py, for images of another seed than the shipped one's"),
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="processes [default: all cores]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the table as one JSON object on stdout")] = False,
) -> None:
    """The main job on rendered images: calib improve, with a table of heads beside the one that it chooses.

    Takes about seven minutes on two cores. An interrupted demo goes on when the same command is run again.

    Examples: calib demo; calib demo --out /tmp/look --scale 0.05
    """
    import json

    from calib.demo.demo import DemoSettings
    from calib.demo.demo import demo as run

    from .console import bar, cores, tell

    settings = DemoSettings(seeds, scale, data_seed, every_method, detector)
    summary = run(out, settings, processes=processes or cores(), progress=bar, note=tell)
    table = summary.table
    if scale < 1:
        print("note: --scale below 1: a look at the workings, the metrics mean nothing", file=sys.stderr)
    if as_json:
        print(json.dumps(table.plain()))
        return
    _print(table)
    print(_NEXT.format(out=out))


def _print(table: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, title="box AP (%) on val, gain over natural-converged; numbers of categories in brackets")
    for i, title in enumerate(table.header()):
        shown.add_column(title.replace(" (", "\n("), justify="right" if i else "left", no_wrap=i == 0)
    for cap in table.caps:
        shown.add_row(f"[bold]at most {cap} detections per image[/bold]")
        for line in table.lines(cap):
            shown.add_row(*line)
        shown.add_section()
    Console(width=max(Console().width, 120)).print(shown)


_NEXT = """
written under {out}/: table.md, ap_per_bin.png, weight_norms.png, gain_per_category.png, models/, results/,
and report.html, to be opened in a browser

next:
  calib analyze {out}/results/* --question ap_per_bin
  calib analyze {out}/results/* --question gained_and_lost --set a=natural-converged --set b=crt
  calib serve --models {out}/models          then open http://127.0.0.1:8000/docs
  calib train crt --cache {out}/caches/train --out {out}/models/mine/1 --set lr=0.4
"""
