"""The shipped questions: one ``.sql`` file each, described by the comment lines at its top.

The first line says in one sentence what is asked. ``-- views: x, y`` names the views it reads, ``-- runs: a,
b`` the variables that must be set to names of runs, ``-- options: limit`` those that may be set. A question
is read with ``getvariable('a')``, so that the file also runs as it is in the duckdb shell, after ``SET
VARIABLE a = '...'``.
"""

from dataclasses import dataclass
from importlib.resources import files

from calib.errors import UnknownNameError

# Every variable that may be set. Its statement stands here in full: no SQL is made from what a user types.
VARIABLES = {
    "a": "SET VARIABLE a = ?",
    "b": "SET VARIABLE b = ?",
    "below": "SET VARIABLE below = ?",
    "bins": "SET VARIABLE bins = ?",
    "cap": "SET VARIABLE cap = ?",
    "limit": 'SET VARIABLE "limit" = ?',
}

WHOLE = ("below", "cap", "limit")


@dataclass(frozen=True)
class Question:
    """A question with its SQL and what it needs."""

    name: str
    description: str
    sql: str
    views: tuple[str, ...]
    runs: tuple[str, ...]  # variables that must name a run
    options: tuple[str, ...]  # variables that may be set


def questions() -> dict[str, Question]:
    """All shipped questions by name."""
    folder = files("calib.analysis").joinpath("questions")
    texts = {f.name.removesuffix(".sql"): f.read_text() for f in folder.iterdir() if f.name.endswith(".sql")}
    return {name: _parse(name, texts[name]) for name in sorted(texts)}


def question(name: str) -> Question:
    """The shipped question of that name.

    Raises:
        UnknownNameError: there is none; the nearest is named.
    """
    known = questions()
    if name not in known:
        raise UnknownNameError("question", name, known)
    return known[name]


def _parse(name: str, text: str) -> Question:
    lines = text.splitlines()
    header = [line.removeprefix("--").strip() for line in lines if line.startswith("--")]

    def listed(key: str) -> tuple[str, ...]:
        found = [line.removeprefix(key) for line in header if line.startswith(key)]
        return tuple(item.strip() for line in found for item in line.split(","))

    return Question(name, header[0], text, listed("views:"), listed("runs:"), listed("options:"))
