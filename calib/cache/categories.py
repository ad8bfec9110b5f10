"""The foreground classes: contiguous index, dataset category id, name, TRAIN counts, frequency.

``instance_count`` counts annotations, ``image_count`` counts images; methods say which one they use.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from calib.annotations import Annotations
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
    def of(cls, read: Annotations) -> "Categories":
        """Categories of an annotation file, in ascending id.

        Counts are the file's own ``instance_count`` and ``image_count`` where it has both (LVIS: TRAIN counts), else
        its annotations are counted.

        Raises:
            InputError: the file has no categories.
        """
        rows = read.categories
        if not len(rows.id):
            raise InputError(f"{read.path} has no categories")
        instances, images = rows.instance_count, rows.image_count
        if instances is None or images is None:
            instances = np.bincount(read.category, minlength=len(rows.id))
            seen = np.unique(read.category * len(read.images.id) + read.image)
            images = np.bincount(seen // max(len(read.images.id), 1), minlength=len(rows.id))
        return cls(rows.id, rows.name, instances, images, rows.frequency or tuple(map(_frequency, images.tolist())))

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


def counting_file(read: Annotations, counts_from: Annotations | Path | None) -> Annotations:
    """The file whose counts are taken for those of TRAIN: ``counts_from`` where it is given, else ``read`` itself.

    Raises:
        InputError: it has other categories, or neither counts nor annotations to count. Also as ``Annotations.read``.
    """
    if counts_from is None:
        return read
    counting = counts_from if isinstance(counts_from, Annotations) else Annotations.read(counts_from)
    if not np.array_equal(counting.categories.id, read.categories.id):
        raise InputError(
            f"{read.path} and {counting.path} list different categories",
            hint="--counts-from takes the TRAIN json of the same data set",
        )
    if counting.style == "none" and counting.categories.instance_count is None:
        raise InputError(
            f"{counting.path} has neither counts nor annotations to count", hint="--counts-from takes the TRAIN json"
        )
    return counting


def _frequency(image_count: int) -> str:
    """LVIS v1 rule on TRAIN image counts: rare 1..10, common 11..100, frequent above."""
    return "r" if image_count <= 10 else "c" if image_count <= 100 else "f"
