"""Images and ground truth of an annotation file, as extraction and import take them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from calib.annotations import FEDERATED, Annotations, Images
from calib.cache import Categories
from calib.cache.categories import counting_file
from calib.cache.schema import LATER_ANNOTATION_COLUMNS
from calib.errors import InputError
from calib.extract.label import GroundTruth
from calib.extract.pictures import image_path as image_path  # which users import from here, too
from calib.extract.pictures import read_image as read_image


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
    style: str = "lvis"  # of ``calib.annotations.STYLES``
    notices: tuple[str, ...] = ()  # what is odd about the file though it is allowed

    @classmethod
    def read(cls, annotations_file: Path, *, counts_from: Path | None = None) -> "Dataset":
        """Read ``annotations_file``; category counts come from ``counts_from`` (the TRAIN json) where it is given.

        Raises:
            MissingFileError, FormatError, NonFiniteError, InputError: not there, against a rule of
                ``calib.annotations``, without images or categories, or with other categories than ``counts_from``.
        """
        return cls.of(
            Annotations.read(annotations_file), None if counts_from is None else Annotations.read(counts_from)
        )

    @classmethod
    def of(cls, read: Annotations, counts_from: Annotations | None = None) -> "Dataset":
        """What was read of an annotation file, with counts of another.

        Raises:
            InputError: as ``read``.
        """
        if not len(read.images.id):
            raise InputError(f"{read.path} lists no images")
        counting = counting_file(read, counts_from)
        categories = Categories.of(counting)
        return cls(
            read.path,
            records_of(read.images),
            categories,
            _columns(read),
            _group(read),
            counting.categories.listed,
            read.style,
            read.notices,
        )

    def digest(self) -> str:
        """xxh3-64 over everything that was read: a cache is of one data set."""
        c = self.categories
        counts = [c.category_id.tolist(), c.name, c.instance_count.tolist(), c.image_count.tolist(), c.frequency]
        images = [[r[k] for k in ("id", "file_name", "coco_url", "height", "width", *FEDERATED)] for r in self.images]
        h = xxhash.xxh3_64(orjson.dumps([counts, images]))
        for name, column in (self.annotations | {"ignore": self.left_out}).items():
            if name not in LATER_ANNOTATION_COLUMNS or (name == "crowd" and column.any()):
                h.update(name.encode() + column.tobytes())
        return h.hexdigest()

    @cached_property
    def left_out(self) -> NDArray[np.bool_]:
        """Annotations that are no single object to find: crowds, and those that are to be ignored."""
        return np.asarray(self.annotations["ignore"] | self.annotations["crowd"])

    def objects(self, image_id: int) -> GroundTruth:
        """Objects that proposals can be matched with: crowd regions and empty boxes are left out."""
        rows = self._of_image.get(image_id, np.empty(0, np.int64))
        a = {k: v[rows] for k, v in self.annotations.items()}
        usable = ~self.left_out[rows] & (a["x2"] > a["x1"]) & (a["y2"] > a["y1"])
        boxes = np.stack([a[n][usable] for n in ("x1", "y1", "x2", "y2")], axis=1).astype(np.float32)
        label = self.categories.index_of(a["category_id"][usable])
        return GroundTruth(boxes, label, a["id"][usable])


def records_of(images: Images) -> list[dict[str, Any]]:
    """Plain records with what is read of an image, None for what the file does not say."""
    sizes = [[side or None for side in size] for size in images.size.tolist()]
    lists = zip(*(one.lists() if len(one.ids) else [None] * len(sizes) for one in images.federated), strict=True)
    keys = ("id", *images.names, "height", "width", *FEDERATED)
    return [
        dict(zip(keys, (image_id, *names, *size, *known), strict=True))
        for image_id, names, size, known in zip(
            images.id.tolist(), zip(*images.names.values(), strict=True), sizes, lists, strict=True
        )
    ]


def _columns(read: Annotations) -> dict[str, NDArray[Any]]:
    x, y, width, height = read.box.T
    corners = {"x1": x, "y1": y, "x2": x + width, "y2": y + height}
    ids = {"id": read.id, "image_id": read.images.id[read.image], "category_id": read.categories.id[read.category]}
    marks = {"ignore": read.ignore, "width": width, "height": height, "crowd": read.crowd}
    return {**ids, **corners, "area": read.area, **marks}


def _group(read: Annotations) -> dict[int, NDArray[np.int64]]:
    """Rows of the annotations of every image that has some."""
    order = np.argsort(read.image, kind="stable")
    image, start = np.unique(read.image[order], return_index=True)
    rows = np.split(order, start[1:]) if len(order) else []
    return dict(zip(read.images.id[image].tolist(), rows, strict=True))
