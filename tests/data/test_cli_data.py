"""``calib data shapes``: its summary, its errors, its defaults."""

import inspect
import json
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from calib.cli import data
from calib.cli.console import CalibGroup
from calib.data.plan import ShapesSettings
from calib.data.render import Scene

_TINY = ["--categories", "6", "--images", "4", "--tune-per-category", "1", "--val-per-category", "2"]


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    """The command as it hangs in ``calib``, without its sisters."""
    app = typer.Typer(cls=CalibGroup)
    app.add_typer(data.app, name="data")
    return app


def test_json_summary_is_what_was_written(app: typer.Typer, tmp_path: Path) -> None:
    out = tmp_path / "set"
    result = CliRunner().invoke(app, ["data", "shapes", "--out", str(out), *_TINY, "--json"])
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary["out"] == str(out)
    assert summary["images"]["train"] == 4
    for split in ("train", "tune", "val"):
        written = json.loads((out / f"{split}.json").read_bytes())
        assert len(written["images"]) == summary["images"][split]
        assert len(written["annotations"]) == summary["annotations"][split]
        assert len(list((out / "images" / split).iterdir())) == summary["images"][split]


def test_workers_do_not_change_the_set_and_the_bar_is_on_stderr(app: typer.Typer, tmp_path: Path) -> None:
    sets = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        arguments = ["data", "shapes", "--out", str(out), *_TINY, "--processes", workers]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0
        assert "rendering" in result.stderr and "rendering" not in result.stdout
        assert "4 images" in result.stdout
        sets.append({p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert sets[0] == sets[1]


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--categories", "192", "--images", "5"], "5 train images", "--images 72 or more"),
        (["--categories", "5000"], "more than 21 per family", "1260 categories"),
        (["--size", "20"], "at least 68 pixels", ""),
    ],
)
def test_bad_options_exit_with_2_and_write_nothing(
    app: typer.Typer, tmp_path: Path, arguments: list[str], message: str, hint: str
) -> None:
    result = CliRunner().invoke(app, ["data", "shapes", "--out", str(tmp_path / "set"), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr and hint in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_replaced_only_on_request(app: typer.Typer, tmp_path: Path) -> None:
    arguments = ["data", "shapes", "--out", str(tmp_path / "set"), *_TINY]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "--overwrite" in again.stderr
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0


def test_defaults_of_the_options_are_those_of_the_library() -> None:
    library = {f.name: f.default for f in fields(ShapesSettings)}
    for name, parameter in inspect.signature(data.shapes).parameters.items():
        if name in library:
            assert parameter.default == library[name], name
    assert inspect.signature(data.shapes).parameters["size"].default == Scene().size_px


def test_help_shows_an_example(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["data", "shapes", "--help"])
    assert result.exit_code == 0
    assert "calib data shapes --out" in " ".join(result.stdout.split())
