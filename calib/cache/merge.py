"""One cache of several. Files of shards are shared (hard links where the disk allows it), only the tables are new."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from calib.cache.read import Cache
from calib.cache.schema import ANNOTATIONS_SCHEMA, Manifest, Shard
from calib.cache.write import CacheWriter
from calib.errors import InputError
from calib.files import link_or_copy
from calib.layout import ANNOTATIONS, SHARDS
from calib.progress import Progress, silent


def merge(paths: list[Path], out: Path, *, progress: Progress = silent) -> Manifest:
    """Write one cache with the shards of all ``paths``, in their order, to ``out``.

    Raises:
        InputError: fewer than two caches, or some that do not go together: another detector, mode, dtype, kind of
            logits or maps, other categories, an image or an annotation id in two of them.
    """
    if len(paths) < 2:
        raise InputError("one cache alone cannot be merged", hint="name two or more")
    caches = [Cache(path) for path in paths]
    for other in caches[1:]:
        _check_alike(caches[0], other)
    _check_distinct(caches)
    annotations = _annotations(caches)
    source = {"merge": [c.digest for c in caches], "of": [c.manifest.source for c in caches]}
    proof = _proof([c.manifest.proof for c in caches])
    styles = {c.manifest.style for c in caches}
    style = styles.pop() if len(styles) == 1 else ""  # of parts that an older calib wrote it is not known
    request = replace(caches[0].manifest, source=source, shards=(), tables={}, complete=False, proof=proof, style=style)
    with CacheWriter.open(out, request, caches[0].categories, caches[0].classifier) as writer:
        if writer.manifest.complete:
            return writer.manifest
        if annotations is not None:
            writer.write_annotations(annotations)
        parts = [(cache, shard) for cache in caches for shard in cache.manifest.shards]
        with progress("merge", total=len(parts), unit="shards") as bar:
            for number, (cache, shard) in enumerate(parts):
                if not writer.is_committed(name := f"{number:05d}"):
                    _commit(writer, name, cache, shard)
                bar.advance()
        writer.finish()
    return writer.manifest


def _proof(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all caches together: none where one of them has none."""
    without = [p for p in parts if not p.get("images")]
    if without:
        return without[0]
    added = {k: sum(p[k] for p in parts) for k in ("images", "detections")}
    return added | {"largest_difference": max(p["largest_difference"] for p in parts)}


def _commit(writer: CacheWriter, name: str, cache: Cache, shard: Shard) -> None:
    def fill(folder: Path) -> pa.Table:
        for file in shard.files:
            link_or_copy(cache.path / SHARDS / shard.name / file, folder / file)
        return cache.images.filter(pc.equal(cache.images["shard"], shard.name))

    writer.commit_files(name, fill)


def _check_alike(one: Cache, other: Cache) -> None:
    ours, theirs = (
        {"detector " + k: v for k, v in asdict(c.manifest.detector).items()}
        | {k: getattr(c.manifest, k) for k in ("mode", "dtype", "logits", "roi_maps")}
        | ({"style": c.manifest.style} if one.manifest.style and other.manifest.style else {})
        | {"classifier": c.classifier.digest(), "categories": _of_categories(c)}
        for c in (one, other)
    )
    differing = [k for k in ours if ours[k] != theirs[k]]
    if differing:
        differences = ", ".join(
            k if k in ("categories", "classifier") else f"{k} {ours[k]!r} and {theirs[k]!r}" for k in differing
        )
        raise InputError(
            f"caches {one.path} and {other.path} differ in {differences}",
            hint="extract both with the same detector and settings (categories: --counts-from the same file)",
        )


def _of_categories(cache: Cache) -> tuple[Any, ...]:
    c = cache.categories
    return c.category_id.tolist(), c.name, c.instance_count.tolist(), c.image_count.tolist(), c.frequency


def _check_distinct(caches: list[Cache]) -> None:
    ids = np.concatenate([c.images["image_id"].to_numpy() for c in caches])
    owner = np.repeat(np.arange(len(caches)), [len(c.images) for c in caches])
    values, _first, counts = np.unique(ids, return_index=True, return_counts=True)
    if (counts > 1).any():
        twice = values[counts > 1]
        places = owner[ids == twice[0]]
        raise InputError(
            f"image {twice[0]} is in {caches[places[0]].path} and in {caches[places[1]].path} "
            f"({len(twice)} images are in two caches)",
            hint="merge caches of different images",
        )


def _annotations(caches: list[Cache]) -> pa.Table | None:
    """The ground truth of all; parts of one split may each bring the whole of it, so equal rows count once."""
    have = [c for c in caches if (c.path / ANNOTATIONS).exists()]
    if not have:
        return None
    if len(have) < len(caches):
        without = next(c for c in caches if c not in have)
        raise InputError(f"cache {without.path} has no ground truth and {have[0].path} has")
    whole = pa.concat_tables([c.annotations() for c in caches])
    distinct = whole.group_by(ANNOTATIONS_SCHEMA.names, use_threads=False).aggregate([])
    ids, counts = np.unique(distinct["id"].to_numpy(), return_counts=True)
    if (counts > 1).any():
        raise InputError(
            f"annotation id {ids[counts > 1][0]} means different objects in these caches",
            hint="they are of different annotation files: give each object an id of its own and extract again",
        )
    return distinct
