"""Writing so that a kill at any moment leaves the old file or the new one, never half of either."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson

from calib.errors import FormatError, MissingFileError


def fsync_dir(path: Path) -> None:
    """Make renames inside ``path`` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success it is fsynced and renamed to ``path``, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
        fsync_dir(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON in one step."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def require(path: Path, what: str) -> Path:
    """Return ``path`` if it exists.

    Raises:
        MissingFileError: it does not.
    """
    if not path.exists():
        raise MissingFileError(f"{what} not found: {path}")
    return path


def read_json(path: Path, what: str) -> Any:
    """Read JSON, gzipped where the name ends in ``.gz``.

    Raises:
        MissingFileError: no such file.
        FormatError: not JSON (truncated, or another kind of file).
    """
    require(path, what)
    try:
        content = path.read_bytes()
        return orjson.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    except (ValueError, OSError, EOFError, zlib.error) as e:
        raise FormatError(f"{what} {path} is not valid JSON: {e}") from e
