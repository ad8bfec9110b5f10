"""What all commands share."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from calib import __version__
from calib.cli.console import CalibGroup
from calib.errors import InputError, SettingError
from calib.parallel.devices import choose_device


def ending_with(error: BaseException) -> typer.Typer:
    app = typer.Typer(cls=CalibGroup)

    @app.command()
    def run() -> None:
        raise error

    app.command("extract")(run)
    return app


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (InputError("it is odd", hint="make it even"), 2, "error: it is odd\nhint: make it even\n"),
        (InputError("it is odd"), 2, "error: it is odd\n"),
        (PermissionError(13, "Permission denied", "/etc/x"), 2, "error: /etc/x: Permission denied\nhint: "),
        (OSError(28, "No space left on device"), 2, "error: No space left on device\nhint: "),
        (KeyboardInterrupt(), 130, "interrupted: no output is half-written; run the same command again to go on\n"),
    ],
)
def test_errors_end_with_a_message_and_a_code(error: BaseException, code: int, stderr: str) -> None:
    outcome = CliRunner().invoke(ending_with(error), ["run"])
    assert outcome.exit_code == code and outcome.stdout == ""
    assert outcome.stderr.startswith(stderr)


def test_our_own_mistakes_are_not_hidden() -> None:
    outcome = CliRunner().invoke(ending_with(ZeroDivisionError("bug")), ["run"])
    assert outcome.exit_code == 1 and isinstance(outcome.exception, ZeroDivisionError)


def test_the_version_is_told(calib: Callable[..., Any]) -> None:
    assert calib("--version").stdout == f"{__version__}\n"


def test_help_loads_neither_torch_nor_pyarrow() -> None:
    code = "import sys\nfrom calib.cli.main import app\ntry:\n    app(['--help'])\nfinally:\n"
    code += "    print(sorted({'torch', 'pyarrow', 'duckdb', 'fastapi'} & set(sys.modules)), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "[]"
    for command in ("extract", "methods", "train", "score", "evaluate", "analyze", "serve", "show", "demo", "data"):
        assert f" {command} " in run.stdout


def test_a_reader_that_closes_early_is_no_error() -> None:
    """``calib methods --json | head -c 1``"""
    run = subprocess.run(
        f"{sys.executable} -c 'from calib.cli.main import app; app()' methods --json | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout == "[" and "Traceback" not in run.stderr and "error" not in run.stderr


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(SettingError, match="device 'abacus' cannot be used") as e:
        choose_device("abacus")
    assert e.value.hint == "--device auto"
