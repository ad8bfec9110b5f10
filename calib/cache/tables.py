"""Parquet tables of a cache, read with their page checksums and held to their columns."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from calib.cache.check import RESTORE
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
