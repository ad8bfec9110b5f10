"""Images and ground truth of an LVIS v0.5/v1 or COCO json."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError

from calib.cache import Categories
from calib.errors import FormatError, InputError, MissingFileError
from calib.extract.adapter import Image
from calib.extract.label import GroundTruth
from calib.files import read_json, require


@dataclass(frozen=True)
class Dataset:
    """Image records in ascending image id, categories with TRAIN counts, objects by image id."""

    annotations_file: Path
    images: list[dict[str, Any]]
    categories: Categories
    annotations: dict[str, NDArray[Any]]  # columns of ANNOTATIONS_SCHEMA
    _of_image: dict[int, NDArray[np.int64]]

    @classmethod
    def read(cls, annotations_file: Path, *, counts_from: Path | None = None) -> "Dataset":
        """Read ``annotations_file``; category counts come from ``counts_from`` (the TRAIN json) where it is given.

        Raises:
            MissingFileError, FormatError, InputError: see the messages.
        """
        data = _document(annotations_file)
        records = sorted(data["images"], key=lambda r: int(r["id"]))
        if not records:
            raise InputError(f"{annotations_file} lists no images")
        counted = data if counts_from is None else _document(counts_from)
        categories = Categories.from_json(counted["categories"], counted["annotations"])
        own = Categories.from_json(data["categories"], data["annotations"])
        if own.category_id.tolist() != categories.category_id.tolist():
            raise InputError(f"{annotations_file} and {counts_from} list different categories")
        try:
            annotations = _columns(data["annotations"])
        except (KeyError, TypeError, ValueError) as e:
            raise FormatError(f"{annotations_file}: an annotation is damaged ({e!r})") from e
        categories.index_of(annotations["category_id"])
        return cls(annotations_file, records, categories, annotations, _group(annotations["image_id"]))

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
    return dict(data)


def _columns(records: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
    box = np.asarray([r["bbox"] for r in records], np.float64).reshape(-1, 4)
    if not np.isfinite(box).all():
        raise ValueError("bbox is not finite")
    return {
        "id": np.asarray([r["id"] for r in records], np.int64),
        "image_id": np.asarray([r["image_id"] for r in records], np.int64),
        "category_id": np.asarray([r["category_id"] for r in records], np.int64),
        "x1": box[:, 0],
        "y1": box[:, 1],
        "x2": box[:, 0] + box[:, 2],
        "y2": box[:, 1] + box[:, 3],
        "area": np.asarray([r.get("area", r["bbox"][2] * r["bbox"][3]) for r in records], np.float64),
        "ignore": np.asarray([bool(r.get("ignore", 0) or r.get("iscrowd", 0)) for r in records], np.bool_),
    }


def _group(image_ids: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    rows: dict[int, list[int]] = defaultdict(list)
    for row, image_id in enumerate(image_ids.tolist()):
        rows[image_id].append(row)
    return {k: np.asarray(v, np.int64) for k, v in rows.items()}


def image_path(record: dict[str, Any], folder: Path) -> Path:
    """Where the picture lies: ``file_name``, or the end of LVIS v1's ``coco_url`` (with its split folder or without).

    Raises:
        MissingFileError: nowhere.
    """
    name = str(record.get("file_name") or "/".join(str(record.get("coco_url", "")).split("/")[-2:]))
    candidates = [folder / name, folder / Path(name).name]
    for path in candidates:
        if name and path.is_file():
            return path
    raise MissingFileError(
        f"image {record['id']} not found: {candidates[0]}", hint="--images names the folder of pictures"
    )


def read_image(record: dict[str, Any], folder: Path) -> Image:
    """[height, width, 3] RGB.

    Raises:
        MissingFileError: no such file. FormatError: not a picture, or of another size than the json says.
    """
    path = require(image_path(record, folder), "image")
    try:
        with PillowImage.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as e:
        raise FormatError(f"image {path} cannot be read: {e}", hint="the file is damaged: restore it and resume") from e
    expected = (int(record.get("height") or pixels.shape[0]), int(record.get("width") or pixels.shape[1]))
    if pixels.shape[:2] != expected:
        raise FormatError(
            f"image {path} is {pixels.shape[0]} x {pixels.shape[1]}, the json says {expected[0]} x {expected[1]}"
        )
    return pixels
