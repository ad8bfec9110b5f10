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

from calib.documents import integers, numbers, records, unique, values
from calib.errors import FormatError
from calib.files import read_json

from .lookup import positions
from .masks import RunLengths, run_lengths, segmentations

Style = Literal["lvis", "coco"]

NEGATIVE = np.uint8(1)  # known to be absent from the image
POSITIVE = np.uint8(2)  # at least one annotation that counts
NOT_EXHAUSTIVE = np.uint8(4)  # not every object of the category is annotated

FREQUENCIES = ("r", "c", "f")


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
    image_sizes: tuple[tuple[int, int], ...] | None = None  # [I], height and width, if masks were asked for
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
        if not isinstance(document, dict):
            raise FormatError(
                f"{path}: expected a LVIS ground-truth object, got a {type(document).__name__}",
                hint="a list is a results file; the ground truth is the split's annotations",
            )
        images = records(document, "images", path)
        listed = records(document, "categories", path)
        categories = sorted(listed, key=lambda row: _sort_key(row, path))
        image_ids = np.sort(unique(integers(images, "id", f"{path}: images"), f"{path}: images"))
        category_ids = unique(integers(categories, "id", f"{path}: categories"), f"{path}: categories")
        sizes = _sizes(images, image_ids, path) if masks else None
        annotations, notices = _annotations(document, image_ids, category_ids, path, style, sizes)
        labels = _labels(images if style == "lvis" else [], image_ids, category_ids, path)
        labels[annotations["image"], annotations["category"]] |= POSITIVE
        where = f"{path}: categories"
        return cls(
            image_ids=image_ids,
            category_ids=category_ids,
            names=tuple(str(row.get("name", row["id"])) for row in categories),
            frequency=_frequency(categories, where),
            instance_count=_counts(categories, "instance_count", where),
            image_count=_counts(categories, "image_count", where),
            labels=labels,
            style=style,
            image_sizes=sizes,
            notices=notices,
            listed=tuple(int(row["id"]) for row in listed),
            **annotations,
        )


def _sort_key(row: dict[str, Any], path: Path) -> float:
    value = row.get("id")
    if not isinstance(value, (int, float)):
        raise FormatError(f"{path}: a category has the id {value!r}, expected a whole number")
    return value


def _annotations(
    document: dict[str, Any],
    image_ids: NDArray[np.int64],
    category_ids: NDArray[np.int64],
    path: Path,
    style: Style,
    sizes: tuple[tuple[int, int], ...] | None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The annotation fields of ``GroundTruth``, those that count, in file order; and notices."""
    rows = records(document, "annotations", path)
    where = f"{path}: annotations"
    ids, notices = _annotation_ids(rows, where)
    flag = "ignore" if style == "lvis" else "iscrowd"
    fields: dict[str, NDArray[Any]] = {
        "annotation_id": ids,
        "image": _known(rows, "image_id", image_ids, where),
        "category": _known(rows, "category_id", category_ids, where),
        "box": numbers(rows, "bbox", where, width=4),
        "area": numbers(rows, "area", where),
        "is_ignored": np.array([bool(row.get(flag, False)) for row in rows], dtype=np.bool_),
    }
    fields["is_crowd"] = fields["is_ignored"] & (style == "coco")
    counts = np.flatnonzero((fields["area"] > 0) | (style == "coco"))
    kept = {name: array[counts] for name, array in fields.items()}
    if sizes is None:
        return kept, notices
    # Checked before those without area are dropped: errors name the row of the file.
    masks = run_lengths(segmentations(rows, where), [sizes[i] for i in fields["image"].tolist()], where)
    return kept | {"masks": [masks[i] for i in counts.tolist()]}, notices


def _sizes(images: list[dict[str, Any]], image_ids: NDArray[np.int64], path: Path) -> tuple[tuple[int, int], ...]:
    """Height and width of every image, by ascending id."""
    where = f"{path}: images"
    order = positions(image_ids, integers(images, "id", where))
    sizes = np.zeros((len(images), 2), np.int64)
    for k, key in enumerate(("height", "width")):
        sizes[order, k] = integers(images, key, where)
    return tuple((h, w) for h, w in sizes.tolist())


def _annotation_ids(rows: list[dict[str, Any]], where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    ids = unique(integers(rows, "id", where), where)
    if (ids < 0).any():
        raise FormatError(f"{where}[{np.argmax(ids < 0)}] has id {ids[ids < 0][0]}, ids must be >= 1")
    if (ids > 0).all():
        return ids, ()
    # lvis-api takes a match with id 0 for no match at all: a perfect detection of that object gives AP 0.
    fresh = int(np.setdiff1d(np.arange(1, len(ids) + 1), ids)[0])  # the first that is free
    notice = f"annotation id 0 was renumbered to {fresh}: the LVIS API would count its matches as misses"
    return np.where(ids == 0, fresh, ids), (notice,)


def _known(rows: list[dict[str, Any]], key: str, known: NDArray[np.int64], where: str) -> NDArray[np.int64]:
    ids = integers(rows, key, where)
    index = positions(known, ids)
    if (index < 0).any():
        row = int(np.argmin(index))
        raise FormatError(
            f"{where}[{row}]: {key} {ids[row]} is not among the file's {key.removesuffix('_id')} ids",
            hint="the file mixes splits or was cut; write it again from its source",
        )
    return index


def _labels(
    images: list[dict[str, Any]], image_ids: NDArray[np.int64], category_ids: NDArray[np.int64], path: Path
) -> NDArray[np.uint8]:
    """NEGATIVE and NOT_EXHAUSTIVE bits, uint8 [I, C]. Unknown category ids in the lists have no effect."""
    labels = np.zeros((len(image_ids), len(category_ids)), np.uint8)
    index = positions(image_ids, integers(images, "id", f"{path}: images"))
    for key, bit in (("neg_category_ids", NEGATIVE), ("not_exhaustive_category_ids", NOT_EXHAUSTIVE)):
        image, category = _flatten(images, key, path)
        at = positions(category_ids, category)
        labels[index[image[at >= 0]], at[at >= 0]] |= bit
    return labels


def _flatten(images: list[dict[str, Any]], key: str, path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Position of the image in the file and category id of every entry of the lists under ``key``."""
    where = f"{path}: images"
    try:
        lists = values(images, key, where)
    except FormatError as e:
        e.hint = "LVIS evaluation needs it: categories in neither list are not judged (COCO files: style coco)"
        raise
    bad = next((i for i, entry in enumerate(lists) if not isinstance(entry, list)), None)
    if bad is not None:
        raise FormatError(f"{where}[{bad}]: '{key}' must be a list of category ids, got {lists[bad]!r}")
    image = np.repeat(np.arange(len(lists)), [len(entry) for entry in lists])
    entries = [{key: category} for entry in lists for category in entry]
    return image, integers(entries, key, f"{path}: all {key}")


def _frequency(categories: list[dict[str, Any]], where: str) -> tuple[str, ...] | None:
    if not any("frequency" in row for row in categories):
        return None
    column = values(categories, "frequency", where)
    for row, value in zip(categories, column, strict=True):
        if value not in FREQUENCIES:
            raise FormatError(f"{where}: category {row['id']} has frequency {value!r}, expected r, c or f")
    return tuple(column)


def _counts(categories: list[dict[str, Any]], key: str, where: str) -> NDArray[np.int64] | None:
    if not any(key in row for row in categories):
        return None
    counts = integers(categories, key, where)
    if (counts < 0).any():
        row = int(np.argmax(counts < 0))
        raise FormatError(f"{where}: category {categories[row]['id']} has {key} {counts[row]}, expected >= 0")
    return counts
