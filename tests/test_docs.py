"""README names everything there is. Its commands are run by test_demo.py."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from calib.analysis import questions
from calib.cli.main import app
from calib.registry import METHODS, load
from calib.server.settings import ServeSettings
from calib.settings import known_keys

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def rows_of(section: str) -> set[str]:
    """First cells of the table under a heading, without backticks."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", text, re.M))


def commands() -> set[str]:
    found = set()
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"calib {name} {i}" for i in inner} if inner else {f"calib {name}"}
    return found


def test_every_command_stands_in_the_readme_and_nothing_else() -> None:
    assert rows_of("Commands") == commands()


def test_every_method_stands_in_the_readme_and_nothing_else() -> None:
    assert rows_of("Methods") == set(METHODS)


def test_every_question_stands_in_the_readme_and_nothing_else() -> None:
    assert rows_of("Questions") == set(questions())


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_stands_in_the_readme(name: str) -> None:
    section = README.split("\n## Methods\n")[1].split("\n## ")[0]
    for key in known_keys(load(METHODS[name].target)()):
        assert f"`{key.rpartition('.')[2]}`" in section, f"{name}: {key}"


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_shows_an_example(name: str) -> None:
    command = get_command(app)
    for part in name.split()[1:]:
        command = command.commands[part]  # type: ignore[attr-defined]
    text = " ".join(filter(None, (command.help, command.epilog)))
    assert "Example" in text and name in text, f"{name} --help has no example"


def test_every_setting_of_the_service_stands_in_its_page_and_nothing_else() -> None:
    table = (ROOT / "docs" / "service.md").read_text().split("\n## Settings\n")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(ServeSettings.model_fields)


def test_readme_points_at_files_that_exist() -> None:
    for name in re.findall(r"`((?:calib|cli|server|tests|data|benchmarks|docs)/[\w/.]*)`", README):
        assert (ROOT / name).exists(), name
