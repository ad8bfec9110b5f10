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

from .errors import BusyError

EVERY_S = 1.0
_log = logging.getLogger("uvicorn.error")

Change = Callable[[str, str, str | None], None]  # "load" or "unload", model, version


class Journal:
    """A list of changes that only grows; ``apply`` carries one of another process out in this one.

    The file is held open: it goes on working for those who have it where somebody tidies the folder away.
    """

    def __init__(self, folder: Path, apply: Change) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._apply = apply
        self._file = (folder / "journal").open("a+b", buffering=0)
        self._lock = threading.Lock()
        self._read = 0  # bytes that this process has followed

    @contextmanager
    def begin(self) -> Iterator[None]:
        """While this process loads what the others have: changes so far are in that already, others wait."""
        with self._lock, _exclusive(self._file):
            self._read = os.fstat(self._file.fileno()).st_size
            yield

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def is_behind(self) -> bool:
        """Whether another process has changed something; costs one look at a file's size."""
        return os.fstat(self._file.fileno()).st_size > self._read

    def catch_up(self) -> None:
        """Follow the changes of the others. What fails here has failed there too, and stands in the index."""
        with self._lock:
            self._follow()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Up to date, and the only process that changes something."""
        with self._lock, _exclusive(self._file):
            self._follow()
            yield

    def write(self, action: str, model: str, version: str | None) -> None:
        """Write down a change that this process makes in its turn; the others follow, also where it fails.

        Raises:
            BusyError: it cannot be written down, and must not be made.
        """
        size = os.fstat(self._file.fileno()).st_size
        line = json.dumps([action, model, version]).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError("no space is left")
        except OSError as e:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), size)
            raise BusyError(f"the other workers cannot be told: {e}", hint="is there space on the disk?") from e
        self._read = size + len(line)

    def _follow(self) -> None:
        for change in self._lines():
            self._carry_out(change)

    def _lines(self) -> list[tuple[str, str, str | None]]:
        """Whole changes that were not followed yet; lines that are none are passed over."""
        content = os.pread(self._file.fileno(), 1 << 30, self._read)
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        changes = []
        for line in whole.splitlines():
            try:
                action, model, version = json.loads(line)
            except ValueError:
                _log.error("a line of the workers' journal cannot be read: %r", line[:200])
            else:
                changes.append((action, model, version))
        return changes

    def _carry_out(self, change: tuple[str, str, str | None]) -> None:
        with suppress(CalibError):
            self._apply(*change)


@contextmanager
def _exclusive(file: Any) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


class Snapshots:
    """Counters of every worker; ``current`` tells those of this one."""

    def __init__(self, folder: Path, current: Callable[[], dict[str, Any]]) -> None:
        self.folder, self._current = folder, current
        self._own = folder / f"counters-{os.getpid()}.json"

    def write(self) -> None:
        """Let the others know."""
        self.folder.mkdir(exist_ok=True)
        temporary = self._own.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._current()))
        temporary.replace(self._own)

    def all(self) -> list[dict[str, Any]]:
        """This worker's counters as they are, then the others' as they last wrote them; ended ones count on, but for
        what was pending in them."""
        found = [self._current()]
        for path in sorted(self.folder.glob("counters-*.json")):
            if path != self._own:
                other = json.loads(path.read_text())
                is_alive = Path(f"/proc/{path.stem.removeprefix('counters-')}").exists()
                found.append(other if is_alive else other | {"pending": 0})
        return found
