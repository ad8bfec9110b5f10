"""What a folder that is to become a cache may hold, and whether a cache that was begun is the one asked for."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calib.cache.schema import IMAGES_SCHEMA, Manifest
from calib.errors import ExistsError, FormatError, InputError
from calib.files import require
from calib.layout import ANNOTATIONS, CATEGORIES, CLASSIFIER, HIDDEN_LOCK, IMAGES, MANIFEST, SHARDS


def is_cache(path: Path) -> bool:
    """Whether ``path`` holds a cache, complete or begun."""
    return (path / MANIFEST).is_file()


def is_bare(path: Path) -> bool:
    """Whether the cache at ``path`` was begun and holds no shard: nothing is lost when it is begun again.

    Raises:
        FormatError, VersionError: its manifest cannot be read.
    """
    manifest = Manifest.read(path)
    return not manifest.complete and not manifest.shards


def is_beginning(path: Path) -> bool:
    """Whether ``path`` is absent, empty, or left by a run that was killed before its first manifest."""
    if not path.exists():
        return True
    if not path.is_dir():
        return False
    own = {SHARDS, HIDDEN_LOCK, MANIFEST, CATEGORIES, CLASSIFIER, ANNOTATIONS}
    strange = [p for p in path.iterdir() if p.name not in own and not _is_temporary(p.name)]
    shards = (path / SHARDS).iterdir() if (path / SHARDS).is_dir() else ()
    return not strange and all(p.name.endswith(".tmp") for p in shards)


def _is_temporary(name: str) -> bool:
    return name.endswith(".tmp") and any(name.startswith(f".{n}.") for n in (CATEGORIES, CLASSIFIER, MANIFEST))


def check_free(path: Path) -> None:
    """Whether a cache may begin at ``path``.

    Raises:
        ExistsError: it holds something already. FormatError, VersionError: as ``is_bare``.
    """
    if is_cache(path) and not is_bare(path):
        raise ExistsError(
            f"{path} holds a cache already", hint="choose another --out, or add --resume to go on with it"
        )
    if not is_beginning(path):
        raise ExistsError(f"{path} exists and is not empty", hint="choose another --out")


def check_request(path: Path, found: Manifest, asked: Manifest) -> None:
    """Whether the cache at ``path``, whose manifest is ``found``, is the one that is ``asked`` for.

    Raises:
        InputError: another one; names the settings.
    """
    ours, theirs = asked.request(), found.request()
    changed = [k for k in ours if k != "source" and theirs.get(k) != ours[k]]
    if not found.style and "style" in changed:  # an older calib did not write it
        changed.remove("style")
    changed += [k for k in asked.source | found.source if found.source.get(k) != asked.source.get(k)]
    if changed:
        then = {**found.source, **theirs}
        short = [
            f"{k} {then[k]}" if then.get(k) is not None else f"no --{'shard' if k == 'part' else k}"
            for k in changed
            if isinstance(then.get(k), str | int | float | None)
        ]
        raise InputError(
            f"cache {path} was begun with other settings ({', '.join(changed)})",
            hint=f"use those it was begun with{': ' if short else ''}{', '.join(short)}; or another --out",
        )


def committed_images(path: Path, manifest: Manifest) -> pa.Table:
    """The images of committed shards, columns of IMAGES_SCHEMA.

    Raises:
        MissingFileError, FormatError: the table is lost or damaged.
    """
    if not manifest.shards:
        return IMAGES_SCHEMA.empty_table()
    try:
        table = pq.read_table(require(path / IMAGES, "cache file"), schema=IMAGES_SCHEMA)
    except (pa.ArrowException, OSError) as e:
        raise FormatError(
            f"cache file {path / IMAGES} cannot be read: {e}", hint="run calib cache repair on it first"
        ) from e
    return table.filter(pc.is_in(table["shard"], pa.array(sorted(s.name for s in manifest.shards))))
