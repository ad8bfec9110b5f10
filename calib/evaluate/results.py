"""What a detector found: results of LVIS/COCO json lists and of detections Parquet files as frozen arrays.

Both kinds of file hold the same numbers: Parquet has float32 corners and scores, and its twin in JSON has
``bbox = [x1, y1, x2 - x1, y2 - y1]`` and ``score`` computed in float64 from those float32 values. Evaluating
either gives identical metrics.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from calib.annotations import boxes_outside
from calib.arrow import is_table, reading, record_batches, whole
from calib.arrow import numbers as numbers_of
from calib.documents import check_finite, integers, kind_of, numbers
from calib.errors import FormatError, InputError, ShapeError
from calib.files import read_json, require
from calib.lookup import positions

from .ground_truth import GroundTruth
from .masks import RunLengths, run_lengths, segmentations
from .select import Rows

LARGE_JSON = 1 << 25  # bytes
_JSON_TYPES = {
    "image_id": ("BIGINT",),
    "category_id": ("BIGINT",),
    "score": ("DOUBLE", "BIGINT"),
    "bbox": ("DOUBLE[]", "BIGINT[]"),
}
PARQUET_COLUMNS = ("image_id", "category_id", "score", "x1", "y1", "x2", "y2")


@dataclass(frozen=True)
class Detections:
    """N detections in file order, which decides between equal scores.

    Boxes are ``x, y, width, height`` in float64: the form in which LVIS computes areas and overlaps.
    """

    image_id: NDArray[np.int64]  # [N], dataset ids
    category_id: NDArray[np.int64]  # [N], dataset ids
    score: NDArray[np.float64]  # [N]
    box: NDArray[np.float64]  # [N, 4]
    source: str = "detections"  # named in errors
    segmentation: list[Any] | None = None  # [N], masks in any form, if they were asked for
    has_boxes: bool = True  # else the area of a detection is that of its mask
    rules_used: tuple[str, ...] = ()  # by which rules of its framework the file was read
    _checked: list[tuple[GroundTruth, list[RunLengths]]] = field(default_factory=list, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.score)

    @classmethod
    def read(cls, path: Path | str, *, masks: bool = False) -> "Detections":
        """Read a JSON list (.json, .json.gz) or a table of detections (Parquet, Arrow, Feather); its first bytes tell
        which.

        Raises:
            MissingFileError, FormatError, NonFiniteError: not there, not results, damaged, or NaN in a row.
        """
        path = Path(path)
        require(path, "results")
        if path.is_file():
            if is_table(path):
                if masks:
                    raise FormatError(f"{path}: detections in a table have no masks", hint="give a results json")
                return cls._read_table(path)
            large = path.stat().st_size > LARGE_JSON and not masks
            if large and (found := _read_columns(path)) is not None:
                image_id, category_id, score, box = found
                return cls.from_arrays(image_id, category_id, score, box, str(path), corners=False)
        return cls.from_document(read_json(path, "results"), str(path), masks=masks)

    @classmethod
    def from_document(cls, document: Any, source: str = "results", *, masks: bool = False) -> "Detections":
        """Build from a parsed list of ``{image_id, category_id, bbox, score}``, which is left as it is.

        With ``masks`` each has a ``segmentation``, and ``bbox`` may be missing from all.

        Raises:
            FormatError, NonFiniteError: as ``read``.
        """
        if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
            raise FormatError(
                f"{source}: expected a list of results, got {kind_of(document)}",
                hint="results are [{image_id, category_id, bbox: [x, y, w, h], score}, ...]",
            )
        # As the reference decides it: by the first row.
        has_boxes = not masks or not document or "bbox" in document[0]
        return cls(
            image_id=integers(document, "image_id", source),
            category_id=integers(document, "category_id", source),
            score=numbers(document, "score", source),
            box=numbers(document, "bbox", source, width=4) if has_boxes else np.zeros((len(document), 4)),
            source=source,
            segmentation=segmentations(document, source) if masks else None,
            has_boxes=has_boxes,
        )

    @classmethod
    def from_arrays(
        cls,
        image_id: NDArray[np.integer[Any]],
        category_id: NDArray[np.integer[Any]],
        score: NDArray[np.floating[Any]],
        box: NDArray[np.floating[Any]],
        source: str = "detections",
        *,
        corners: bool = True,
    ) -> "Detections":
        """Build from arrays; ``box`` [N, 4] is x1, y1, x2, y2 in pixels of the original image (``corners``), or x, y,
        width, height.

        Raises:
            ShapeError: unequal lengths.
            NonFiniteError: NaN or infinity in a score or a box.
        """
        n = len(score)
        if image_id.shape != (n,) or category_id.shape != (n,) or box.shape != (n, 4):
            raise ShapeError(
                f"{source}: expected image_id [N], category_id [N], score [N] and boxes [N, 4], got "
                f"{image_id.shape}, {category_id.shape}, {score.shape} and {box.shape}"
            )
        check_finite(score, "score", source)
        check_finite(box, "the box", source)
        sides: NDArray[np.float64] = box.astype(np.float64)  # a copy: the caller's boxes stay as they are
        if corners:
            sides[:, 2:] -= sides[:, :2]
        return cls(image_id.astype(np.int64), category_id.astype(np.int64), score.astype(np.float64), sides, source)

    @classmethod
    def _read_table(cls, path: Path) -> "Detections":
        with reading(path):
            table = pa.Table.from_batches(list(record_batches(path)))
        names = table.column_names
        wanted: tuple[str, ...] = PARQUET_COLUMNS
        if "bbox" in names and "x1" not in names:  # a results json as a table
            wanted = (*wanted[:3], "bbox")
        if missing := [name for name in wanted if name not in names]:
            raise FormatError(
                f"{path} has no column {', '.join(missing)}: expected {', '.join(PARQUET_COLUMNS)}",
                hint="detections are written by calib score; bbox (x, y, width, height) may stand for the corners",
            )
        if twice := [n for n in wanted if names.count(n) > 1]:
            raise FormatError(f"{path} has column {twice[0]} twice")
        column = {name: numbers_of(table.column(name), name, path) for name in wanted}
        for name in wanted[2:]:
            if column[name].dtype.kind not in "fiu":
                raise FormatError(f"{path}: column {name} holds {table.column(name).type}, expected numbers")
        image_id, category_id = (whole(column[n], n, path) for n in wanted[:2])
        is_bbox = "bbox" in wanted
        box = column["bbox"] if is_bbox else np.stack([column[n] for n in PARQUET_COLUMNS[3:]], axis=1)
        return cls.from_arrays(image_id, category_id, column["score"], box, str(path), corners=not is_bbox)

    def notices(self, truth: GroundTruth) -> tuple[str, ...]:
        """What is odd about these results though it is allowed: they count for nothing, or not as meant."""
        n = len(self)
        unknown = self.category_id[positions(truth.category_ids, self.category_id) < 0]
        empty = int(((self.box[:, 2:] <= 0).any(axis=1)).sum()) if self.has_boxes else 0
        outside = int(((self.score < 0) | (self.score > 1)).sum())
        notices = list(self.rules_used)
        if self.has_boxes and truth.image_size is not None:
            notices += boxes_outside(self.box, self.image_index(truth), truth.image_size, "boxes")
        if len(unknown):
            notices.append(
                f"{len(unknown)} of {n} results have a category that the ground truth does not list (id {unknown[0]}, "
                "for one): are category ids mapped rightly?"
            )
        if empty:
            notices.append(f"{empty} of {n} boxes have no area: bbox is x, y, width, height")
        if outside:
            notices.append(f"{outside} of {n} scores lie outside [0, 1]: logits?")
        return tuple(f"{self.source}: {text}" for text in notices)

    def rows(self, truth: GroundTruth) -> Rows:
        """Indices, scores and areas, in file order.

        Raises:
            InputError: an image that the ground truth does not have.
            FormatError: a malformed mask.
        """
        image, category = self.image_index(truth), positions(truth.category_ids, self.category_id)
        if self.has_boxes:
            with np.errstate(over="ignore"):
                area = self.box[:, 2] * self.box[:, 3]
        else:
            from pycocotools import mask as coco_mask

            area = np.asarray(coco_mask.area(self.masks(truth)), np.float64).reshape(-1)
        return Rows(image, category, self.score, area)

    def masks(self, truth: GroundTruth) -> list[RunLengths]:
        """The mask of every row, [N], also of those that count for nothing. They are checked once.

        Raises:
            InputError: an image that the ground truth does not have.
            FormatError: a malformed mask, or one of another size than its image.
        """
        assert self.segmentation is not None and truth.image_size is not None
        if not self._checked or self._checked[0][0] is not truth:
            sizes = truth.image_size[self.image_index(truth)].tolist()
            self._checked[:] = [(truth, run_lengths(self.segmentation, sizes, self.source))]
        return self._checked[0][1]

    def image_index(self, truth: GroundTruth) -> NDArray[np.int64]:
        """Index of each detection's image in ``truth.image_ids``, [N].

        Raises:
            InputError: an image that the ground truth does not have.
        """
        index = positions(truth.image_ids, self.image_id)
        if (index < 0).any():
            row = int(np.argmin(index))
            raise InputError(
                f"{self.source}[{row}]: image id {self.image_id[row]} is not in the ground truth "
                f"({int((index < 0).sum())} of {len(index)} results are for such images)",
                hint="results of another split?",
            )
        return index


def _read_columns(path: Path) -> tuple[NDArray[Any], ...] | None:
    """Columns of a large results list, read by DuckDB without a Python object per number; None if it cannot.

    The whole list as Python objects would take some 700 bytes a row. What DuckDB refuses is read the slow way, which
    finds and names the row that is wrong.
    """
    import duckdb

    try:
        with duckdb.connect(":memory:") as connection:
            # Types are those that every row has (sample_size -1); naming them would turn 1.5 into an id, and "1" too.
            rows = connection.read_json(str(path), format="array", sample_size=-1, maximum_object_size=1 << 20)
            types = dict(zip(rows.columns, map(str, rows.types), strict=True))
            if any(types.get(name) not in allowed for name, allowed in _JSON_TYPES.items()):
                return None
            table = rows.project(
                "image_id, category_id, score::DOUBLE AS score, bbox::DOUBLE[] AS bbox, len(bbox) = 4 AS fits"
            ).to_arrow_table()
    except duckdb.Error:
        return None
    if any(column.null_count for column in table.columns) or not table["fits"].to_numpy().all():
        return None
    box = table["bbox"].combine_chunks().flatten()
    if box.null_count:
        return None
    image_id, category_id, score = (table[name].to_numpy() for name in ("image_id", "category_id", "score"))
    return image_id, category_id, score, box.to_numpy().reshape(-1, 4)
