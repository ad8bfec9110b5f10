"""A cache to keep: its matrices as compressed Parquet, and back to the very same files.

An archived matrix is an ordinary Parquet file. What surrounds the rows in the mapped file (page headers, footer) is
kept in its metadata, so that unpacking gives the original bytes whatever Parquet library does it.
"""

import base64
import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calib.cache.categories import Categories
from calib.cache.check import check_files
from calib.cache.classifier import Classifier
from calib.cache.matrix import MatrixFile
from calib.cache.schema import IMAGES_SCHEMA, Manifest, Shard
from calib.cache.shard import Files
from calib.cache.tables import read_table
from calib.cache.write import CacheWriter
from calib.errors import FormatError, InputError
from calib.files import link_or_copy, replacing
from calib.layout import ANNOTATIONS, CATEGORIES, CLASSIFIER, IMAGES, META, SHARDS
from calib.progress import Progress, silent

FRAME = b"calib.frame"  # everything around the rows: zlib, base64
BODIES = b"calib.bodies"  # offset and bytes of every block of rows: JSON
ROWS_ONLY = "unpacked"


def archive(path: Path, out: Path, *, progress: Progress = silent) -> Manifest:
    """Write the cache at ``path`` compressed to ``out``. The rows keep their bits; zeros, as a ReLU leaves them,
    cost little.

    Raises:
        InputError: it is an archive already, or not complete. Others as opening and writing a cache do.
    """
    return _convert(path, out, "mapped", "archive", progress)


def unpack(path: Path, out: Path, *, progress: Progress = silent) -> Manifest:
    """Write the archive at ``path`` as the cache it was made of to ``out``: the same files, the same digest.

    Raises:
        InputError: it is no archive, or not complete. FormatError: the rows are not those that were archived.
    """
    return _convert(path, out, "archive", "mapped", progress)


def _convert(path: Path, out: Path, origin: str, layout: str, progress: Progress) -> Manifest:
    manifest = Manifest.read(path)
    if manifest.layout != origin:
        other = "an archive already" if layout == "archive" else "no archive"
        raise InputError(f"cache {path} is {other}", hint="name another cache")
    if not manifest.complete:
        raise InputError(f"cache {path} is not complete", hint="run the command that began it again first")
    check_files(path, manifest)
    images = read_table(path / IMAGES, IMAGES_SCHEMA)
    request = replace(manifest, layout=layout, shards=(), tables={}, complete=False)
    with CacheWriter.open(
        out, request, Categories.read(path / CATEGORIES), Classifier.read(path / CLASSIFIER)
    ) as writer:
        if writer.manifest.complete:
            return writer.manifest
        if (path / ANNOTATIONS).exists():
            with replacing(out / ANNOTATIONS) as target:
                link_or_copy(path / ANNOTATIONS, target)
        with progress("unpack" if layout == "mapped" else "archive", total=manifest.rows, unit="rows") as bar:
            for shard in manifest.shards:
                if not writer.is_committed(shard.name):
                    part = images.filter(pc.equal(images["shard"], shard.name))
                    _commit(writer, path / SHARDS / shard.name, shard, part, layout)
                bar.advance(shard.rows)
        writer.finish()
    return writer.manifest


def _commit(writer: CacheWriter, folder: Path, shard: Shard, images: pa.Table, layout: str) -> None:
    def fill(target: Path) -> pa.Table:
        for name, what in shard.files.items():
            if layout == "archive" and name.partition(".")[0] != META.partition(".")[0]:
                _pack(folder / name, target / name)
            elif layout == "mapped" and ROWS_ONLY in what:
                _unpack(folder / name, target / name)
            else:
                link_or_copy(folder / name, target / name)
        return images

    def archived(files: Files) -> Files:
        return {n: f if f == shard.files[n] else f | {ROWS_ONLY: shard.files[n]} for n, f in files.items()}

    def checked(files: Files) -> Files:
        for name, what in files.items():
            if what != shard.files[name].get(ROWS_ONLY, shard.files[name]):
                raise FormatError(f"{folder / name} does not hold the rows that were archived")
        return files

    writer.commit_files(shard.name, fill, archived if layout == "archive" else checked)


def _pack(source: Path, target: Path) -> None:
    file = MatrixFile(source)
    if not file.bodies:  # no rows, or rewritten by another tool: kept as it is
        link_or_copy(source, target)
        return
    schema = pq.read_schema(source)
    content = np.memmap(source, np.uint8, mode="r")
    ends = [0, *(offset + size for offset, size in file.bodies)]
    starts = [*(offset for offset, _ in file.bodies), len(content)]
    frame = b"".join(content[a:b].tobytes() for a, b in zip(ends, starts, strict=True))
    metadata = {FRAME: base64.b64encode(zlib.compress(frame)), BODIES: json.dumps(file.bodies)}
    schema = schema.with_metadata(metadata)
    row = schema.field(0).type
    with pq.ParquetWriter(
        target, schema, compression="zstd", use_dictionary=False, write_statistics=False, write_page_checksum=True
    ) as writer:
        for offset, size in file.bodies:
            body = pa.py_buffer(content[offset : offset + size])
            column = pa.FixedSizeBinaryArray.from_buffers(row, size // row.byte_width, [None, body])
            writer.write_table(pa.table([column], schema=schema), row_group_size=max(1, len(column)))


def _unpack(source: Path, target: Path) -> None:
    try:
        file = pq.ParquetFile(source, page_checksum_verification=True)
        metadata = file.schema_arrow.metadata
        frame = memoryview(zlib.decompress(base64.b64decode(metadata[FRAME])))
        bodies: list[Any] = json.loads(metadata[BODIES])
        with open(target, "wb") as out:
            for group, (offset, _) in enumerate(bodies):
                gap = offset - out.tell()
                out.write(frame[:gap])
                frame = frame[gap:]
                for chunk in file.read_row_group(group).column(0).chunks:
                    width = chunk.type.byte_width
                    out.write(chunk.buffers()[1].slice(chunk.offset * width, len(chunk) * width))
            out.write(frame)
    except (pa.ArrowException, KeyError, ValueError, IndexError, TypeError, zlib.error) as e:
        raise FormatError(f"{source} is no archived matrix: {e}", hint="run calib cache check") from e
