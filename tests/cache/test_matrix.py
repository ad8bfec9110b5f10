"""The mapped Parquet matrix: any reader reads it, and ours reads what others rewrote."""

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.cache.matrix import ROWS_PER_GROUP, MatrixFile, write_blocks, write_matrix
from calib.cache.rows import RowMatrix
from calib.errors import FormatError, MissingFileError, ShapeError

DTYPES = ("float16", "float32")


def rows(n: int, width: int, dtype: str, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(dtype)


def whole(file: MatrixFile) -> Any:
    out = np.empty(file.shape, file.dtype)
    file.read(0, file.shape[0], out)
    return out


def is_mapped(file: MatrixFile) -> bool:
    """Whether the rows are views of the file and not copies that pyarrow made."""
    return np.shares_memory(file._blocks[0], file.mapped)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, ROWS_PER_GROUP, 2 * ROWS_PER_GROUP + 5])
def test_what_is_written_is_mapped_bit_for_bit(tmp_path: Path, n: int, dtype: str) -> None:
    x = rows(n, 6, dtype)
    write_matrix(tmp_path / "m.parquet", "features", x)
    file = MatrixFile(tmp_path / "m.parquet")
    assert is_mapped(file) and file.shape == (n, 6) and file.dtype == dtype
    assert np.array_equal(whole(file), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pyarrow_and_duckdb_read_the_same_bytes(tmp_path: Path, dtype: str) -> None:
    x, path = rows(ROWS_PER_GROUP + 3, 6, dtype), tmp_path / "m.parquet"
    write_matrix(path, "features", x)
    raw = [r.tobytes() for r in x]
    assert pq.read_table(path, page_checksum_verification=True)["features"].to_pylist() == raw
    connection = duckdb.connect()
    assert [r[0] for r in connection.execute(f"SELECT features FROM '{path}'").fetchall()] == raw


def test_odd_bits_survive(tmp_path: Path) -> None:
    """Zeros of both signs, the smallest and the largest numbers, and a NaN's own bits."""
    x = np.frombuffer(np.arange(2**16, dtype=np.uint16).tobytes(), np.float16).reshape(-1, 64)
    write_matrix(tmp_path / "m.parquet", "features", x)
    assert whole(MatrixFile(tmp_path / "m.parquet")).tobytes() == x.tobytes()


def test_no_rows(tmp_path: Path) -> None:
    write_matrix(tmp_path / "m.parquet", "features", rows(0, 6, "float16"))
    file = MatrixFile(tmp_path / "m.parquet")
    assert file.shape == (0, 6) and whole(file).shape == (0, 6)


@pytest.fixture(scope="module")
def ranged(tmp_path_factory: pytest.TempPathFactory) -> tuple[MatrixFile, Any]:
    x = rows(2 * ROWS_PER_GROUP + 10, 2, "float16")
    path = tmp_path_factory.mktemp("ranged") / "m.parquet"
    write_matrix(path, "features", x)
    return MatrixFile(path), x


@given(ends=st.tuples(*[st.integers(0, 2 * ROWS_PER_GROUP + 10)] * 2))
def test_any_range_over_row_groups(ranged: tuple[MatrixFile, Any], ends: tuple[int, int]) -> None:
    file, x = ranged
    start, stop = sorted(ends)
    out = np.empty((stop - start, 2), np.float32)
    file.read(start, stop, out)
    assert np.array_equal(out, x[start:stop].astype(np.float32))


@pytest.mark.parametrize("bounds", [(-1, 2), (0, 8203), (3, 2)])
def test_a_range_outside_the_file_is_refused(ranged: tuple[MatrixFile, Any], bounds: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match=f"rows {bounds[0]}:{bounds[1]} asked of"):
        ranged[0].read(*bounds, np.empty((max(bounds[1] - bounds[0], 0), 2), np.float16))


REWRITTEN: list[dict[str, Any]] = [
    {"compression": "zstd"},
    {"compression": "none", "use_dictionary": True},
    {"compression": "none", "use_dictionary": False, "data_page_size": 64, "max_rows_per_page": 10},
    {"compression": "snappy", "row_group_size": 33},
]


@pytest.mark.parametrize("options", REWRITTEN, ids=str)
def test_a_rewritten_file_reads_the_same_through_pyarrow(tmp_path: Path, options: dict[str, Any]) -> None:
    x, path = np.tile(rows(50, 6, "float16"), (100, 1)), tmp_path / "m.parquet"
    write_matrix(path, "features", x)
    table = pq.read_table(path)
    pq.write_table(table, path, **options)
    file = MatrixFile(path)
    assert not is_mapped(file)
    assert np.array_equal(whole(file), x)


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    with pytest.raises(MissingFileError, match=r"m\.parquet"):
        MatrixFile(path)
    path.write_bytes(b"PAR1 is how it begins")
    with pytest.raises(FormatError, match=r"m\.parquet is not a readable Parquet file"):
        MatrixFile(path)
    pq.write_table(pa.table({"features": [1.0, 2.0]}), path)
    with pytest.raises(FormatError, match=r"m\.parquet has no matrix column"):
        MatrixFile(path)


@pytest.mark.parametrize("kept", [0, 3, 200, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "m.parquet"
    write_matrix(path, "features", rows(500, 6, "float16"))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content) if isinstance(kept, float) else kept)])
    with pytest.raises(FormatError, match=r"m\.parquet"):
        MatrixFile(path)


@pytest.mark.parametrize("rewritten", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_anywhere_in_several_files(tmp_path: Path, dtype: str, rewritten: bool) -> None:
    """Files of one and of several blocks and an empty one; blocks begin at odd places; one file is not mapped."""
    parts = [rows(n, 3, dtype, seed) for seed, n in enumerate((5, 0, 2 * ROWS_PER_GROUP + 1, 1, ROWS_PER_GROUP))]
    files = []
    for k, part in enumerate(parts):
        path = tmp_path / "shards" / str(k) / "m.parquet"
        path.parent.mkdir(parents=True)
        write_matrix(path, "m", part)
        if rewritten and k == 2:
            pq.write_table(pq.read_table(path), path, compression="zstd")
        files.append(MatrixFile(path))
    x, matrix = np.concatenate(parts), RowMatrix(files, 3)
    rng = np.random.default_rng(0)
    for chosen in (rng.integers(0, len(x), 300), rng.permutation(len(x)), np.asarray([len(x) - 1, 0, 4, 5, 5])):
        assert matrix.stored(chosen).tobytes() == x[chosen].tobytes()
        assert np.array_equal(matrix.take(chosen), x[chosen].astype(np.float32))
        assert np.array_equal(matrix.take(np.sort(chosen)), x[np.sort(chosen)].astype(np.float32))
    assert np.array_equal(matrix.read(3, len(x) - 2), x[3:-2].astype(np.float32))
    for wrong in (-1, len(x)):
        with pytest.raises(ShapeError, match=f"asked of a matrix of {len(x)} rows"):
            matrix.take(np.asarray([0, wrong]))


def test_a_matrix_written_in_blocks_is_the_same_file(tmp_path: Path) -> None:
    x = rows(2 * ROWS_PER_GROUP + 5, 6, "float16")
    write_matrix(tmp_path / "whole.parquet", "features", x)
    blocks = (x[i : i + ROWS_PER_GROUP].copy() for i in range(0, len(x), ROWS_PER_GROUP))
    write_blocks(tmp_path / "blocks.parquet", "features", x.dtype, 6, blocks)
    assert (tmp_path / "blocks.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_readers_without_calib_get_numpy_arrays(tmp_path: Path) -> None:
    """As the README shows it: pyarrow's buffer, DuckDB's BLOB."""
    x, path = rows(ROWS_PER_GROUP + 3, 6, "float16"), tmp_path / "m.parquet"
    write_matrix(path, "features", x)
    column = pq.read_table(path)["features"].combine_chunks()
    assert np.array_equal(np.frombuffer(column.buffers()[1], np.float16).reshape(-1, 6), x)
    blobs = duckdb.sql(f"SELECT features FROM '{path}'").fetchnumpy()["features"]
    assert np.array_equal(np.frombuffer(b"".join(blobs), np.float16).reshape(-1, 6), x)
