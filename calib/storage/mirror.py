"""The local disk cache: what was fetched from object storage, of which no more than a limit is kept.

::

    MIRROR/entries/KEY/X/NAME/...    one version of .../X/NAME; KEY: of its URL and of the objects as they were
    MIRROR/entries/KEY/origin.json   its URL
    MIRROR/writing/KEY/X/NAME/...    what this machine writes, until it is uploaded; not counted

Every file in an entry is whole and stays as it is: another version of the same URL is another entry. Files below
``shards/`` are fetched when they are needed and go least recently used first; the rest of an entry goes as one.
Whoever uses something holds a shared lock on it, so that any number of processes can use one mirror.
"""

import fcntl
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import xxhash

from calib.errors import DiskFullError, MissingFileError
from calib.files import fsync_dir, remove_leftovers, write_json
from calib.layout import HIDDEN_LOCK, SHARDS
from calib.storage.environment import StorageSettings
from calib.storage.location import Remote
from calib.storage.transfer import download

ORIGIN = "origin.json"


class Held:
    """A file of the mirror that is not removed before ``close``; ``path`` is read, never written."""

    def __init__(self, path: Path) -> None:
        self.path, self._fd = path, -1
        self._fd = os.open(path, os.O_RDONLY)
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        status = os.fstat(self._fd)
        if status.st_nlink == 0:
            self.close()
            raise FileNotFoundError(path)  # removed before it was locked
        # Its last use, whatever the file system notes itself.
        os.utime(self._fd, ns=(time.time_ns(), status.st_mtime_ns))

    def close(self) -> None:
        """Let it go; what is mapped already can still be read."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close


class Mirror:
    """The disk cache of this machine, at most ``limit`` bytes of fetched files."""

    def __init__(self, root: Path, limit: int) -> None:
        self.entries, self.writing, self.limit = root / "entries", root / "writing", limit
        for folder in (self.entries, self.writing):
            folder.mkdir(parents=True, exist_ok=True)
        self.mutex = threading.RLock()
        self._kept: dict[Path, Held] = {}  # locks on entries, until this process ends
        self.release: Callable[[], bool] = lambda: False  # lets go of something this process holds; False: nothing

    def entry(self, remote: Remote, version: Any) -> Path:
        """The folder (or file to be) of ``remote`` as ``version`` describes its objects, and kept there while this
        process lives."""
        key = xxhash.xxh3_64(f"{remote.identity}\n{json.dumps(version, default=str)}".encode()).hexdigest()
        folder = self.entries / key
        with self._locked():
            folder.mkdir(exist_ok=True)
            if folder not in self._kept:
                (folder / HIDDEN_LOCK).touch()
                self._kept[folder] = Held(folder / HIDDEN_LOCK)
            if not (folder / ORIGIN).exists():
                write_json(folder / ORIGIN, {"protocol": remote.protocol, "path": remote.path})
        return folder.joinpath(*remote.path.split("/")[-2:])  # a head is known by two names

    def fetch(self, target: Path, remote: Remote, size: int, xxh3: str | None = None) -> Held:
        """``target``, fetched from ``remote`` unless it is there; whoever comes second waits for the first.

        Raises:
            DiskFullError: it does not fit. MissingFileError, FormatError, StorageError: as ``download``.
        """
        while True:
            with suppress(FileNotFoundError):
                return Held(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target.with_name(f".{target.name}.lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not target.exists():
                    self._download(target, remote, size, xxh3)

    def _download(self, target: Path, remote: Remote, size: int, xxh3: str | None) -> None:
        remove_leftovers(target)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb+") as file:
                self._reserve(file, size, remote)
                download(remote, file.fileno(), size, xxh3)
                os.fsync(file.fileno())
            temporary.replace(target)
            fsync_dir(target.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def _reserve(self, file: IO[bytes], size: int, remote: Remote) -> None:
        """Make room, and take it by the size of ``file``, which other processes count."""
        while True:
            with self._locked():
                used = self._make_room(size)
                if used + size <= self.limit:
                    self._allocate(file, size, remote)
                    return
            if not self.release():
                raise DiskFullError(
                    f"{remote} has {size} bytes; of the {self.limit} of the mirror {self.entries.parent} {used} are "
                    "in use",
                    hint="let it have more: CALIB_MIRROR_BYTES=500GB, on a disk with space: CALIB_MIRROR=FOLDER",
                )

    def _allocate(self, file: IO[bytes], size: int, remote: Remote) -> None:
        try:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)  # the disk's own space too, not the limit's alone
        except OSError as e:
            raise DiskFullError(
                f"{remote} has {size} bytes, and the disk of the mirror {self.entries.parent}: {e.strerror}",
                hint="choose another disk: CALIB_MIRROR=FOLDER, or let the mirror have less: CALIB_MIRROR_BYTES=50GB",
            ) from e

    def _make_room(self, size: int) -> int:
        """Remove what was not used for longest and nobody holds, until ``size`` bytes fit; the bytes that are left."""
        files = list(_files(self.entries))
        used = sum(s.st_size for _, s in files)
        units: dict[Path, tuple[int, int]] = {}  # shard file or entry -> last use, bytes
        for path, status in files:
            parts = path.relative_to(self.entries).parts
            is_shard = SHARDS in parts and path.suffix == ".parquet"
            unit = path if is_shard else self.entries / parts[0]
            last, total = units.get(unit, (0, 0))
            units[unit] = (max(last, status.st_atime_ns), total + status.st_size)
        for unit, (_, total) in sorted(units.items(), key=lambda item: item[1]):
            if used + size <= self.limit:
                break
            if unit.exists() and _remove(unit):
                used -= total
        return used

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process and thread at a time decides what is kept."""
        with self.mutex, open(self.entries / HIDDEN_LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            if stat.S_ISREG((status := path.stat()).st_mode):
                yield path, status


def _remove(unit: Path) -> bool:
    """Remove a file or an entry unless somebody holds it."""
    is_entry = unit.is_dir()
    if is_entry and any(unit.rglob(f"{SHARDS}/*/*.parquet")):
        return False  # its shards go one by one, before it
    try:
        with open(unit / HIDDEN_LOCK if is_entry else unit, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(unit) if is_entry else unit.unlink()
    except OSError:
        return False
    return True


@cache
def _mirror(root: Path, limit: int) -> Mirror:
    return Mirror(root, limit)


def mirror() -> Mirror:
    """The one that the environment names (see ``StorageSettings``)."""
    settings = StorageSettings.read()
    return _mirror(settings.mirror, settings.mirror_bytes)


def origin(path: Path) -> Remote | None:
    """Where the folder ``path`` comes from; None unless it is an entry of a mirror."""
    note = path.parent.parent / ORIGIN
    if path.parent.parent.parent.name != "entries" or not note.is_file():
        return None
    return Remote(**json.loads(note.read_text()))


def fetch(path: Path, name: str, size: int, xxh3: str) -> Held:
    """The file ``name`` of the entry ``path``, fetched if need be. Raises as ``Mirror.fetch``."""
    remote = origin(path)
    if remote is None:
        raise MissingFileError(f"{path} is no folder of a mirror")
    return mirror().fetch(path / name, remote / name, size, xxh3)
