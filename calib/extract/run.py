"""Extraction: images through the detector into a cache, shard by shard, resumable after a kill at any moment."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from calib.cache.image_rows import ImageRows
from calib.cache.schema import DTYPES, LOGITS_KEPT, MODES, Manifest
from calib.cache.write import CacheWriter
from calib.errors import InputError, ShapeError
from calib.extract.adapter import Adapter, Image
from calib.extract.dataset import Dataset, image_path, read_image
from calib.extract.rows import Records, run_batch
from calib.progress import Progress, silent
from calib.settings import at_least, one_of


@dataclass(frozen=True)
class Extraction:
    """``mode`` train: label and sample proposals as the detector does when it trains; test: keep every proposal.

    ``logits``: full (every row), probe (a few rows per shard, to check the classifier by), none. ``roi_maps`` keeps the
    pooled map of every proposal: dozens of times the size of its feature.
    """

    mode: str = "test"
    dtype: str = "float16"
    logits: str = "full"
    batch_size: int = 8
    images_per_shard: int = 256
    seed: int = 0
    roi_maps: bool = False

    def __post_init__(self) -> None:
        one_of(self, "mode", MODES)
        one_of(self, "dtype", DTYPES)
        one_of(self, "logits", LOGITS_KEPT)
        at_least(self, 1, "batch_size", "images_per_shard")
        at_least(self, 0, "seed")


def extract(
    adapter: Adapter,
    dataset: Dataset,
    images: Path,
    out: Path,
    settings: Extraction,
    *,
    resume: bool = False,
    progress: Progress = silent,
) -> Manifest:
    """Write a cache of ``dataset`` to ``out``.

    Raises:
        ShapeError: the detector and the annotation file disagree on the number of classes.
        ExistsError, InputError, FormatError, MissingFileError, NonFiniteError: see the messages.
    """
    _check_classes(adapter, dataset)
    if settings.mode == "train" and len(dataset.annotations["id"]) == 0:
        raise InputError(
            f"{dataset.annotations_file} has no annotations to label proposals with", hint="use --mode test"
        )
    manifest = _manifest(adapter, dataset, settings)
    image_path(dataset.images[0], images)  # a wrong folder is noticed before a cache is begun
    begin = CacheWriter.open if resume else CacheWriter.create
    writer = begin(out, manifest, dataset.categories, adapter.classifier(with_hidden=settings.roi_maps))
    with writer:
        if writer.manifest.complete:
            return writer.manifest
        writer.write_annotations(dataset.annotations)
        with progress(f"extract {settings.mode}", total=len(dataset.images), unit="images") as bar:
            for name, records in _shards(dataset.images, settings.images_per_shard):
                if writer.is_committed(name):
                    bar.advance(len(records))
                    continue
                rows: list[ImageRows] = []
                for batch, pixels in _batches(records, images, settings.batch_size):
                    _check_sizes(adapter, batch, pixels)
                    rows += _run_batch(adapter, dataset, batch, pixels, settings)
                    bar.advance(len(batch))
                writer.commit(name, rows)
        writer.finish()
    return writer.manifest


def _check_classes(adapter: Adapter, dataset: Dataset) -> None:
    ours, theirs = adapter.detector.num_classes, len(dataset.categories)
    if ours != theirs:
        raise ShapeError(
            f"the detector has {ours} foreground classes, {dataset.annotations_file} lists {theirs} categories",
            hint="classes are matched by ascending category id: use the annotation file the detector was trained with",
        )


def _manifest(adapter: Adapter, dataset: Dataset, settings: Extraction) -> Manifest:
    # Everything that decides the content stands here: a resumed run must agree on all of it.
    source = {
        "annotations": dataset.annotations_file.name,
        "images": len(dataset.images),
        "annotations_xxh3": dataset.digest(),
        "batch_size": settings.batch_size,
        "images_per_shard": settings.images_per_shard,
        "seed": settings.seed,
    }
    maps = adapter.map_shape() if settings.roi_maps else ()
    return Manifest(settings.mode, settings.dtype, settings.logits, adapter.detector, source, maps)


def _shards(records: Records, size: int) -> Iterator[tuple[str, Records]]:
    for number, start in enumerate(range(0, len(records), size)):
        yield f"{number:05d}", records[start : start + size]


def _batches(records: Records, folder: Path, size: int) -> Iterator[tuple[Records, list[Image]]]:
    """Batches of neighbouring images of one size, read one batch ahead."""
    plan = list(_plan(records, size))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(_read, plan[0], folder) if plan else None
        for i, batch in enumerate(plan):
            assert reading is not None
            pixels = reading.result()
            reading = pool.submit(_read, plan[i + 1], folder) if i + 1 < len(plan) else None
            yield batch, pixels


def _plan(records: Records, size: int) -> Iterator[Records]:
    """Images of unlike sizes never share a batch, so that no padding enters the features; one of a size that the json
    does not tell goes alone."""
    for _, same in groupby(records, key=_size_key):
        alike = list(same)
        yield from (alike[i : i + size] for i in range(0, len(alike), size))


def _size_key(record: dict[str, Any]) -> tuple[Any, ...]:
    height, width = record.get("height"), record.get("width")
    return (height, width) if height and width else (None, record["id"])


def _read(batch: Records, folder: Path) -> list[Image]:
    return [read_image(record, folder) for record in batch]


def _check_sizes(adapter: Adapter, batch: Records, pixels: list[Image]) -> None:
    for record, p in zip(batch, pixels, strict=True):
        height, width = p.shape[:2]
        if not adapter.accepts(height, width):
            raise InputError(
                f"image {record['id']} is {height} x {width}: one side vanishes when the detector resizes it",
                hint="leave it out of the annotation file",
            )


def _run_batch(
    adapter: Adapter, dataset: Dataset, batch: Records, pixels: list[Image], settings: Extraction
) -> list[ImageRows]:
    train = settings.mode == "train"
    return run_batch(adapter, dataset, batch, pixels, train=train, seed=settings.seed, maps=settings.roi_maps)
