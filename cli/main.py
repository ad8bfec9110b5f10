"""The ``calib`` command. Imports neither torch nor pyarrow: every command loads what it needs when it runs."""

from typing import Annotated

import typer

from . import (
    analyze,
    cache,
    calibrate,
    combine,
    compare,
    data,
    demo,
    doctor,
    evaluate,
    export,
    extract,
    import_,
    improve,
    masks,
    methods,
    report,
    score,
    select,
    serve,
    show,
    threshold,
    train,
    tune,
)
from .console import CalibGroup, with_local_paths, with_optional_values

app = typer.Typer(
    cls=CalibGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Make long-tailed detectors work on their rare classes without retraining them.",
    epilog="Start with: calib demo, or calib extract --help. "
    "Exit codes: 0 done, 1 a check failed, 2 something to mend, 130 interrupted.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from calib import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options that stand before the command."""


app.add_typer(data.app, name="data")
app.add_typer(cache.app, name="cache")
app.command()(demo.demo)
app.command()(improve.improve)
app.command()(doctor.doctor)
app.command()(extract.extract)
app.command("import")(import_.import_)
app.command()(methods.methods)
app.command()(train.train)
app.command()(tune.tune)
app.command()(combine.combine)
app.command()(select.select)
app.command()(calibrate.calibrate)
app.command()(threshold.threshold)
app.command()(score.score)
app.command()(compare.compare)
app.command(cls=with_optional_values(evaluate.OPTIONAL_VALUES))(evaluate.evaluate)
app.command()(analyze.analyze)
app.command()(export.export)
app.command()(masks.masks)
app.command()(report.report)
app.command()(serve.serve)
app.command()(show.show)
for info in (i for a in (app, data.app, cache.app) for i in a.registered_commands):
    info.callback = with_local_paths(info.callback) if info.callback else None
