"""The meta table of a shard, which also carries the shard's images, so that images.parquet can be made again."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from calib.cache.schema import IMAGES_SCHEMA, META_SCHEMA

IMAGES_KEY = b"calib.images"  # in the schema's metadata: rows of images.parquet, as JSON


def write_meta(path: Path, meta: pa.Table, images: pa.Table) -> None:
    """Write ``meta`` (columns of META_SCHEMA) with ``images``, the rows of IMAGES_SCHEMA that it belongs to."""
    records = images.drop(["shard", "row_start"]).to_pylist()
    table = meta.select(META_SCHEMA.names).cast(META_SCHEMA).replace_schema_metadata({IMAGES_KEY: json.dumps(records)})
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def images_of_meta(path: Path) -> pa.Table | None:
    """The images that a meta table carries; None where an older calib wrote it without them."""
    content = (pq.read_schema(path).metadata or {}).get(IMAGES_KEY)
    if content is None:
        return None
    records = [r | {"shard": "", "row_start": 0} for r in json.loads(content)]
    return pa.Table.from_pylist(records, schema=IMAGES_SCHEMA)


def placed(images: pa.Table, shard: str) -> pa.Table:
    """``images`` as the images of ``shard``, their rows one after the other."""
    counts = images["n_rows"].to_numpy()
    columns = {n: images[n] for n in IMAGES_SCHEMA.names}
    columns |= {
        "shard": pa.array([shard] * len(images), pa.string()),
        "row_start": pa.array(np.cumsum(counts) - counts),
    }
    return pa.table(columns, schema=IMAGES_SCHEMA)
