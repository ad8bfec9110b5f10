"""The foreground classes: contiguous index, dataset category id, name, TRAIN counts, frequency.

``instance_count`` counts annotations, ``image_count`` counts images; methods say which one they use.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from calib.cache.schema import CATEGORIES_SCHEMA
from calib.errors import FormatError, InputError
from calib.files import replacing, require


@dataclass(frozen=True)
class Categories:
    """C categories in the order of the detector's classes: the position is the class index used everywhere else.

    That is ascending category id, unless the detector's framework numbers them otherwise (mmdetection).
    """

    category_id: NDArray[np.int64]
    name: tuple[str, ...]
    instance_count: NDArray[np.int64]
    image_count: NDArray[np.int64]
    frequency: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.category_id)

    def index_of(self, category_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Dataset ids -> class indices.

        Raises:
            InputError: an id that is no category.
        """
        order = np.argsort(self.category_id)
        position = np.searchsorted(self.category_id, category_ids, sorter=order)
        position = order[np.minimum(position, len(self) - 1)]
        wrong = self.category_id[position] != category_ids
        if wrong.any():
            raise InputError(f"annotations use category id {category_ids[wrong][0]}, which is no category of the file")
        return position

    @classmethod
    def from_json(cls, records: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> "Categories":
        """Categories of an LVIS or COCO json.

        Counts are the file's own ``instance_count`` and ``image_count`` where it has them (LVIS: TRAIN counts), else
        they are counted from ``annotations``.
        """
        if not records:
            raise InputError("the annotation file has no categories")
        records = sorted(records, key=lambda r: int(r["id"]))
        ids = np.asarray([int(r["id"]) for r in records], np.int64)
        if len(np.unique(ids)) != len(ids):
            raise InputError("the annotation file lists a category id twice")
        if all("instance_count" in r and "image_count" in r for r in records):
            instances = np.asarray([r["instance_count"] for r in records], np.int64)
            images = np.asarray([r["image_count"] for r in records], np.int64)
        else:
            instances, images = _count(ids, annotations)
        if min(instances.min(), images.min()) < 0:
            raise InputError("a category has a negative instance_count or image_count")
        frequency = tuple(str(r.get("frequency") or _frequency(int(n))) for r, n in zip(records, images, strict=True))
        return cls(ids, tuple(str(r.get("name", r["id"])) for r in records), instances, images, frequency)

    def ordered(self, category_ids: NDArray[np.int64]) -> "Categories":
        """The same categories in the order of ``category_ids`` [C]."""
        k = self.index_of(category_ids)
        names, frequencies = ([column[i] for i in k] for column in (self.name, self.frequency))
        counts = self.instance_count[k], self.image_count[k]
        return Categories(self.category_id[k], tuple(names), *counts, tuple(frequencies))

    def write(self, path: Path) -> None:
        """Write ``categories.parquet``."""
        columns = [
            pa.array(np.arange(len(self)), pa.int32()),
            pa.array(self.category_id),
            pa.array(self.name),
            pa.array(self.instance_count),
            pa.array(self.image_count),
            pa.array(self.frequency),
        ]
        with replacing(path) as temporary:
            pq.write_table(
                pa.table(columns, schema=CATEGORIES_SCHEMA), temporary, compression="zstd", write_page_checksum=True
            )

    @classmethod
    def read(cls, path: Path) -> "Categories":
        """Read ``categories.parquet``.

        Raises:
            MissingFileError: not there. FormatError: damaged.
        """
        try:
            table = pq.read_table(require(path, "category table"))
            # Copies: torch wants writable memory.
            columns = {n: np.array(table[n].to_numpy()) for n in CATEGORIES_SCHEMA.names}
        except (pa.ArrowException, KeyError, OSError) as e:
            raise FormatError(f"category table {path} cannot be read: {e}") from e
        return cls(
            columns["category_id"],
            tuple(columns["name"]),
            columns["instance_count"],
            columns["image_count"],
            tuple(columns["frequency"]),
        )


def _count(ids: NDArray[np.int64], annotations: list[dict[str, Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    pairs = np.asarray([(a["category_id"], a["image_id"]) for a in annotations], np.int64).reshape(-1, 2)
    distinct = np.unique(pairs, axis=0)
    instances = np.asarray([(pairs[:, 0] == i).sum() for i in ids], np.int64)
    images = np.asarray([(distinct[:, 0] == i).sum() for i in ids], np.int64)
    return instances, images


def _frequency(image_count: int) -> str:
    """LVIS v1 rule on TRAIN image counts: rare 1..10, common 11..100, frequent above."""
    return "r" if image_count <= 10 else "c" if image_count <= 100 else "f"
