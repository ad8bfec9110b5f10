"""Annotation files: json of LVIS v0.5, LVIS v1 or COCO, and lists of images without annotations (image_info).

The one reader of such files, for every command. Null counts as absent.

- ``images``: ``id``; ``height`` and ``width``, at least 1, and the names of the picture, if any. LVIS is federated: of
  an image only some categories are known. ``neg_category_ids`` are known to be absent, and of those in
  ``not_exhaustive_category_ids`` not every object is annotated. All images have both lists, or none has one (COCO).
- ``categories``: ``id``, ``name`` (else the id), and in all or in none ``frequency`` (r, c, f), ``instance_count``,
  ``image_count``.
- ``annotations``: ``id``, at least 0; ``image_id``, ``category_id`` of the file; ``bbox`` x, y, width, height;
  ``area``, else that of the box; the flags ``ignore`` and ``iscrowd``. A file without this list is
  of images that nobody annotated, which is not the same as an empty list.

Ids are whole numbers, 3.0 too, and none stands twice. A flag is true, 1, false or 0. Text is Unicode. What breaks a
rule is named with file and row.
"""

from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.documents import flags, given, integers, numbers, reals, records, texts, unique, whole_numbers
from calib.errors import FormatError
from calib.files import read_json
from calib.lookup import positions

STYLES = ("lvis", "coco", "none")
PICTURE_NAMES = ("file_name", "coco_url", "flickr_url")
FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")
NOT_FEDERATED = "LVIS evaluation needs it: categories in neither list are not judged (COCO files: style coco)"
FREQUENCIES = ("r", "c", "f")
LARGEST_PIXEL = 1e7

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CategoryLists:
    """A list of category ids for every image: ``ids[start[i] : start[i + 1]]``."""

    start: Integers  # [I + 1]
    ids: Integers

    def image(self) -> Integers:
        """The image of every entry of ``ids``."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))

    def lists(self) -> list[list[int]]:
        """One per image."""
        start, ids = self.start.tolist(), self.ids.tolist()
        return [ids[a:b] for a, b in pairwise(start)]


@dataclass(frozen=True)
class Images:
    """I images in ascending id."""

    id: Integers  # [I]
    size: Integers  # [I, 2], height and width, 0 where the file does not say
    names: dict[str, list[str | None]]  # [I] each, by ``PICTURE_NAMES``
    negative: CategoryLists
    not_exhaustive: CategoryLists

    @property
    def federated(self) -> tuple[CategoryLists, CategoryLists]:
        """Both lists, by ``FEDERATED``."""
        return self.negative, self.not_exhaustive


@dataclass(frozen=True)
class CategoryRows:
    """C categories in ascending id; None where the file has no such column."""

    id: Integers  # [C]
    name: tuple[str, ...]  # [C]
    frequency: tuple[str, ...] | None  # [C]
    instance_count: Integers | None  # [C], TRAIN annotations
    image_count: Integers | None  # [C], TRAIN images
    listed: tuple[int, ...]  # [C], ids in the order of the file


@dataclass(frozen=True)
class Annotations:
    """What a file says. N annotations in the order of the file.

    ``style`` says what is known of an image's categories: of some (``lvis``), of all (``coco``), of none as there are
    no annotations (``none``).
    """

    path: Path
    style: str
    images: Images
    categories: CategoryRows
    id: Integers  # [N], >= 0
    image: Integers  # [N], index into images
    category: Integers  # [N], index into categories
    box: Floats  # [N, 4], x, y, width, height in pixels
    area: Floats  # [N], pixels
    ignore: NDArray[np.bool_]  # [N], the annotation's own flag
    crowd: NDArray[np.bool_]  # [N], ``iscrowd``
    notices: tuple[str, ...] = ()  # what is odd though it is allowed

    @classmethod
    def read(cls, path: Path) -> "Annotations":
        """Read a .json or .json.gz file.

        Raises:
            MissingFileError, FormatError, NonFiniteError: not there, no such file, damaged, or against a rule.
        """
        return cls.from_document(read_json(path, "annotation file"), path)

    @classmethod
    def from_document(cls, document: Any, path: Path) -> "Annotations":
        """From a parsed document, which is left as it is; ``path`` is named in errors.

        Raises:
            FormatError, NonFiniteError: as ``read``.
        """
        if not isinstance(document, dict):
            raise FormatError(
                f"{path}: expected a LVIS or COCO ground-truth object, got a {type(document).__name__}",
                hint="a list is a results file; the ground truth is the split's annotations",
            )
        is_annotated = document.get("annotations") is not None
        images, style = _images(records(document, "images", path), path, is_annotated=is_annotated)
        categories = _categories(records(document, "categories", path), f"{path}: categories")
        rows = records(document, "annotations", path) if is_annotated else []
        columns, notices = _columns(rows, images, categories, f"{path}: annotations")
        return cls(path, style, images, categories, **columns, notices=tuple(f"{path}: {text}" for text in notices))


def beyond(box: Floats, image: Integers, size: Integers) -> int:
    """How many of ``box`` [N, 4] (x, y, width, height) reach a pixel or more beyond their image; ``image`` [N] is the
    row of ``size`` [I, 2], height and width. Those of images without a size do not."""
    within = size[image, ::-1]
    return int(((within > 0) & ((box[:, :2] + box[:, 2:] >= within + 1) | (box[:, :2] <= -1))).any(axis=1).sum())


def boxes_outside(box: Floats, image: Integers, size: Integers, what: str) -> tuple[str, ...]:
    """A notice if most of the boxes, ``what``, reach beyond their images: as corners do that are read as sides."""
    if not len(box) or 2 * (n := beyond(box, image, size)) <= len(box):
        return ()
    return (f"{n} of {len(box)} {what} reach beyond their image: bbox is x, y, width, height, not x1, y1, x2, y2",)


def _images(rows: list[dict[str, Any]], path: Path, *, is_annotated: bool) -> tuple[Images, str]:
    """The images, and the style."""
    where = f"{path}: images"
    ids = unique(integers(rows, "id", where), where)
    size = np.zeros((len(rows), 2), np.int64)
    for k, key in enumerate(("height", "width")):
        column = [row.get(key) for row in rows]
        size[:, k] = whole_numbers([1 if value is None else value for value in column], key, where)
        if (wrong := size[:, k] < 1).any():
            row = int(np.argmax(wrong))
            raise FormatError(f"{where}[{row}]: every {key} must be at least 1 pixel, got {size[row, k]}")
        if None in column:
            size[[value is None for value in column], k] = 0
    names = {key: texts(rows, key, where) for key in PICTURE_NAMES}
    lists = {key: [row.get(key) for row in rows] for key in FEDERATED}
    style = "none" if not is_annotated else "lvis" if any(map(_any_given, lists.values())) else "coco"
    order = np.argsort(ids)
    joined = [_joined(column, key, order, where, needed=style == "lvis") for key, column in lists.items()]
    return Images(ids[order], size[order], {k: _taken(v, order) for k, v in names.items()}, *joined), style


def _any_given(column: list[Any]) -> bool:
    return any(value is not None for value in column)


def _joined(column: list[Any], key: str, order: Integers, where: str, *, needed: bool) -> CategoryLists:
    """The lists of all images, in ``order``."""
    row = next(
        (i for i, entry in enumerate(column) if not isinstance(entry, list) and (needed or entry is not None)), None
    )
    if row is not None and column[row] is None:
        raise FormatError(f"{where}[{row}] has no '{key}'", hint=NOT_FEDERATED)
    if row is not None:
        raise FormatError(f"{where}[{row}]: '{key}' must be a list of category ids, got {column[row]!r}")
    lists = _taken(column, order)
    start = np.cumsum([0, *(len(entry or ()) for entry in lists)], dtype=np.int64)
    try:
        return CategoryLists(start, whole_numbers(list(chain.from_iterable(filter(None, lists))), key, where))
    except FormatError:
        for i, entry in enumerate(column):
            whole_numbers(entry or [], key, f"{where}[{i}]")  # names the image
        raise


def _taken(column: list[Any], order: Integers) -> list[Any]:
    return [column[i] for i in order.tolist()]


def _categories(rows: list[dict[str, Any]], where: str) -> CategoryRows:
    ids = unique(integers(rows, "id", where), where)
    order = np.argsort(ids)
    # Numbers are names, too: digits, for one.
    named = [row | {"name": str(row["name"])} if type(row.get("name")) is int else row for row in rows]
    names = [
        str(i) if name is None else name for i, name in zip(ids.tolist(), texts(named, "name", where), strict=True)
    ]
    frequency = given(rows, "frequency", where)
    for i, value in zip(ids.tolist(), frequency or (), strict=False):
        if value not in FREQUENCIES:
            raise FormatError(f"{where}: category {i} has frequency {value!r}, expected r, c or f")
    return CategoryRows(
        id=ids[order],
        name=tuple(_taken(names, order)),
        frequency=None if frequency is None else tuple(_taken(frequency, order)),
        instance_count=_counts(rows, "instance_count", ids, order, where),
        image_count=_counts(rows, "image_count", ids, order, where),
        listed=tuple(ids.tolist()),
    )


def _counts(rows: list[dict[str, Any]], key: str, ids: Integers, order: Integers, where: str) -> Integers | None:
    column = given(rows, key, where)
    if column is None:
        return None
    counts = whole_numbers(column, key, where)
    if (counts < 0).any():
        row = int(np.argmax(counts < 0))
        raise FormatError(f"{where}: category {ids[row]} has {key} {counts[row]}, expected >= 0")
    return counts[order]


def _columns(
    rows: list[dict[str, Any]], images: Images, categories: CategoryRows, where: str
) -> tuple[dict[str, Any], list[str]]:
    """The columns of ``Annotations``, and notices."""
    ids = unique(integers(rows, "id", where), where)
    if (ids < 0).any():
        row = int(np.argmax(ids < 0))
        raise FormatError(f"{where}[{row}] has id {ids[row]}, ids must be >= 1")
    image, category = _known(rows, "image_id", images.id, where), _known(rows, "category_id", categories.id, where)
    box = _boxes(rows, where)
    notices = [*boxes_outside(box, image, images.size, "boxes of objects")]
    area = [row.get("area") for row in rows]
    if None in area:
        lacking = [i for i, value in enumerate(area) if value is None]
        for i in lacking:
            area[i] = float(box[i, 2] * box[i, 3])
        notices.append(f"{len(lacking)} of {len(rows)} annotations have no area: it is taken to be that of the box")
    marks = {name: flags(rows, key, where) for name, key in (("ignore", "ignore"), ("crowd", "iscrowd"))}
    return {
        "id": ids,
        "image": image,
        "category": category,
        "box": box,
        "area": reals(area, "area", where),
        **marks,
    }, notices


def _boxes(rows: list[dict[str, Any]], where: str) -> Floats:
    box = numbers(rows, "bbox", where, width=4)
    for wrong, what, hint in (
        ((box[:, 2:] < 0).any(axis=1), "has a negative side", "bbox is x, y, width, height"),
        ((np.abs(box) > LARGEST_PIXEL).any(axis=1), "is no box of pixels", "damaged numbers?"),
    ):
        if wrong.any():
            row = int(np.argmax(wrong))
            raise FormatError(f"{where}[{row}]: bbox {box[row].tolist()} {what}", hint=hint)
    return box


def _known(rows: list[dict[str, Any]], key: str, known: Integers, where: str) -> Integers:
    ids = integers(rows, key, where)
    return located(ids, known, key, where)


def located(ids: Integers, known: Integers, key: str, where: str) -> Integers:
    """Where each of ``ids`` [N] stands in ``known``, which ascends.

    Raises:
        FormatError: nowhere.
    """
    index = positions(known, ids)
    if (index < 0).any():
        row = int(np.argmin(index))
        raise FormatError(
            f"{where}[{row}]: {key} {ids[row]} is not among the file's {key.removesuffix('_id')} ids",
            hint="the file mixes splits or was cut; write it again from its source",
        )
    return index
