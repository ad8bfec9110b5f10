"""Extraction: images through the detector into a cache, shard by shard, resumable after a kill at any moment."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.boxes import Boxes
from calib.cache.image_rows import ImageRows
from calib.cache.schema import DTYPES, LOGITS_KEPT, MODES, NO_ANNOTATION, PROPOSAL_BOX, REFINED_BOX, Manifest
from calib.cache.write import CacheWriter
from calib.errors import InputError, ShapeError
from calib.extract.adapter import Adapter, Image, RoIs
from calib.extract.dataset import Dataset, image_path, read_image
from calib.extract.label import GroundTruth, Labels, assign, choose
from calib.progress import Progress, silent
from calib.settings import at_least, one_of

Records = list[dict[str, Any]]


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
    objects = [dataset.objects(int(r["id"])) for r in batch]
    background = len(dataset.categories)
    if settings.mode == "test":
        found = adapter.rois(pixels, maps=settings.roi_maps)
        labels = [
            assign(
                r.proposals,
                _to_network(o.boxes, _ratio(r.net_size, p)),
                o.label,
                background,
                adapter.sampling,
            )
            for r, o, p in zip(found, objects, pixels, strict=True)
        ]
        chosen = [_Chosen(lab, np.arange(len(lab.label)), len(lab.label)) for lab in labels]
    else:
        chosen = [_Chosen.none() for _ in batch]

        def replace(
            i: int, proposals: Boxes, objectness: NDArray[np.float32], ratio: tuple[float, float]
        ) -> tuple[Boxes, NDArray[np.float32]]:
            rng = np.random.default_rng([settings.seed, int(batch[i]["id"]) % 2**64])
            with_objects = np.concatenate([proposals, _to_network(objects[i].boxes, ratio)])
            labels = assign(
                with_objects, with_objects[len(proposals) :], objects[i].label, background, adapter.sampling
            )
            keep = choose(labels, background, adapter.sampling, rng)
            chosen[i] = _Chosen(labels, keep, len(proposals))
            scores = np.concatenate([objectness, np.ones(len(objects[i].boxes), np.float32)])
            return with_objects[keep], scores[keep]

        found = adapter.rois(pixels, replace, maps=settings.roi_maps)
    return [
        _image_rows(record, p.shape[:2], r, c, o)
        for record, p, r, c, o in zip(batch, pixels, found, chosen, objects, strict=True)
    ]


@dataclass(frozen=True)
class _Chosen:
    """Labels of all candidate proposals of an image, the positions kept, and where appended ground truth begins."""

    labels: Labels
    keep: NDArray[np.int64]
    appended_from: int

    @classmethod
    def none(cls) -> "_Chosen":
        return cls(
            Labels(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int64)),
            np.empty(0, np.int64),
            0,
        )


def _ratio(net_size: tuple[int, int], pixels: Image) -> tuple[float, float]:
    return net_size[0] / pixels.shape[0], net_size[1] / pixels.shape[1]


def _to_network(boxes: Boxes, ratio: tuple[float, float]) -> Boxes:
    y, x = ratio
    return (boxes * np.asarray([x, y, x, y], np.float32)).astype(np.float32)


def _image_rows(
    record: dict[str, Any], size: tuple[int, ...], rois: RoIs, chosen: _Chosen, objects: GroundTruth
) -> ImageRows:
    n, keep, labels = len(rois.features), chosen.keep, chosen.labels
    best = np.where(labels.max_iou[keep] > 0, labels.best[keep], -1)
    ids = np.append(objects.annotation_id, NO_ANNOTATION)  # best = -1 picks the last entry
    refined = rois.refined if rois.refined is not None else np.full((n, 4), np.nan, np.float32)
    meta: dict[str, NDArray[Any]] = {
        "image_id": np.full(n, int(record["id"]), np.int64),
        "roi_id": keep.astype(np.int32),
        "stage": np.zeros(n, np.int8),
        "objectness": rois.objectness,
        "label": labels.label[keep],
        "max_iou": labels.max_iou[keep],
        "gt_id": ids[best],
        "is_gt": keep >= chosen.appended_from,
    }
    meta |= {name: rois.proposals[:, k] for k, name in enumerate(PROPOSAL_BOX)}
    meta |= {name: refined[:, k] for k, name in enumerate(REFINED_BOX)}
    image = {
        "image_id": int(record["id"]),
        "height": size[0],
        "width": size[1],
        "net_height": rois.net_size[0],
        "net_width": rois.net_size[1],
        "neg_category_ids": record.get("neg_category_ids") or [],
        "not_exhaustive_category_ids": record.get("not_exhaustive_category_ids") or [],
    }
    return ImageRows(image, meta, rois.features, rois.logits, rois.maps)
