"""``calib analyze``: questions about results, caches and detections, in SQL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import path_or_url

if TYPE_CHECKING:
    from calib.analysis import Answer


def analyze(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PATH...",
            parser=path_or_url,
            help="Result folders, feature caches and detections files (.parquet), in any mix.",
        ),
    ] = None,
    question: Annotated[str | None, typer.Option(help="A shipped question; --list shows them.")] = None,
    sql: Annotated[str | None, typer.Option(help="Your own SQL over the same views.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Set a variable of the question, e.g. a=RUN; repeatable."),
    ] = None,
    list_questions: Annotated[bool, typer.Option("--list", help="List the shipped questions.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as one JSON array.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the rows as CSV with a header line.")] = False,
) -> None:
    """Ask questions about results, caches and detections; without a question, list those there are.

    Views: results, summary and matches (of result folders; column run is the folder's name), detections, and of caches
    categories, images, annotations, meta, classifier.

    Examples:

    calib analyze results/* --question ap_per_bin

    calib analyze results/softmax results/bags --question bin_difference --set a=softmax --set b=bags

    calib analyze caches/train --question norm_against_count --csv

    calib analyze results/* --sql "SELECT run, AP, AP1 FROM summary ORDER BY AP1 DESC"
    """
    from calib.analysis import Answer, ask, query, questions
    from calib.errors import SettingError

    if (as_json and as_csv) or (question is not None and sql is not None):
        raise SettingError("give only one of --json and --csv, and only one of --question and --sql")
    variables = _parse_settings(settings or [])
    if list_questions or (question is None and sql is None):
        rows = tuple((q.name, q.description, ", ".join(q.runs + q.options)) for q in questions().values())
        answer = Answer(("question", "description", "variables"), rows)
    elif not paths:
        raise SettingError("nothing to analyse", hint="name result folders, feature caches or detections files")
    elif question is not None:
        answer = ask(paths, question, variables)
    else:
        answer = query(paths, sql or "", variables)
    _print(answer, as_json=as_json, as_csv=as_csv)


def _parse_settings(settings: list[str]) -> dict[str, str]:
    from calib.errors import SettingError

    pairs = [text.partition("=") for text in settings]
    for text, (name, equals, _) in zip(settings, pairs, strict=True):
        if not name or not equals:
            raise SettingError(f"--set needs NAME=VALUE, got '{text}'")
    return {name: value for name, _, value in pairs}


def _print(answer: Answer, *, as_json: bool, as_csv: bool) -> None:
    if as_json:
        import json

        rows = [{key: _json_value(value) for key, value in row.items()} for row in answer.records()]
        typer.echo(json.dumps(rows, allow_nan=False, default=str))
    elif as_csv:
        import csv
        import sys

        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.columns)
        writer.writerows(answer.rows)
    else:
        _print_table(answer)


def _json_value(value: Any) -> Any:
    # JSON has no NaN or infinity, which SQL arithmetic can give.
    is_special = isinstance(value, float) and (value != value or value in (float("inf"), float("-inf")))
    return None if is_special else value


def _print_table(answer: Answer) -> None:
    from rich.table import Table
    from rich.text import Text

    from .console import print_table

    table = Table(box=None)
    for i, name in enumerate(answer.columns):
        is_number = all(isinstance(row[i], (int, float)) for row in answer.rows)
        table.add_column(name, justify="right" if is_number and answer.rows else "left", overflow="fold")
    for row in answer.rows:
        # Text: square brackets in names are not markup.
        table.add_row(*(Text(f"{v:.4f}" if isinstance(v, float) else "" if v is None else str(v)) for v in row))
    print_table(table)
