"""What several worker processes of one service must agree on, as files in a folder that they share.

``Journal``: every load and unload, in order. A worker that answered one has written it down; the others follow before
they answer anything else, so that no client sees an older state after a newer one. ``Snapshots``: each worker's
counters, at most ``EVERY_S`` old, so that any worker can answer for all.
"""

import fcntl
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from calib.errors import CalibError

EVERY_S = 1.0
_log = logging.getLogger("uvicorn.error")

Change = Callable[[str, str, str | None], None]  # "load" or "unload", model, version


class Journal:
    """A list of changes that only grows; ``apply`` carries one out in this process."""

    def __init__(self, folder: Path, apply: Change) -> None:
        self._path, self._apply = folder / "journal", apply
        self._path.touch()
        self._read = 0  # bytes that this process has followed
        self._lock = threading.Lock()

    def is_behind(self) -> bool:
        """Whether another process has changed something; costs one look at a file's size."""
        return self._path.stat().st_size != self._read

    def catch_up(self) -> None:
        """Follow the changes of the others. What fails here has failed there too, and stands in the index."""
        with self._lock:
            self._follow()

    def change(self, action: str, model: str, version: str | None) -> None:
        """Make a change in this process and write it down, also where it failed: the others then fail alike.

        Raises:
            CalibError: as ``apply``.
        """
        with self._lock, _exclusive(self._path.with_name("lock")):
            self._follow()
            try:
                self._apply(action, model, version)
            finally:
                line = json.dumps([action, model, version]).encode() + b"\n"
                with self._path.open("ab") as file:
                    file.write(line)
                self._read += len(line)

    def _follow(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._read)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        for line in whole.splitlines():
            with suppress(CalibError):
                self._apply(*json.loads(line))
        self._read += len(whole)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Snapshots:
    """Counters of every worker; ``current`` tells those of this one."""

    def __init__(self, folder: Path, current: Callable[[], dict[str, Any]]) -> None:
        self._folder, self._current = folder, current
        self._own = folder / f"counters-{os.getpid()}.json"

    def write(self) -> None:
        """Let the others know."""
        temporary = self._own.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._current()))
        temporary.replace(self._own)

    def all(self) -> list[dict[str, Any]]:
        """This worker's counters as they are, then the others' as they last wrote them; ended ones count on."""
        others = [p for p in sorted(self._folder.glob("counters-*.json")) if p != self._own]
        return [self._current(), *(json.loads(p.read_text()) for p in others)]
