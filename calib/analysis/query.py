"""Asking: a shipped question or the user's own SQL, over views of the files that were given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from calib.errors import InputError, SettingError, UnknownNameError

from .catalogue import VARIABLES, WHOLE, Question, question
from .views import SOURCES, Views, open_views

NO_VARIABLES: Mapping[str, str] = {}


@dataclass(frozen=True)
class Answer:
    """A table: names of the columns, and rows of plain Python values."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def records(self) -> list[dict[str, Any]]:
        """The rows as dictionaries."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def ask(paths: Sequence[Path], name: str, variables: Mapping[str, str] = NO_VARIABLES) -> Answer:
    """Answer the shipped question ``name`` over ``paths``.

    Raises:
        UnknownNameError: no such question, or a variable names a run that was not given.
        SettingError: a variable that the question needs is not set, or does not fit.
        InputError: a path cannot be used, or none holds what the question needs.
    """
    asked = question(name)
    with open_views(paths) as views:
        _check_needs(asked, views, variables)
        return _execute(views, asked.sql, variables)


def query(paths: Sequence[Path], sql: str, variables: Mapping[str, str] = NO_VARIABLES) -> Answer:
    """Run the user's own SQL over ``paths``; of several statements the last one answers.

    Raises:
        InputError: a path cannot be used, or DuckDB refuses the SQL (its message is passed on).
        UnknownNameError: a variable of another name than ``VARIABLES``.
    """
    with open_views(paths) as views:
        return _execute(views, sql, variables)


def _check_needs(asked: Question, views: Views, variables: Mapping[str, str]) -> None:
    for view in asked.views:
        if view not in views.names:
            raise InputError(
                f"question '{asked.name}' needs the view {view}, and nothing that was given holds it",
                hint=f"add {SOURCES[view]} to the command line",
            )
    for name in variables:
        if name not in asked.runs + asked.options:
            raise UnknownNameError(f"variable of question '{asked.name}'", name, asked.runs + asked.options)
    for name in asked.runs:
        if name not in variables:
            raise SettingError(
                f"question '{asked.name}' needs to know which run is '{name}'",
                hint=f"add --set {name}=RUN, where RUN is one of {', '.join(views.runs)}",
            )
        if variables[name] not in views.runs:
            raise UnknownNameError("run", variables[name], views.runs)


def _execute(views: Views, sql: str, variables: Mapping[str, str]) -> Answer:
    try:
        for name, value in variables.items():
            if name not in VARIABLES:
                raise UnknownNameError("variable", name, VARIABLES)
            if name in WHOLE and not (value.isdecimal() and int(value) > 0):
                raise SettingError(f"variable {name} is '{value}': expected a whole number of at least 1")
            views.connection.execute(VARIABLES[name], [value])
        if not views.connection.extract_statements(sql):
            raise InputError("there is no statement in the SQL", hint="for example: SELECT * FROM summary")
        cursor = views.connection.execute(sql)
        rows = cursor.fetchall()
        columns = tuple(column[0] for column in cursor.description or ())
    except duckdb.Error as e:
        given = ", ".join(sorted(views.names)) or "none"
        raise InputError(
            f"DuckDB: {e}", hint=f"views of the given paths: {given}; DESCRIBE NAME lists the columns of one"
        ) from e
    return Answer(columns, tuple(rows))
