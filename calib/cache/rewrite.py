"""The rows of a cache written again in other shards: all of them (compact), or those of some images (sample, subset).

Rows keep their bits and their order. Killed at any moment, the same call goes on and ends in the same files.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from calib.cache.matrix import ROWS_PER_GROUP, write_blocks
from calib.cache.meta import write_meta
from calib.cache.read import Cache
from calib.cache.rows import RowMatrix, Rows
from calib.cache.schema import Manifest, of_stage
from calib.cache.write import CacheWriter
from calib.errors import InputError, SettingError
from calib.layout import ANNOTATIONS, FEATURES, LOGITS, MAPS, META
from calib.progress import Bar, Progress, silent

ROWS_PER_SHARD = 131_072


def compact(path: Path, out: Path, *, rows_per_shard: int = ROWS_PER_SHARD, progress: Progress = silent) -> Manifest:
    """Write the cache at ``path`` to ``out`` in shards of about ``rows_per_shard`` rows, all of nearly one size.

    An image is never divided. Probe logits are left out: they are the first rows of a shard, which are others now.

    Raises:
        SettingError: ``rows_per_shard`` below 1. Others as opening and writing a cache do.
    """
    if rows_per_shard < 1:
        raise SettingError(f"rows_per_shard is {rows_per_shard}: expected at least 1")
    cache = Cache(path)
    source = {"compact": {"cache": cache.digest, "rows_per_shard": rows_per_shard}, "of": cache.manifest.source}
    return _rewrite(cache, out, source, np.arange(len(cache.images)), rows_per_shard, "compact", progress)


def sample(path: Path, out: Path, *, images: int, seed: int = 0, progress: Progress = silent) -> Manifest:
    """Write ``images`` whole images of the cache at ``path``, drawn at random without doubles, to ``out``.

    Raises:
        InputError: the cache has fewer. SettingError: fewer than one, or a negative seed.
    """
    if images < 1 or seed < 0:
        raise SettingError(f"images is {images} and seed {seed}: expected at least 1 and at least 0")
    cache = Cache(path)
    if images > len(cache.images):
        raise InputError(f"cache {path} has {len(cache.images)} images, {images} were asked for")
    chosen = np.sort(np.random.default_rng(seed).choice(len(cache.images), images, replace=False))
    source = {"sample": {"cache": cache.digest, "images": images, "seed": seed}, "of": cache.manifest.source}
    return _rewrite(cache, out, source, chosen, ROWS_PER_SHARD, "sample", progress)


def subset(path: Path, out: Path, image_ids: Rows, *, progress: Progress = silent) -> Manifest:
    """Write the images ``image_ids`` of the cache at ``path`` to ``out``, in the order of the cache.

    Raises:
        InputError: an image that the cache does not have. Others as opening and writing a cache do.
    """
    cache, wanted = Cache(path), np.unique(image_ids)
    known = cache.images["image_id"].to_numpy()
    if len(unknown := np.setdiff1d(wanted, known)):
        raise InputError(f"cache {path} has no image {unknown[0]}")
    source = {"subset": {"cache": cache.digest, "image_ids": xxhash.xxh3_64(wanted.tobytes()).hexdigest()}}
    source["of"] = cache.manifest.source
    return _rewrite(cache, out, source, np.flatnonzero(np.isin(known, wanted)), ROWS_PER_SHARD, "subset", progress)


def _rewrite(
    cache: Cache,
    out: Path,
    source: dict[str, Any],
    chosen: Rows,
    rows_per_shard: int,
    label: str,
    progress: Progress,
) -> Manifest:
    logits = "none" if cache.manifest.logits == "probe" else cache.manifest.logits
    request = replace(cache.manifest, source=source, logits=logits, shards=(), tables={}, complete=False)
    with CacheWriter.open(out, request, cache.categories, cache.classifier) as writer:
        if writer.manifest.complete:
            return writer.manifest
        counts = np.diff(cache.image_start)[chosen]
        if (cache.path / ANNOTATIONS).exists():
            table = cache.annotations()
            ids = cache.images["image_id"].take(pa.array(chosen))
            writer.write_annotations(table.filter(pc.is_in(table["image_id"], ids)))
        with progress(label, total=int(counts.sum()), unit="rows") as bar:
            for number, (low, high) in enumerate(_even(counts, rows_per_shard)):
                part = chosen[low:high]
                if writer.is_committed(name := f"{number:05d}"):
                    bar.advance(int(counts[low:high].sum()))
                else:
                    _commit(writer, cache, name, part, bar)
        writer.finish()
    return writer.manifest


def _even(counts: Rows, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of images with about equally many rows, as few as hold ``size`` rows each on average."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    shards = max(1, -(-total // size))
    aims = total * np.arange(1, shards) / shards
    cuts = np.unique(np.searchsorted(ends, aims, side="left") + 1) if len(ends) else np.empty(0, int)
    yield from pairwise([0, *(int(c) for c in cuts if c < len(counts)), len(counts)])


def _commit(writer: CacheWriter, cache: Cache, name: str, chosen: Rows, bar: Bar) -> None:
    start = cache.image_start
    rows = np.concatenate([np.arange(0), *(np.arange(start[i], start[i + 1]) for i in chosen)]).astype(np.int64)
    images = cache.images.take(pa.array(chosen))

    def fill(folder: Path) -> pa.Table:
        for stage, own in enumerate(cache.stages):
            for file, column, matrix in (
                (FEATURES, "features", own.features),
                (LOGITS, "logits", own.logits),
                (MAPS, "maps", own.maps),
            ):
                if matrix is not None:
                    width, target = matrix.shape[1], folder / of_stage(file, stage)
                    write_blocks(target, column, matrix.dtype, width, _blocks(matrix, rows))
            write_meta(folder / of_stage(META, stage), own.meta_of(rows), images)
        return images

    writer.commit_files(name, fill)
    bar.advance(len(rows))


def _blocks(matrix: RowMatrix, rows: Rows) -> Iterator[Any]:
    for i in range(0, len(rows), ROWS_PER_GROUP):
        part = rows[i : i + ROWS_PER_GROUP]
        matrix.ask(part)
        yield matrix.stored(part)
