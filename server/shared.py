"""What several worker processes of one service must agree on, as files in a folder that they share.

``Shared``: what each version of each model is, in the order in which it became so, and copies of what was loaded. A
worker that answered a load or unload has written it down; the others follow before they answer anything else, so that
no client sees an older state after a newer one. ``Snapshots``: each worker's counters, at most ``EVERY_S`` old, so that
any worker can answer for all.
"""

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from calib.layout import DESCRIPTION, TENSORS

from .errors import BusyError

EVERY_S = 1.0
_log = logging.getLogger("uvicorn.error")


class Change(NamedTuple):
    """A version as a worker has it: the name of its copy, or none where it is not loaded, and the reason; the stamp of
    the files that were read."""

    copy: str
    reason: str
    stamp: str


Changes = dict[tuple[str, int], Change | None]  # by name and version; None: no such version any more


class Shared:
    """A list of changes that only grows, and copies of what is loaded, below ``root``.

    The list is held open: it goes on working for those who have it where somebody tidies the folder away. One process
    at a time writes, the one that has its turn.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.root = folder / "models"
        self._file = (folder / "changes").open("a+b", buffering=0)
        self._read = 0  # bytes that this process has followed

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    @property
    def begun(self) -> bool:
        """Whether anything was written that this process has followed."""
        return self._read > 0

    def is_behind(self) -> bool:
        """Whether another process has changed something; costs one look at a file's size."""
        return os.fstat(self._file.fileno()).st_size > self._read

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The only process that changes something."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def changes(self) -> Changes:
        """What was written and not followed yet, the last word on each version; lines that are none are passed over."""
        content = os.pread(self._file.fileno(), 1 << 30, self._read)
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        changes = Changes()
        for line in whole.splitlines():
            try:
                changes |= {(str(n), int(v)): change and Change(*map(str, change)) for n, v, change in json.loads(line)}
            except (ValueError, TypeError):
                _log.error("a line of the workers' changes cannot be read: %r", line[:200])
        return changes

    def write(self, changes: Mapping[tuple[str, int], Change | None]) -> None:
        """Tell the others, all or nothing, in one's turn and up to date.

        Raises:
            BusyError: they cannot be reached.
        """
        line = json.dumps([[*key, change] for key, change in changes.items()]).encode() + b"\n"
        try:
            os.ftruncate(self._file.fileno(), self._read)  # what a process left that was killed while it wrote
            if self._file.write(line) != len(line):
                raise OSError("no space is left")
        except OSError as e:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._read)
            raise BusyError(f"the other workers cannot be reached: {e}", hint="is there space on the disk?") from e
        self._read += len(line)

    def copy(self, path: Path, prefix: str) -> str:
        """Copy a version folder; returns the name of the copy below ``root``.

        Raises:
            BusyError: there is no space for it. OSError: it cannot be read.
        """
        contents = {part: (path / part).read_bytes() for part in (DESCRIPTION, TENSORS) if (path / part).exists()}
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            copy = Path(tempfile.mkdtemp(prefix=prefix, dir=self.root))
            for part, content in contents.items():
                (copy / part).write_bytes(content)
        except OSError as e:
            raise BusyError(f"it cannot be copied for other workers: {e}", hint="is there space on the disk?") from e
        return copy.name

    def tidy(self, used: Collection[str]) -> None:
        """Remove all copies but those that are used."""
        for copy in self.root.glob("*"):
            if copy.name not in used:
                shutil.rmtree(copy, ignore_errors=True)


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
