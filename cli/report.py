"""``calib report``."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULTS...", help="result folders of calib evaluate, one per head, of one split"),
    ],
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="the head that others are compared with [default: the bootstrap's, else softmax, else the first]",
        ),
    ] = None,
    models: Annotated[
        Path | None, typer.Option(help="folder of NAME/VERSION heads: weight norms, training curves")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="folder of pictures, for examples before and after")] = None,
    annotations: Annotated[Path | None, typer.Option(help="the split's annotation file, for --images")] = None,
    examples: Annotated[int, typer.Option(help="pictures to show")] = 6,
    title: Annotated[str | None, typer.Option(help="heading of the page")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print what was written as one JSON object")] = False,
) -> None:
    """Result folders as one HTML page: charts, tables, pictures; nothing outside it is needed to read it.

    What it shows depends on what the folders hold: calib evaluate --matches --calibration --bootstrap, over all heads
    in one command with the baseline first, gives it everything. A section without its metrics says how to get them.

    Examples:

    calib report results/* --out report.html

    calib report results/* --baseline natural --models models --images val2017 --annotations lvis_v1_val.json
    """
    from calib.report import Report, write_report

    from .console import bar
    from .console import report as tell

    asked = Report(results, baseline, models, images, annotations, examples, title)
    written = write_report(out, asked, progress=bar)
    missing = written.pop("missing")
    if as_json:
        tell({**written, "missing": missing}, as_json=True)
        return
    tell(written, as_json=False)
    for line in dict.fromkeys(missing.values()):
        typer.echo(f"note: {line}", err=True)
