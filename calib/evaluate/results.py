"""What a detector found: results of LVIS/COCO json lists and of detections Parquet files as frozen arrays.

Both kinds of file hold the same numbers: Parquet has float32 corners and scores, and its twin in JSON has
``bbox = [x1, y1, x2 - x1, y2 - y1]`` and ``score`` computed in float64 from those float32 values. Evaluating
either gives identical figures.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.documents import check_finite, integers, numbers
from calib.errors import FormatError, InputError, ShapeError
from calib.files import read_json, require

from .ground_truth import GroundTruth, positions

PARQUET_MAGIC = b"PAR1"
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

    def __len__(self) -> int:
        return len(self.score)

    @classmethod
    def read(cls, path: Path | str) -> "Detections":
        """Read a JSON list (.json, .json.gz) or a detections Parquet file; its first bytes tell which.

        Raises:
            MissingFileError, FormatError, NonFiniteError: not there, not results, damaged, or NaN in a row.
        """
        path = Path(path)
        require(path, "results")
        if path.is_file():
            with open(path, "rb") as f:
                if f.read(4) == PARQUET_MAGIC:
                    return cls._read_parquet(path)
        return cls.from_document(read_json(path, "results"), str(path))

    @classmethod
    def from_document(cls, document: Any, source: str = "results") -> "Detections":
        """Build from a parsed list of ``{image_id, category_id, bbox, score}``, which is left as it is.

        Raises:
            FormatError, NonFiniteError: as ``read``.
        """
        if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
            raise FormatError(
                f"{source}: expected a list of results, got {type(document).__name__}",
                hint="results are [{image_id, category_id, bbox: [x, y, w, h], score}, ...]",
            )
        return cls(
            image_id=integers(document, "image_id", source),
            category_id=integers(document, "category_id", source),
            score=numbers(document, "score", source),
            box=numbers(document, "bbox", source, width=4),
            source=source,
        )

    @classmethod
    def from_arrays(
        cls,
        image_id: NDArray[np.integer[Any]],
        category_id: NDArray[np.integer[Any]],
        score: NDArray[np.floating[Any]],
        corners: NDArray[np.floating[Any]],
        source: str = "detections",
    ) -> "Detections":
        """Build from arrays; ``corners`` [N, 4] are x1, y1, x2, y2 in pixels of the original image.

        Raises:
            ShapeError: unequal lengths.
            NonFiniteError: NaN or infinity in a score or a box.
        """
        n = len(score)
        if image_id.shape != (n,) or category_id.shape != (n,) or corners.shape != (n, 4):
            raise ShapeError(
                f"{source}: expected image_id [N], category_id [N], score [N] and boxes [N, 4], got "
                f"{image_id.shape}, {category_id.shape}, {score.shape} and {corners.shape}"
            )
        check_finite(score, "score", source)
        check_finite(corners, "the box", source)
        box = corners.astype(np.float64)  # a copy: the caller's corners stay as they are
        box[:, 2:] -= box[:, :2]
        return cls(image_id.astype(np.int64), category_id.astype(np.int64), score.astype(np.float64), box, source)

    @classmethod
    def _read_parquet(cls, path: Path) -> "Detections":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                missing = [name for name in PARQUET_COLUMNS if name not in file.schema_arrow.names]
                if missing:
                    raise FormatError(
                        f"{path} has no column {', '.join(missing)}: expected {', '.join(PARQUET_COLUMNS)}",
                        hint="detections are written by calib score",
                    )
                table = file.read(columns=list(PARQUET_COLUMNS))
        except (pa.ArrowException, OSError) as e:
            raise FormatError(f"{path} is a damaged Parquet file: {e}", hint="write it again") from e
        column = {name: _plain(table.column(name), name, path) for name in PARQUET_COLUMNS}
        corners = np.stack([column[name] for name in ("x1", "y1", "x2", "y2")], axis=1)
        return cls.from_arrays(column["image_id"], column["category_id"], column["score"], corners, str(path))

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


def _plain(column: Any, name: str, path: Path) -> Any:
    """A Parquet column as a numpy array of numbers."""
    import pyarrow.types as types

    is_id = name.endswith("_id")
    if column.null_count or not (types.is_integer(column.type) or (types.is_floating(column.type) and not is_id)):
        expected = "whole numbers" if is_id else "numbers"
        raise FormatError(
            f"{path}: column {name} must hold {expected} without nulls, got {column.type} with "
            f"{column.null_count} nulls"
        )
    return column.to_numpy()
