"""Extraction: images through the detector into a cache, shard by shard, resumable after a kill at any moment."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from calib.cache.classifier import Classifier
from calib.cache.remote_writer import RemoteWriter
from calib.cache.schema import Manifest
from calib.cache.shard import row_bytes
from calib.cache.unfinished import check_free, is_cache
from calib.cache.write import CacheWriter
from calib.errors import InputError, UnsupportedError
from calib.extract import pipeline, proof, ray_workers, workers
from calib.extract.adapter import Adapter, RoIMap
from calib.extract.classes import in_class_order
from calib.extract.dataset import Dataset
from calib.extract.options import Extraction
from calib.extract.pictures import image_path
from calib.extract.plan import shards, task
from calib.extract.staging import with_hidden
from calib.parallel.part import Part
from calib.parallel.ray_engine import RayEngine
from calib.progress import Bar, Progress, silent
from calib.storage import Remote


@dataclass(frozen=True)
class Division:
    """Of the work: one part of the set; ``processes`` here, or workers of the cluster of ``engine``, each with a
    detector that ``open_detector`` opens."""

    part: Part = field(default_factory=Part)
    processes: int = 1
    open_detector: workers.Open | None = None
    engine: RayEngine | None = None


WHOLE = Division()


def extract(
    adapter: Adapter,
    dataset: Dataset,
    images: Path,
    out: Path | Remote,
    settings: Extraction,
    division: Division = WHOLE,
    *,
    resume: bool = False,
    progress: Progress = silent,
) -> Manifest:
    """Write a cache of ``dataset``, or of one part of it, to ``out``; the detector's rows are proved first (``proof``).

    ``calib.cache.merge`` of all parts gives the shards of an extraction of the whole, under the same names. Several
    processes (see ``workers``), and the workers of a cluster (see ``remote``), write the same cache as one.

    Raises:
        ShapeError, InputError: the detector and the annotation file disagree on the classes.
        UnsupportedError: RoI maps are asked for, and it has none.
        ReplayError: rows do not give what the detector itself detects.
        ExistsError, InputError, FormatError, MissingFileError, NonFiniteError, DiskFullError, ProcessError: see the
            messages.
    """
    dataset = in_class_order(adapter, dataset)
    if settings.mode == "train" and len(dataset.annotations["id"]) == 0:
        raise InputError(
            f"{dataset.annotations_file} has no annotations to label proposals with", hint="use --mode test"
        )
    roi_map = adapter.roi_map if settings.roi_maps else None
    if settings.roi_maps and roi_map is None:
        raise UnsupportedError(
            f"{adapter.detector.source} has no RoI maps that calib keeps",
            hint="extract without --roi-maps: they are kept of one stage whose box head is two linear layers",
        )
    manifest = _manifest(adapter, dataset, settings, division.part, roi_map)
    planned = shards(dataset.images, manifest.source["images_per_shard"])
    own = [planned[k] for k in division.part.of(len(planned))]
    if not own:
        raise InputError(
            f"part {division.part.index} of {division.part.count} is empty: {len(dataset.images)} images make "
            f"{len(planned)} shards",
            hint="choose fewer parts or a smaller --images-per-shard",
        )
    image_path(own[0][1][0], images)  # a wrong folder is noticed before a cache is begun
    if isinstance(out, Path) and not resume:
        check_free(out)  # and a full one before the detector runs
    classifier = adapter.classifier() if roi_map is None else with_hidden(adapter.classifier(), roi_map)
    candidates = proof.Candidates.of(dataset, own, images, settings.check_images)
    manifest = replace(manifest, proof=_begun(out, resume=resume) or _proved(adapter, candidates, division))
    with _begin(out, manifest, dataset, classifier, progress, resume=resume) as writer:
        if writer.manifest.complete:
            return writer.manifest
        writer.manifest = replace(writer.manifest, proof=manifest.proof)  # it may have been begun without
        writer.write_annotations(dataset.annotations)
        left = [(name, records) for name, records in own if not writer.is_committed(name)]
        with progress(f"extract {settings.mode}", total=sum(len(r) for _, r in own), unit="images") as bar:
            bar.advance(sum(s.images for s in writer.manifest.shards))
            count = _rates(bar, row_bytes(manifest))
            todo = (task(name, records, dataset) for name, records in left)
            opened = division.open_detector
            if opened and division.engine:
                ray_workers.run(opened, division.engine, list(todo), images, settings, writer, count)
            elif opened is None or division.processes == 1:
                pipeline.run(adapter, todo, images, settings, writer.commit, count)
            else:
                workers.run(opened, division.processes, list(todo), images, settings, writer, count)
        writer.finish()
    return writer.manifest


def _begun(out: Path | Remote, *, resume: bool) -> dict[str, Any]:
    """The proof of the cache that is to be resumed: it is not repeated. Empty where there is none."""
    if not resume:
        return {}
    begun = RemoteWriter.begun(out) if isinstance(out, Remote) else Manifest.read(out) if is_cache(out) else None
    return begun.proof if begun is not None and (begun.complete or begun.proof.get("images")) else {}


def _proved(adapter: Adapter, candidates: proof.Candidates, division: Division) -> dict[str, Any]:
    """On the device that will do the work: where a cluster or processes with GPUs do, by one of theirs."""
    opened = division.open_detector
    if not candidates.wanted:
        return proof.UNPROVED
    if opened and division.engine:
        return ray_workers.prove(opened, division.engine, candidates)
    if opened is None or division.processes == 1 or not torch.cuda.is_available():
        return proof.prove(adapter, candidates)
    return workers.prove(opened, candidates)


def _begin(
    out: Path | Remote,
    manifest: Manifest,
    dataset: Dataset,
    classifier: Classifier,
    progress: Progress,
    *,
    resume: bool,
) -> CacheWriter:
    if isinstance(out, Path):
        begin = CacheWriter.open if resume else CacheWriter.create
        return begin(out, manifest, dataset.categories, classifier)
    if resume:
        return RemoteWriter.open_at(out, manifest, dataset.categories, classifier, progress)
    return RemoteWriter.create_at(out, manifest, dataset.categories, classifier)


def _rates(bar: Bar, size: int) -> pipeline.Count:
    """Advances ``bar`` with rows and megabytes per second since now."""
    start, rows = time.perf_counter(), 0

    def count(images: int, more: int) -> None:
        nonlocal rows
        rows += more
        per_second = rows / max(time.perf_counter() - start, 1e-9)
        bar.advance(images, **{"rows/s": per_second, "MB/s": per_second * size / 1e6})

    return count


def _manifest(adapter: Adapter, dataset: Dataset, settings: Extraction, part: Part, roi_map: RoIMap | None) -> Manifest:
    # Everything that decides the content stands here: a resumed run must agree on all of it.
    source = {
        "annotations": dataset.annotations_file.name,
        "images": len(dataset.images),
        "annotations_xxh3": dataset.digest(),
        "batch_size": settings.batch_size,
        "images_per_shard": settings.images_per_shard,
        "seed": settings.seed,
    }
    if adapter.precision != "fp32":
        source["precision"] = adapter.precision
    if part.count > 1:
        source["part"] = f"{part.index}/{part.count}"
    maps = () if roi_map is None else roi_map.shape
    manifest = Manifest(
        settings.mode, settings.dtype, settings.logits, adapter.detector, source, maps, style=dataset.style
    )
    if settings.max_shard_bytes:
        # Counted before anything runs, so that shards are the same however often a run is interrupted or divided.
        fitting = settings.max_shard_bytes // (adapter.most_rows(settings.mode) * row_bytes(manifest))
        source["images_per_shard"] = max(1, min(settings.images_per_shard, fitting))
    return manifest
