"""Writing so that a kill at any moment leaves the old file or the new one, never half of either."""

import errno
import fcntl
import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import orjson
import xxhash

from calib.errors import ExistsError, FormatError, MissingFileError
from calib.layout import DESCRIPTION, MANIFEST

GZIP_MAGIC = b"\x1f\x8b"


def fsync_dir(path: Path) -> None:
    """Make renames inside ``path`` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success it is fsynced and renamed to ``path``, else removed.

    A symbolic link is followed: the file it names is replaced, the link stays. What a killed process left of the same
    file is removed too.

    Raises:
        ExistsError: as ``check_replaceable``.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        rename_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """
    Raises:
        ExistsError: ``path`` is a folder, a device, a named pipe or a socket: a rename would put a file in its place.
    """
    if path.is_dir():
        raise ExistsError(f"{path} is a folder, expected the name of a file to write", hint="name a file inside it")
    if path.exists() and not path.is_file():
        raise ExistsError(f"{path} is a device, a pipe or a socket: it is not replaced", hint="name an ordinary file")


def rename_durably(source: Path, target: Path) -> None:
    """Once this returns, the content of ``source`` is on the disk, and ``target`` is its name."""
    with open(source, "rb") as f:
        os.fsync(f.fileno())
    source.replace(target)
    fsync_dir(target.parent)


def lock(path: Path, doing: str, *, shared: bool = False) -> IO[str]:
    """The file ``path``, held by this process until it is closed: alone, or with others that hold it ``shared``.
    ``doing`` is what another one does meanwhile.

    Raises:
        ExistsError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115 - the caller closes it; NFS wants both rights for both kinds of lock
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ExistsError(f"another process is {doing}", hint="wait for it, or choose another --out") from None
    return file


def hash_file(path: Path) -> str:
    """xxh3-64 of a file's content, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, xxhash.xxh3_64).hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Give the file ``source`` a second name, or copy it where the file system has no hard links between the two."""
    try:
        os.link(source, target)
    except OSError as e:
        if e.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES):
            raise
        shutil.copyfile(source, target)


def is_calib_folder(path: Path) -> bool:
    """Whether ``path`` is a feature cache or a head: no output of another kind belongs into it."""
    return any((path / name).is_file() for name in (MANIFEST, DESCRIPTION))


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of ``path`` whose process is gone; those of a living one are left alone."""
    prefix, suffix = f".{path.name}.", ".tmp"
    for other in path.parent.iterdir():
        number = other.name.removeprefix(prefix).removesuffix(suffix)
        if other.name == f"{prefix}{number}{suffix}" and number.isdecimal() and not _is_alive(int(number)):
            with suppress(OSError):
                other.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON in one step."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def require(path: Path, what: str, hint: str = "") -> Path:
    """Return ``path`` if it exists.

    Raises:
        MissingFileError: it does not.
    """
    if not path.exists():
        raise MissingFileError(f"{what} not found: {path}", hint=hint)
    return path


def read_json(path: Path, what: str) -> Any:
    """Read a JSON document; a gzipped one is recognised by its first two bytes, not by its name.

    Raises:
        MissingFileError: no such file.
        FormatError: a folder, a truncated gzip stream, or not JSON.
    """
    require(path, what)
    try:
        content = path.read_bytes()
        if content.startswith(GZIP_MAGIC):
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise FormatError(f"{what} {path} is a damaged gzip file: {e}", hint="copy or write it again") from e
    except OSError as e:
        raise FormatError(f"{what} {path} cannot be read: {e.strerror or e}") from e
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return _read_lenient(content, path, what)


def _read_lenient(content: bytes, path: Path, what: str) -> Any:
    # The standard library also takes NaN and Infinity, as json.dump writes them: whoever reads the columns can then
    # name the row, which a parse error could not.
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{what} {path} is not valid JSON: {e}", hint="is it complete? copy or write it again") from e
