"""``calib analyze``: questions and SQL from the command line, answers as table, JSON or CSV."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from calib.analysis import questions
from calib.cli.analyze import analyze
from calib.cli.console import CalibGroup

Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    """``run(*arguments)``: the command."""
    app = typer.Typer(cls=CalibGroup)
    app.command()(analyze)
    app.command("other")(lambda: None)
    runner = CliRunner(env={"COLUMNS": "200"})
    return lambda *arguments: runner.invoke(app, ["analyze", *map(str, arguments)])


def test_without_a_question_the_questions_are_listed(run: Run, runs: list[Path]) -> None:
    for arguments in ((), ("--list",), (runs[0],)):
        outcome = run(*arguments)
        assert outcome.exit_code == 0
        for q in questions().values():
            assert q.name in outcome.stdout and q.description in outcome.stdout
    listed = json.loads(run("--list", "--json").stdout)
    assert [row["question"] for row in listed] == sorted(questions())


def test_a_question_about_two_runs(run: Run, runs: list[Path]) -> None:
    arguments = [*runs, "--question", "gained_and_lost", "--set", "a=old", "--set", "b=new"]
    rows = json.loads(run(*arguments, "--json").stdout)
    assert [(row["name"], round(row["difference"], 6)) for row in rows] == [("newt", 1.0), ("pig", -0.5)]
    lines = run(*arguments, "--csv").stdout.splitlines()
    assert lines[0] == "category_id,name,instance_count,n_gt,AP_a,AP_b,difference" and len(lines) == 3
    table = run(*arguments).stdout.splitlines()
    assert table[0].split() == lines[0].split(",") and table[1].split()[:3] == ["1", "newt", "5"]


def test_sql_answers_what_json_cannot_say(run: Run, runs: list[Path]) -> None:
    sql = "SELECT 'nan'::DOUBLE AS a, 'inf'::DOUBLE AS b, DATE '2020-01-02' AS c"
    outcome = run(runs[0], "--sql", sql, "--json")
    assert json.loads(outcome.stdout) == [{"a": None, "b": None, "c": "2020-01-02"}]


def test_brackets_in_answers_are_not_markup(run: Run, runs: list[Path]) -> None:
    assert "[red]x" in run(runs[0], "--sql", "SELECT '[red]x' AS a").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--question", "ap_per_bin"), "nothing to analyse"),
        (("--sql", "SELECT 1", "--question", "ap_per_bin"), "give only one of"),
        (("--json", "--csv"), "give only one of"),
        (("nowhere", "--question", "ap_per_bin"), "path not found: nowhere"),
        (("nowhere", "--question", "ap"), "unknown question 'ap'"),
        (("nowhere", "--sql", "SELECT 1", "--set", "a"), "--set needs NAME=VALUE, got 'a'"),
    ],
)
def test_user_errors_exit_with_2(run: Run, arguments: tuple[str, ...], message: str) -> None:
    outcome = run(*arguments)
    assert outcome.exit_code == 2
    assert message in outcome.stderr and outcome.stdout == ""
