"""Parquet tables of a cache, read with their page checksums and held to their columns."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calib.cache.check import RESTORE
from calib.cache.schema import ANNOTATIONS_SCHEMA, LATER_ANNOTATION_COLUMNS
from calib.errors import FormatError
from calib.files import require


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """The columns of ``schema`` in the file ``path``.

    Raises:
        MissingFileError: not there. FormatError: damaged, or columns of another kind.
    """
    try:
        table = pq.read_table(require(path, "cache file"), columns=schema.names, page_checksum_verification=True)
    except (pa.ArrowException, OSError, KeyError) as e:
        raise FormatError(f"cache file {path} cannot be read: {e}", hint=RESTORE) from e
    if table.schema.types != schema.types:
        raise FormatError(
            f"cache file {path} has columns {table.schema.to_string(show_schema_metadata=False)!r}: expected "
            f"{schema.to_string()!r}",
            hint=RESTORE,
        )
    return table


def read_annotations(path: Path) -> pa.Table:
    """The columns of ANNOTATIONS_SCHEMA in the file ``path``, which an older calib may have written.

    Raises:
        MissingFileError, FormatError: as ``read_table``.
    """
    try:
        has = pq.read_schema(require(path, "ground truth of the cache")).names
    except (pa.ArrowException, OSError) as e:
        raise FormatError(f"cache file {path} cannot be read: {e}", hint=RESTORE) from e
    older = pa.schema([f for f in ANNOTATIONS_SCHEMA if f.name not in LATER_ANNOTATION_COLUMNS])
    is_older = not set(LATER_ANNOTATION_COLUMNS) & set(has)
    return completed(read_table(path, older if is_older else ANNOTATIONS_SCHEMA))


def completed(columns: Any) -> pa.Table:
    """A table of ANNOTATIONS_SCHEMA of ``columns``, arrays by name; those that older caches lack may be missing."""
    have = {
        name: np.asarray(columns[name]) for name in ANNOTATIONS_SCHEMA.names if name not in LATER_ANNOTATION_COLUMNS
    }
    names = columns.column_names if isinstance(columns, pa.Table) else columns
    have |= {
        "width": have["x2"] - have["x1"],
        "height": have["y2"] - have["y1"],
        "crowd": np.zeros(len(have["id"]), np.bool_),
    } | {name: np.asarray(columns[name]) for name in LATER_ANNOTATION_COLUMNS if name in names}
    return pa.table(have, schema=ANNOTATIONS_SCHEMA)
