"""README and the pages of docs/ name everything there is. Their commands are run by test_demo.py."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from calib.analysis import questions
from calib.cli.main import app
from calib.doctor.codes import CODES
from calib.registry import METHODS, load
from calib.server.serve_settings import ServeSettings
from calib.settings import known_keys

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
METHODS_PAGE = PAGES["docs/methods.md"]


def rows_of(text: str, section: str = "") -> set[str]:
    """First cells of the table under a heading, without backticks."""
    if section:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", text, re.M))


def commands() -> set[str]:
    found = set()
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {f"calib {name} {i}" for i in inner} if inner else {f"calib {name}"}
    return found


def test_every_command_stands_in_the_readme_and_nothing_else() -> None:
    assert rows_of(PAGES["README.md"], "Commands") == commands()


def test_the_table_of_methods_is_the_generated_one(calib: Callable[..., Any]) -> None:
    table = METHODS_PAGE.split("<!-- calib methods --markdown -->\n")[1].split("\n\n")[0]
    assert table == calib("methods", "--markdown").stdout.rstrip(), "paste what `calib methods --markdown` prints"


def test_every_question_stands_in_its_page_and_nothing_else() -> None:
    assert rows_of(PAGES["docs/evaluation.md"], "Questions") == set(questions())


def test_every_finding_of_the_doctor_stands_in_its_page_as_it_says() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (.*?) \| (.*?) \|$", PAGES["docs/extraction.md"], re.M)
    assert {code: (severity, says) for code, severity, says in rows} == CODES


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_stands_in_the_methods_page(name: str) -> None:
    for key in known_keys(load(METHODS[name].target)()):
        assert f"`{key.rpartition('.')[2]}`" in METHODS_PAGE, f"{name}: {key}"


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_shows_an_example(name: str) -> None:
    command = get_command(app)
    for part in name.split()[1:]:
        command = command.commands[part]  # type: ignore[attr-defined]
    text = " ".join(filter(None, (command.help, command.epilog)))
    assert "Example" in text and name in text, f"{name} --help has no example"


def test_every_setting_of_the_service_stands_in_its_page_and_nothing_else() -> None:
    table = PAGES["docs/service.md"].split("\n## Settings\n")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(ServeSettings.model_fields)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_pages_point_at_files_that_exist(page: str) -> None:
    for name in re.findall(r"`((?:calib|cli|server|tests|data|benchmarks|docs)/[\w/.]*)`", PAGES[page]):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page]):
        assert link.startswith("https://") or (ROOT / page).parent.joinpath(link).exists(), link


def test_every_page_is_told_of_in_the_readme() -> None:
    assert {page for page in PAGES if f"({page})" not in PAGES["README.md"]} == {"README.md"}
