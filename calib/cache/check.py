"""Whether the files of a cache are the ones that were committed.

pyarrow and DuckDB hand out flipped bits without a word, so every shard is hashed when a cache is opened for the first
time; size and modification time of what was verified are kept in ``.verified.json`` and a file is hashed again only
when they change.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from calib.cache.schema import Manifest, Shard
from calib.errors import FormatError, MissingFileError
from calib.files import write_json

VERIFIED = ".verified.json"


def check_shards(cache: Path, manifest: Manifest, *, again: bool = False) -> None:
    """Compare every file of every shard with the manifest; ``again`` hashes also what was verified before.

    Raises:
        MissingFileError: a shard file is gone. FormatError: its content is not what was written.
    """
    known = {} if again else _known(cache)
    seen = {}
    for shard in manifest.shards:
        for name in shard.files:
            path = cache / "shards" / shard.name / name
            stamp = _stamp(path, shard)
            key = f"{shard.name}/{name}"
            if known.get(key) != stamp:
                _check_file(path, shard, name)
            seen[key] = stamp
    if seen != known:
        with suppress(OSError):  # a read-only cache is verified at every opening instead
            write_json(cache / VERIFIED, seen)


def _known(cache: Path) -> dict[str, Any]:
    try:
        known = json.loads((cache / VERIFIED).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _stamp(path: Path, shard: Shard) -> list[Any]:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise MissingFileError(
            f"shard {shard.name} of the cache has lost {path}", hint="extract the cache again"
        ) from None
    return [status.st_size, status.st_mtime_ns, shard.files[path.name]["xxh3"]]


def _check_file(path: Path, shard: Shard, name: str) -> None:
    expected = shard.files[name]
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise FormatError(
            f"shard {shard.name} is damaged: {path} has {size} bytes, {expected['bytes']} were written",
            hint="extract the cache again",
        )
    digest = xxhash.xxh3_64()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected["xxh3"]:
        raise FormatError(
            f"shard {shard.name} is damaged: the content of {path} is not what was written",
            hint="extract the cache again",
        )
