"""COCO-LT: a long-tailed COCO made by taking annotations away, not pictures.

By the index file of its authors (Wang et al., The Devil is in Classification, ECCV 2020; twangnh/SimCal e5f3076,
class_to_imageid_and_inscount_coco_sampled.pt): an annotation stays if its image stands in the list of its class. Or by
an exponential profile, for any COCO json. Objects that lost their annotation stay in the pictures as background.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from calib.annotations import Annotations
from calib.documents import encoded
from calib.errors import ExistsError, FormatError, InputError, SettingError
from calib.files import read_json, replacing, require
from calib.pickles import read_pickle

BINS = (20, 400, 8000)  # edges of training instances, as its authors report AP
Index = list[NDArray[np.int64]]  # per class, in ascending category id: images that keep their annotations of it


@dataclass(frozen=True)
class Profile:
    """The k-th largest of C classes keeps the largest's number times ``ratio ** (k / (C - 1))``, if it has so many."""

    ratio: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise SettingError(f"ratio is {self.ratio}: expected a number above 0 and up to 1")
        if self.seed < 0:
            raise SettingError(f"seed is {self.seed}: expected at least 0")


def read_index(path: Path) -> Index:
    """The authors' pickle (read without running it), or an .npz with ``image_ids`` and ``class_offsets`` [C + 1].

    Raises:
        MissingFileError, FormatError: not there, damaged, or no such index.
    """
    if require(path, "COCO-LT index").suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                ids, offsets = (np.asarray(archive[n], np.int64) for n in ("image_ids", "class_offsets"))
        except (BadZipFile, KeyError, ValueError, OSError, EOFError) as e:
            raise FormatError(f"COCO-LT index {path} cannot be read: {e}", hint="image_ids and class_offsets") from e
        rises = len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == len(ids) and (np.diff(offsets) >= 0).all()
        if not rises:
            raise FormatError(f"COCO-LT index {path}: class_offsets do not divide {len(ids)} image_ids")
        return np.split(ids, offsets[1:-1])
    content = read_pickle(path, "COCO-LT index")
    try:
        # Classes are numbered from 1 in ascending category id.
        return [np.asarray(content[k + 1]["img_id"], np.int64) for k in range(len(content))]
    except (KeyError, TypeError, ValueError) as e:
        raise FormatError(f"COCO-LT index {path} is no dict of classes 1, 2, ... with img_id: {e!r}") from e


def build(annotations: Path, out: Path, by: Index | Profile, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the long-tailed part of ``annotations`` to ``out``, with the counts in its categories; images that keep no
    annotation are left out.

    Returns:
        Numbers of images, annotations, categories, the smallest and largest class, and classes per bin of ``BINS``.

    Raises:
        ExistsError: ``out`` exists. MissingFileError, FormatError: not there, or no COCO json. InputError: the index is
            of another data set.
    """
    if out.exists() and not overwrite:
        raise ExistsError(f"{out} exists", hint="choose another --out, or add --overwrite")
    document = read_json(annotations, "annotation file")
    read = Annotations.from_document(document, annotations)
    if not len(read.id):
        raise FormatError(f"{annotations} has no annotations", hint="take the json of an annotated split")
    image_id, label, ids = read.images.id[read.image], read.category, read.categories.id
    index = profiled(image_id, label, len(ids), by) if isinstance(by, Profile) else by
    if len(index) != len(ids):
        raise InputError(f"the index has {len(index)} classes, {annotations} lists {len(ids)} categories")
    kept = np.zeros(len(label), np.bool_)
    for k, images in enumerate(index):
        own = np.flatnonzero(label == k)
        absent = np.setdiff1d(images, image_id[own])
        if len(absent):
            raise InputError(
                f"the index keeps category {ids[k]} in image {absent[0]}, where {annotations} has none of it "
                f"({len(absent)} such images)",
                hint="the authors' index is of instances_train2017.json",
            )
        kept[own] = np.isin(image_id[own], images)
    left = set(image_id[kept].tolist())
    instances = np.bincount(label[kept], minlength=len(ids))
    pairs = np.unique(np.stack([label[kept], image_id[kept]]), axis=1)
    images_of = np.bincount(pairs[0], minlength=len(ids))
    position = {int(c): k for k, c in enumerate(ids)}
    written = {
        **document,
        "images": [r for r in document["images"] if int(r["id"]) in left],
        "annotations": [a for a, keep in zip(document["annotations"], kept.tolist(), strict=True) if keep],
        "categories": [
            c | {"instance_count": int(instances[p]), "image_count": int(images_of[p])}
            for c in document["categories"]
            for p in [position[int(c["id"])]]
        ],
    }
    content = encoded(written, annotations)
    with replacing(out) as temporary:
        temporary.write_bytes(content)
    return {
        "images": len(written["images"]),
        "annotations": int(kept.sum()),
        "categories": len(ids),
        "smallest": int(instances.min()),
        "largest": int(instances.max()),
        "categories_per_bin": np.bincount(np.digitize(instances, BINS), minlength=4).tolist(),
    }


def profiled(image_id: NDArray[np.int64], label: NDArray[np.int64], classes: int, profile: Profile) -> Index:
    """Images per class, drawn one after the other until the class has its number (the last one may bring more)."""
    rng = np.random.default_rng(profile.seed)
    counts = np.bincount(label, minlength=classes)
    rank = np.empty(classes, np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(classes)
    wanted = np.maximum(1, counts.max() * profile.ratio ** (rank / max(classes - 1, 1)))
    index: Index = []
    for k in range(classes):
        images, number = np.unique(image_id[label == k], return_counts=True)
        order = rng.permutation(len(images))
        enough = int(np.searchsorted(np.cumsum(number[order]), min(wanted[k], counts[k]))) + 1
        index.append(np.sort(images[order[:enough]]))
    return index


def in_words(summary: dict[str, Any], out: Path, edges: Sequence[int] = BINS) -> str:
    """``summary`` of ``build`` in two lines."""
    s = summary
    few, some, many, most = s["categories_per_bin"]
    return (
        f"{s['images']:,} images, {s['annotations']:,} annotations of {s['categories']} categories "
        f"({s['smallest']:,} to {s['largest']:,} each)  {out}\n"
        f"{few} categories below {edges[0]}, {some} below {edges[1]}, {many} below {edges[2]:,}, {most} above"
    )
