"""The caches of a run: those of its annotation files, and of every fold of val the images outside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.annotations import Annotations
from calib.cache import Cache
from calib.cache.rewrite import subset
from calib.data.shares import fold_shares
from calib.data.split import Division, split_file
from calib.extract.dataset import Dataset
from calib.extract.extraction import extract
from calib.extract.opener import Opener
from calib.extract.options import Extraction
from calib.improve.request import Request
from calib.improve.steps import digest
from calib.progress import Bar, Progress


@dataclass(frozen=True)
class Split:
    """An annotation file and how it is extracted; ``name`` is that of its cache."""

    name: str
    annotations: Path
    mode: str


def splits(request: Request) -> list[Split]:
    """Train, tune where it is given, and val."""
    data = request.data
    tests = [Split("tune", data.tune, "test")] if data.tune is not None else []
    return [Split("train", data.train, "train"), *tests, Split("val", data.val, "test")]


def extracted(request: Request, split: Split, out: Path, progress: Progress) -> dict[str, Any]:
    """Write the cache of ``split`` to ``out``, or go on with it."""
    detector = request.detector
    adapter = Opener(detector.spec, request.device, detector.weights, detector.arguments)(0)
    dataset = Dataset.read(split.annotations, counts_from=request.data.train)

    @contextmanager
    def labelled(label: str, *, total: int, unit: str) -> Iterator[Bar]:
        with progress(f"extract {split.name}", total=total, unit=unit) as bar:
            yield bar

    extract(adapter, dataset, request.data.images, out, Extraction(split.mode), resume=True, progress=labelled)
    return about(out)


def about(cache: Path) -> dict[str, Any]:
    """What later steps depend on, and its size."""
    opened = Cache(cache)
    # A cache's own digest is that of its rows; the labels that heads are judged by stand in the manifest.
    labels = opened.manifest.source
    return {"digest": digest([opened.digest, labels]), "images": len(opened.images), "rows": opened.n_rows}


def fold_names(request: Request) -> list[str]:
    """fold0, fold1 ...; none where the splits are given."""
    return list(fold_shares(request.folds)) if request.data.is_crossed else []


def divided(request: Request) -> dict[str, Any]:
    """Divide val into folds: ``foldK.json`` and ``foldK-rest.json``, all images outside it."""
    division = Division(fold_shares(request.folds), request.search.seed, request.group_by, rest=True)
    parts = split_file(request.data.val, request.folder.folds, division, overwrite=True)
    images = {name: len(image_ids(request.folder.part(name))) for name in division.names()}
    return {"images": images, "notices": list(parts.notices)}


def image_ids(part: Path) -> NDArray[np.int64]:
    """Of a file that ``divided`` wrote, ascending."""
    return Annotations.read(part).images.id


def without_fold(val: Path, rest: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Write the cache of those images of ``val`` that are in ``rest``, all that are not in a fold."""
    subset(val, out, image_ids(rest), progress=progress)
    return about(out)
