"""Bytes that the process holds for its clients: bodies on their way in, replies on their way out."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .errors import BusyError
from .layers.protocol import PATIENCE_S


@dataclass(eq=False)
class Share:
    """What one request holds; ``connection`` is its ``GuardedProtocol``, or None under another server."""

    connection: Any
    size: int = 0


class Held:
    """All shares together stay within ``limit`` bytes; one larger than that is taken where it is alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._shares: set[Share] = set()

    @contextmanager
    def share(self, connection: Any, size: int = 0) -> Iterator[Share]:
        """A share of so many bytes, for which there is room, until the end of the block."""
        share = Share(connection, size)
        self._shares.add(share)
        try:
            yield share
        finally:
            self._shares.discard(share)

    def resize(self, share: Share, size: int) -> None:
        """Hold ``size`` bytes in ``share`` from now on; slow clients are left to make room, the slowest first.

        Raises:
            BusyError: there is none.
        """
        while (others := sum(s.size for s in self._shares if s is not share)) and others + size > self._limit:
            slow = [s for s in self._shares if s is not share and s.size and _waited(s) >= PATIENCE_S]
            if not slow:
                raise BusyError(f"{others} bytes of requests and replies are held already", hint="try again")
            slowest = max(slow, key=_waited)
            self._shares.discard(slowest)
            slowest.connection.leave()
        share.size = size


def _waited(share: Share) -> float:
    return 0.0 if share.connection is None else share.connection.waited()
