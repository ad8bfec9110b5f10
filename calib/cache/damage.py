"""Which files of a cache are not the ones that were committed, and which images lie in them.

Every file is hashed, and every page of a Parquet file is held to its own checksum: the hash finds any change, the
pages say which rows it hit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calib.cache.check import listed_files
from calib.cache.classifier import Classifier
from calib.cache.mirrored import as_stored
from calib.cache.schema import IMAGES_SCHEMA, META_SCHEMA, Manifest
from calib.cache.tables import read_table
from calib.errors import CalibError, MissingFileError
from calib.files import hash_file
from calib.layout import CATEGORIES, CLASSIFIER, IMAGES, META, SHARDS
from calib.progress import Progress, silent

Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class Damage:
    """One file that is not what was written.

    ``kind``: missing; truncated; damaged (a page fails its checksum, or it is no Parquet file any more); exchanged (it
    is another file of this cache); foreign (whole, but not what was written: the file of another cache, or a change
    outside of its pages). ``shard`` is empty for a table of the whole cache, ``image_ids`` for one that is unknown.
    """

    file: str
    shard: str
    kind: str
    detail: str
    image_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was found. ``unlisted``: folders of shards that the manifest does not know; readers never look there.
    ``complete``: whether the cache was written to its end; what is there of another one may be sound.
    """

    files: int
    bytes: int
    damages: tuple[Damage, ...] = ()
    unlisted: tuple[str, ...] = field(default=())
    complete: bool = True

    @property
    def shards(self) -> list[str]:
        """Names of the shards that are hit, ascending."""
        return sorted({d.shard for d in self.damages if d.shard})

    @property
    def tables(self) -> list[str]:
        """Names of the tables that are hit."""
        return [d.file for d in self.damages if not d.shard]

    @property
    def image_ids(self) -> list[int]:
        """Ids of the images in damaged files, ascending."""
        return sorted({i for d in self.damages for i in d.image_ids})


def find_damage(path: Path, *, progress: Progress = silent) -> Report:
    """Read every file of the cache at ``path``, complete or begun.

    Raises:
        MissingFileError, FormatError, VersionError: its manifest cannot be read.
    """
    manifest = Manifest.read(path)
    listed = listed_files(manifest)
    owner = {what["xxh3"]: name for name, what in listed.items()}
    damages = list(_unhashed_tables(path, manifest))
    images = None if any(d.file == IMAGES for d in damages) else _readable_images(path)
    with progress("check", total=len(listed), unit="files") as bar:
        for name, what in listed.items():
            if found := _examine_stored(path / name, what, owner):
                kind, detail, rows = found
                shard = name.split("/")[1] if name.startswith(f"{SHARDS}/") else ""
                ids = _image_ids(path, images, shard, rows) if shard else ()
                damages.append(Damage(name, shard, kind, detail, ids))
            bar.advance()
    folders = (path / SHARDS).iterdir() if (path / SHARDS).is_dir() else ()
    unlisted = sorted({f.name for f in folders} - {s.name for s in manifest.shards})
    return Report(
        len(listed), sum(w["bytes"] for w in listed.values()), tuple(damages), tuple(unlisted), manifest.complete
    )


def _examine_stored(path: Path, what: dict[str, Any], owner: dict[str, str]) -> tuple[str, str, Ranges | None] | None:
    try:
        with as_stored(path) as file:
            return _examine(file, what, owner)
    except MissingFileError:
        return "missing", "it is not there", None


def _examine(path: Path, what: dict[str, Any], owner: dict[str, str]) -> tuple[str, str, Ranges | None] | None:
    """Kind, detail and the rows that are hit (None: all of them), or None for a sound file."""
    if not path.is_file():
        return "missing", "it is not there", None
    size, digest = path.stat().st_size, hash_file(path)
    if digest != what["xxh3"] and digest in owner:
        return "exchanged", f"it is {owner[digest]}", None
    if size < what["bytes"]:
        return "truncated", f"it has {size} of {what['bytes']} bytes", None
    rows = _damaged_rows(path) if path.suffix == ".parquet" else []
    if rows is None:
        return "damaged", "it is not a readable Parquet file", None
    if rows:
        ranges = ", ".join(f"{low}:{high}" for low, high in rows)
        return "damaged", f"rows {ranges} fail their checksum", rows
    if digest != what["xxh3"]:
        return "foreign", "its pages are whole, but it is not the file that was written", None
    return None


def _damaged_rows(path: Path) -> Ranges | None:
    """Row ranges of row groups that cannot be read with their checksums; None if the file cannot be opened."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError):
        return None
    damaged, start = [], 0
    with file:
        for g in range(file.num_row_groups):
            stop = start + file.metadata.row_group(g).num_rows
            try:
                file.read_row_group(g)
            except (pa.ArrowException, OSError):
                damaged.append((start, stop))
            start = stop
    return damaged


def _unhashed_tables(path: Path, manifest: Manifest) -> Iterator[Damage]:
    """Tables of a cache that is not complete: their hashes are not known yet, but they must be readable."""
    if manifest.complete:
        return
    needed = [CATEGORIES, CLASSIFIER] + ([IMAGES] if manifest.shards else [])
    for name in needed:
        if not (path / name).is_file():
            yield Damage(name, "", "missing", "it is not there")
        elif name == CLASSIFIER:
            if not _is_classifier(path / name, manifest):
                yield Damage(name, "", "damaged", "it is not the classifier of the cache's detector")
        elif _damaged_rows(path / name) != []:
            yield Damage(name, "", "damaged", "it is not a readable Parquet file")


def _is_classifier(path: Path, manifest: Manifest) -> bool:
    try:
        return Classifier.read(path).digest() == manifest.detector.digest
    except CalibError:
        return False


def _readable_images(path: Path) -> pa.Table | None:
    try:
        return read_table(path / IMAGES, IMAGES_SCHEMA)
    except CalibError:
        return None


def _image_ids(path: Path, images: pa.Table | None, shard: str, rows: Ranges | None) -> tuple[int, ...]:
    if images is None:
        try:
            ids = read_table(path / SHARDS / shard / META, META_SCHEMA)["image_id"]
        except CalibError:
            return ()
        return tuple(dict.fromkeys(ids.to_pylist()))
    inside = images.filter(pc.equal(images["shard"], shard))
    records = inside.select(["image_id", "row_start", "n_rows"]).to_pylist()
    if rows is not None:
        records = [r for r in records if any(r["row_start"] < b and r["row_start"] + r["n_rows"] > a for a, b in rows)]
    return tuple(int(r["image_id"]) for r in records)
