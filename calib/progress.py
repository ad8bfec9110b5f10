"""How long work reports itself. The library only speaks to these two protocols; the command line draws bars."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """One piece of work under way."""

    def advance(self, n: int = 1, **metrics: float) -> None:
        """``n`` more units are done; ``metrics`` (loss, rows per second ...) are shown beside the bar."""


class Progress(Protocol):
    """Opens a bar for a piece of work of ``total`` units."""

    def __call__(self, label: str, *, total: int, unit: str) -> AbstractContextManager[Bar]: ...


class _Silent:
    def advance(self, n: int = 1, **metrics: float) -> None:
        pass


@contextmanager
def silent(label: str, *, total: int, unit: str) -> Iterator[Bar]:
    """The default: say nothing."""
    yield _Silent()
