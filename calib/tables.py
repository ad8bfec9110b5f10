"""Tables of plain rows: objects that have them show themselves in Jupyter."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Rows = list[dict[str, Any]]


class Tables(ABC):
    """Something that is best seen as tables."""

    @abstractmethod
    def tables(self) -> list[tuple[str, Rows]]:
        """Titles and rows of equal keys."""

    def _repr_html_(self) -> str:
        return "".join(as_html(rows, title) for title, rows in self.tables())


def as_html(rows: Sequence[Mapping[str, Any]], title: str = "") -> str:
    """A table for a notebook."""
    head = "".join(f"<th>{escape(str(k))}</th>" for k in (rows[0] if rows else ()))
    body = "".join("<tr>" + "".join(f"<td>{escape(str(v))}</td>" for v in row.values()) + "</tr>" for row in rows)
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def percent(fraction: float) -> str:
    """0.1234 -> 12.3; a metric that does not exist is -1, and is -"""
    return "-" if fraction == -1 else f"{100 * fraction:.1f}"
