"""The labels that results are judged by: LVIS v0.5, LVIS v1 and COCO ground truth as frozen arrays.

LVIS is annotated in a federated way: of an image only some categories are known. Those with an annotation are
positive, those in ``neg_category_ids`` are known to be absent, and of those in
``not_exhaustive_category_ids`` not every object is annotated. One byte per image and category holds all three
facts (``labels``).

A LVIS annotation counts only if 0 < area < infinity, where ``area`` is the mask's area as given in the file, also
for box AP. In COCO style every category is known in every image, annotations of any area count, and ``iscrowd``
marks regions of many objects, in which detections are neither right nor wrong. Ids of images and categories become
indices: images in ascending id, categories in ascending id.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from calib.annotations import NOT_FEDERATED, Annotations, Images
from calib.errors import FormatError
from calib.files import read_json
from calib.lookup import positions

from .masks import RunLengths, run_lengths, segmentations

Style = Literal["lvis", "coco"]

NEGATIVE = np.uint8(1)  # known to be absent from the image
POSITIVE = np.uint8(2)  # at least one annotation that counts
NOT_EXHAUSTIVE = np.uint8(4)  # not every object of the category is annotated


@dataclass(frozen=True)
class GroundTruth:
    """Images, categories and annotations of one split. I images, C categories, G annotations that count."""

    image_ids: NDArray[np.int64]  # [I], ascending
    category_ids: NDArray[np.int64]  # [C], ascending
    names: tuple[str, ...]  # [C]
    frequency: tuple[str, ...] | None  # [C] of r, c, f (from TRAIN image counts); None when the file has none
    instance_count: NDArray[np.int64] | None  # [C], TRAIN annotations; None when the file has none
    image_count: NDArray[np.int64] | None  # [C], TRAIN images; None when the file has none
    labels: NDArray[np.uint8]  # [I, C], bits NEGATIVE, POSITIVE, NOT_EXHAUSTIVE
    annotation_id: NDArray[np.int64]  # [G], >= 1, in file order
    image: NDArray[np.int64]  # [G], index into image_ids
    category: NDArray[np.int64]  # [G], index into category_ids
    box: NDArray[np.float64]  # [G, 4], x, y, width, height in pixels
    area: NDArray[np.float64]  # [G], pixels
    is_ignored: NDArray[np.bool_]  # [G], the annotation's own ``ignore`` flag; in COCO style, a crowd
    is_crowd: NDArray[np.bool_]  # [G], may be taken by any number of detections (COCO style only)
    masks: list[RunLengths] | None = None  # [G], if they were asked for
    style: Style = "lvis"
    image_size: NDArray[np.int64] | None = None  # [I, 2], height and width, 0 where the file does not say
    notices: tuple[str, ...] = ()  # what was mended on reading
    listed: tuple[int, ...] = ()  # [C], category ids in the order of the file

    @property
    def is_federated(self) -> bool:
        """Whether ``labels`` say which categories are known in which image; else all are known everywhere."""
        return self.style == "lvis"

    @classmethod
    def read(cls, path: Path | str, *, style: Style = "lvis", masks: bool = False) -> "GroundTruth":
        """Read a LVIS or COCO json or .json.gz file.

        Raises:
            MissingFileError, FormatError, NonFiniteError: not there, not LVIS ground truth, damaged, or
                inconsistent (duplicate ids, annotations of images or categories that are not listed).
        """
        path = Path(path)
        return cls.from_document(read_json(path, "ground truth"), path, style=style, masks=masks)

    @classmethod
    def from_document(
        cls, document: Any, path: Path = Path("ground truth"), *, style: Style = "lvis", masks: bool = False
    ) -> "GroundTruth":
        """Build from a parsed document, which is left as it is; ``path`` is named in errors.

        Raises:
            FormatError, NonFiniteError: as ``read``.
        """
        read = Annotations.from_document(document, path)
        if not masks:
            return cls.of(read, style)
        where = f"{path}: annotations"
        if (unknown := (read.images.size == 0).any(axis=1)).any():
            raise FormatError(
                f"{path}: image {read.images.id[unknown][0]} has no height and width", hint="masks are of its size"
            )
        sizes = read.images.size[read.image].tolist()
        # Checked before those without area are dropped: errors name the row of the file.
        coded = run_lengths(segmentations(document.get("annotations") or [], where), sizes, where)
        return cls.of(read, style, coded)

    @classmethod
    def of(cls, read: Annotations, style: Style, masks: list[RunLengths] | None = None) -> "GroundTruth":
        """Build from ``read``, in whose order ``masks`` are.

        Raises:
            FormatError: it has no annotations, or in LVIS style does not say which categories an image is known to
                lack.
        """
        if read.style == "none":
            raise FormatError(
                f"{read.path} has no annotations: nothing can be judged by it",
                hint="a list of images (image_info) is for detections; take the annotations of the split",
            )
        if style == "lvis" and read.style != "lvis" and len(read.images.id):
            raise FormatError(f"{read.path}: images[0] has no 'neg_category_ids'", hint=NOT_FEDERATED)
        ids, repaired = _annotation_ids(read.id)
        # Annotations that count, in file order.
        counts = np.arange(len(read.id)) if style == "coco" else np.flatnonzero(read.area > 0)
        image, category = read.image[counts], read.category[counts]
        labels = _labels(read.images, read.categories.id, is_federated=style == "lvis")
        labels[image, category] |= POSITIVE
        known = read.categories
        return cls(
            image_ids=read.images.id,
            category_ids=known.id,
            names=known.name,
            frequency=known.frequency,
            instance_count=known.instance_count,
            image_count=known.image_count,
            labels=labels,
            annotation_id=ids[counts],
            image=image,
            category=category,
            box=read.box[counts],
            area=read.area[counts],
            is_ignored=(read.crowd if style == "coco" else read.ignore)[counts],
            is_crowd=read.crowd[counts] & (style == "coco"),
            masks=None if masks is None else [masks[i] for i in counts.tolist()],
            style=style,
            image_size=read.images.size,
            notices=(*read.notices, *repaired),
            listed=known.listed,
        )


def _annotation_ids(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """``ids``, none of them 0, and a notice."""
    if (ids > 0).all():
        return ids, ()
    # lvis-api takes a match with id 0 for no match at all: a perfect detection of that object gives AP 0.
    fresh = int(np.setdiff1d(np.arange(1, len(ids) + 1), ids)[0])  # the first that is free
    notice = f"annotation id 0 was renumbered to {fresh}: the LVIS API would count its matches as misses"
    return np.where(ids == 0, fresh, ids), (notice,)


def _labels(images: Images, category_ids: NDArray[np.int64], *, is_federated: bool) -> NDArray[np.uint8]:
    """NEGATIVE and NOT_EXHAUSTIVE bits, uint8 [I, C]. Unknown category ids in the lists have no effect."""
    labels = np.zeros((len(images.id), len(category_ids)), np.uint8)
    if is_federated:
        for lists, bit in ((images.negative, NEGATIVE), (images.not_exhaustive, NOT_EXHAUSTIVE)):
            at = positions(category_ids, lists.ids)
            labels[lists.image()[at >= 0], at[at >= 0]] |= bit
    return labels
