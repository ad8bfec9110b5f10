"""Whether the files of a cache are the ones that were committed.

pyarrow and DuckDB hand out flipped bits without a word, so every file is hashed when a cache is opened for the first
time; size and modification time of what was verified are kept in ``.verified.json`` and a file is hashed again only
when they change.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from calib.cache.mirrored import fetch_meta
from calib.cache.schema import Manifest
from calib.errors import FormatError, MissingFileError
from calib.files import hash_file, write_json
from calib.layout import SHARDS, VERIFIED
from calib.storage.mirror import origin

RESTORE = "calib cache check names the images; calib cache repair and calib extract --resume extract them again"


def listed_files(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Bytes and hash of every file that the manifest lists, by name within the cache."""
    listed = dict(manifest.tables)
    for shard in manifest.shards:
        listed |= {f"{SHARDS}/{shard.name}/{name}": what for name, what in shard.files.items()}
    return listed


def check_files(cache: Path, manifest: Manifest, *, again: bool = False, only: frozenset[str] | None = None) -> None:
    """Compare files with the manifest; ``again`` hashes also what was verified before.

    ``only``: names of the files of shards to look at, all unless given. Who asks for ``meta.parquet`` never touches the
    bytes of a feature.

    Raises:
        MissingFileError: a file is gone. FormatError: its content is not what was written.
    """
    if origin(cache) is not None:
        fetch_meta(cache, manifest)
    known = {} if again else _known(cache)
    seen = {}
    for name, what in listed_files(manifest).items():
        if only is not None and name.startswith(f"{SHARDS}/") and name.rpartition("/")[2] not in only:
            if name in known:
                seen[name] = known[name]
            continue
        stamp = _stamp(cache / name, what)
        if known.get(name) != stamp:
            _check_file(cache / name, what)
        seen[name] = stamp
    if seen != known:
        with suppress(OSError):  # a read-only cache is verified at every opening instead
            write_json(cache / VERIFIED, seen)


def _known(cache: Path) -> dict[str, Any]:
    try:
        known = json.loads((cache / VERIFIED).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _stamp(path: Path, expected: dict[str, Any]) -> list[Any]:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"the cache has lost {path}", hint=RESTORE) from None
    return [status.st_size, status.st_mtime_ns, expected["xxh3"]]


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise FormatError(
            f"the cache is damaged: {path} has {size} bytes, {expected['bytes']} were written",
            hint=RESTORE,
        )
    if hash_file(path) != expected["xxh3"]:
        raise FormatError(f"the cache is damaged: the content of {path} is not what was written", hint=RESTORE)
