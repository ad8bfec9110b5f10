"""Images and ground truth of an LVIS v0.5/v1 or COCO json."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from calib.cache import Categories
from calib.documents import integers, numbers, records, unique
from calib.errors import FormatError, InputError
from calib.extract.label import GroundTruth
from calib.extract.pictures import image_path as image_path  # which users import from here, too
from calib.extract.pictures import read_image as read_image
from calib.files import read_json

# What is read of an image record.
IMAGE_FIELDS = ("id", "file_name", "coco_url", "height", "width", "neg_category_ids", "not_exhaustive_category_ids")

LARGEST_PIXEL = 1e7


@dataclass(frozen=True)
class Dataset:
    """Image records in ascending image id, categories with TRAIN counts, objects by image id.

    Categories are in ascending id until ``classes.in_class_order`` puts them in the order of a detector's classes.
    """

    annotations_file: Path
    images: list[dict[str, Any]]
    categories: Categories
    annotations: dict[str, NDArray[Any]]  # columns of ANNOTATIONS_SCHEMA
    _of_image: dict[int, NDArray[np.int64]]
    listed: tuple[int, ...] = ()  # category ids in the order of the TRAIN json, as far as it was given

    @classmethod
    def read(cls, annotations_file: Path, *, counts_from: Path | None = None) -> "Dataset":
        """Read ``annotations_file``; category counts come from ``counts_from`` (the TRAIN json) where it is given.

        Raises:
            MissingFileError, FormatError, NonFiniteError, InputError: not there, not LVIS or COCO, or inconsistent
                (ids that occur twice, annotations of images or categories that are not listed).
        """
        data = _document(annotations_file)
        images = sorted(data["images"], key=lambda r: int(r["id"]))
        if not images:
            raise InputError(f"{annotations_file} lists no images")
        counted = annotations_file if counts_from is None else counts_from
        counting = data if counts_from is None else _document(counts_from)
        categories = _categories(counted, counting)
        if categories.category_id.tolist() != _categories(annotations_file, data).category_id.tolist():
            raise InputError(
                f"{annotations_file} and {counts_from} list different categories",
                hint="--counts-from takes the TRAIN json of the same data set",
            )
        annotations = _columns(data["annotations"], f"{annotations_file}: annotations")
        _check_ids(annotations, images, categories, annotations_file)
        listed = tuple(int(r["id"]) for r in counting["categories"])
        return cls(annotations_file, images, categories, annotations, _group(annotations["image_id"]), listed)

    def digest(self) -> str:
        """xxh3-64 over everything that was read: a cache is of one data set."""
        c = self.categories
        counts = [c.category_id.tolist(), c.name, c.instance_count.tolist(), c.image_count.tolist(), c.frequency]
        images = [[r.get(k) for k in IMAGE_FIELDS] for r in self.images]
        h = xxhash.xxh3_64(orjson.dumps([counts, images]))
        for name, column in self.annotations.items():
            h.update(name.encode() + column.tobytes())
        return h.hexdigest()

    def objects(self, image_id: int) -> GroundTruth:
        """Objects that proposals can be matched with: crowd regions and empty boxes are left out."""
        rows = self._of_image.get(image_id, np.empty(0, np.int64))
        a = {k: v[rows] for k, v in self.annotations.items()}
        usable = ~a["ignore"] & (a["x2"] > a["x1"]) & (a["y2"] > a["y1"])
        boxes = np.stack([a[n][usable] for n in ("x1", "y1", "x2", "y2")], axis=1).astype(np.float32)
        label = self.categories.index_of(a["category_id"][usable])
        return GroundTruth(boxes, label, a["id"][usable])


def _document(path: Path) -> dict[str, Any]:
    data = read_json(path, "annotation file")
    missing = [k for k in ("images", "annotations", "categories") if not isinstance(data, dict) or k not in data]
    if missing:
        raise FormatError(
            f"{path} is not an LVIS or COCO annotation file: it has no {', '.join(missing)}",
            hint="--annotations takes the json with images, annotations and categories",
        )
    images, where = records(data, "images", path), f"{path}: images"
    unique(integers(images, "id", where), where)
    for kind in ("height", "width"):
        sized = [r for r in images if r.get(kind) is not None]
        if sized and integers(sized, kind, where).min() < 1:
            raise FormatError(f"{where}: every {kind} must be at least 1 pixel")
    for kind in ("neg_category_ids", "not_exhaustive_category_ids"):
        for r in images:
            listed = r.get(kind) or []
            if not isinstance(listed, list) or not all(type(c) is int for c in listed):
                raise FormatError(f"{where}: {kind} of image {r['id']} must be a list of whole numbers")
    return {"images": images, **{k: records(data, k, path) for k in ("annotations", "categories")}}


def _categories(path: Path, data: dict[str, Any]) -> Categories:
    unique(integers(data["categories"], "id", f"{path}: categories"), f"{path}: categories")
    try:
        return Categories.from_json(data["categories"], data["annotations"])
    except InputError as e:
        raise InputError(f"{path}: {e}", hint=e.hint) from e
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        raise FormatError(f"{path}: categories or annotations are damaged ({e!r})") from e


def _columns(rows: list[dict[str, Any]], where: str) -> dict[str, NDArray[Any]]:
    box = numbers(rows, "bbox", where, width=4)
    negative = (box[:, 2:] < 0).any(axis=1)
    if negative.any():
        row = int(np.argmax(negative))
        raise FormatError(
            f"{where}[{row}]: bbox {box[row].tolist()} has a negative side", hint="bbox is x, y, width, height"
        )
    if (np.abs(box) > LARGEST_PIXEL).any():
        row = int(np.argmax((np.abs(box) > LARGEST_PIXEL).any(axis=1)))
        raise FormatError(f"{where}[{row}]: bbox {box[row].tolist()} is no box of pixels", hint="damaged numbers?")
    sized = all("area" in r for r in rows)
    return {
        "id": unique(integers(rows, "id", where), where),
        "image_id": integers(rows, "image_id", where),
        "category_id": integers(rows, "category_id", where),
        "x1": box[:, 0],
        "y1": box[:, 1],
        "x2": box[:, 0] + box[:, 2],
        "y2": box[:, 1] + box[:, 3],
        "area": numbers(rows, "area", where) if sized else box[:, 2] * box[:, 3],
        "ignore": np.asarray([bool(r.get("ignore", 0) or r.get("iscrowd", 0)) for r in rows], np.bool_),
    }


def _check_ids(annotations: dict[str, NDArray[Any]], records: list[dict[str, Any]], c: Categories, path: Path) -> None:
    """Every annotation belongs to an image and a category of the file."""
    for name, known in (("image_id", [r["id"] for r in records]), ("category_id", c.category_id)):
        strange = ~np.isin(annotations[name], np.asarray(known, np.int64))
        if strange.any():
            row = int(np.argmax(strange))
            raise InputError(
                f"{path}: annotations[{row}] has {name} {annotations[name][row]}, which the file does not list",
                hint="was the file cut or joined by hand? write it again with all images and categories",
            )


def _group(image_ids: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    rows: dict[int, list[int]] = defaultdict(list)
    for row, image_id in enumerate(image_ids.tolist()):
        rows[image_id].append(row)
    return {k: np.asarray(v, np.int64) for k, v in rows.items()}
