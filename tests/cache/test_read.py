"""Reading caches: damaged, missing, foreign and odd ones are refused by name; the rest reads alike for everyone."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from calib.cache import Cache
from calib.cache.check import check_files
from calib.cache.image_rows import ImageRows
from calib.cache.matrix import write_matrix
from calib.errors import CalibError, FormatError, InputError, MissingFileError, NonFiniteError, ShapeError, VersionError
from calib.layout import MANIFEST, VERIFIED

Write = Callable[..., Path]
FILES = [
    *("categories.parquet", "images.parquet", "annotations.parquet", "classifier.safetensors"),
    *(f"shards/{s}/{n}.parquet" for s in ("00000", "00001", "00002") for n in ("meta", "features", "logits")),
]


def edit_manifest(cache: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((cache / MANIFEST).read_text())
    change(data)
    (cache / MANIFEST).write_text(json.dumps(data))


def test_rows_come_back_by_range_and_by_number(write_cache: Write, rows_of: Callable[..., ImageRows]) -> None:
    cache = Cache(write_cache())
    parts = [rows_of(i, n) for i, n in ((1, 4), (3, 7), (4, 6), (5, 1), (6, 3))]
    x = np.concatenate([p.features for p in parts])
    assert cache.n_rows == 21 and cache.image_start.tolist() == [0, 4, 4, 11, 17, 18, 21]
    assert np.array_equal(cache.features.read(0, 21), x)
    assert np.array_equal(cache.features.read(9, 19), x[9:19])  # over three shards
    rows = np.asarray([20, 3, 4, 5, 10, 11, 12, 12, 0])
    assert np.array_equal(cache.features.take(rows), x[rows])
    assert cache.features.take(rows[:0]).shape == (0, 5) and cache.features.read(11, 11).shape == (0, 5)
    assert cache.logits is not None
    # Products of other numbers of rows may have other last bits.
    np.testing.assert_allclose(cache.logits.read(0, 21), cache.classifier.logits(x), rtol=1e-5, atol=1e-6)
    assert cache.labels.tolist() == np.concatenate([p.meta["label"] for p in parts]).tolist()
    assert cache.annotations()["category_id"].to_pylist() == [2]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_everyone_reads_every_table(write_cache: Write, dtype: str) -> None:
    path = write_cache(dtype=dtype)
    cache, connection = Cache(path), duckdb.connect()
    for name in FILES:
        if name.endswith(".parquet"):
            table = pq.read_table(path / name, page_checksum_verification=True)
            rows = connection.execute(f"SELECT * FROM '{path / name}'").fetchall()
            assert [tuple(r.values()) for r in table.to_pylist()] == rows, name
    for what in ("features", "logits"):
        raw = b"".join(
            b"".join(pq.read_table(p)[what].to_pylist()) for p in sorted(path.glob(f"shards/*/{what}.parquet"))
        )
        matrix = getattr(cache, what)
        assert np.array_equal(matrix.read(0, 21), np.frombuffer(raw, dtype).reshape(21, -1).astype(np.float32))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(write_cache: Write, name: str) -> None:
    path = write_cache()
    (path / name).unlink()
    with pytest.raises(MissingFileError, match=name) as e:
        Cache(path)
    assert "extract" in e.value.hint


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(write_cache: Write, name: str) -> None:
    path = write_cache()
    content = (path / name).read_bytes()
    for kept in (0, 1, len(content) // 2, len(content) - 1):
        (path / name).write_bytes(content[:kept])
        with pytest.raises(FormatError, match=f"{name} has {kept} bytes, {len(content)} were written") as e:
            Cache(path)
        assert "extract" in e.value.hint


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found(write_cache: Write, name: str) -> None:
    path = write_cache()
    content = bytearray((path / name).read_bytes())
    for at in (0, len(content) // 3, len(content) - 1):
        content[at] ^= 4
        (path / name).write_bytes(content)
        with pytest.raises(FormatError, match=f"the content of .*{name} is not what was written"):
            Cache(path)
        content[at] ^= 4
    (path / name).write_bytes(content)
    assert Cache(path).n_rows == 21


def test_damage_after_the_first_opening_is_found(write_cache: Write) -> None:
    """What was verified is not hashed again until it changes: size and time of a file are its stamp."""
    path = write_cache()
    Cache(path)
    assert len(json.loads((path / VERIFIED).read_text())) == len(FILES)
    file = path / "shards/00001/features.parquet"
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)
    with pytest.raises(FormatError, match="00001/features"):
        Cache(path)


def test_hashing_again_can_be_asked_for(write_cache: Write) -> None:
    import os

    path = write_cache()
    Cache(path)
    file = path / "shards/00001/features.parquet"
    status, content = file.stat(), bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk that rots would leave it
    cache = Cache(path)
    with pytest.raises(FormatError, match="00001/features"):
        check_files(path, cache.manifest, again=True)


def test_a_note_of_what_was_verified_that_is_damaged_is_not_believed(write_cache: Write) -> None:
    path = write_cache()
    for text in ("{", "[]", '{"images.parquet": 3}'):
        (path / VERIFIED).write_text(text)
        assert Cache(path).n_rows == 21


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.update(version=3), VersionError, "format version 3; this calib reads versions 1 and 2"),
        (lambda m: m.pop("version"), VersionError, "format version None"),
        (lambda m: m.update(format="other"), FormatError, "is not a calib feature cache"),
        (lambda m: m.update(complete=False), InputError, "is not complete: writing stopped after 3 shards"),
        (lambda m: m.pop("detector"), FormatError, "damaged: KeyError"),
        (lambda m: m.pop("mode"), FormatError, "damaged: TypeError"),
        (lambda m: m.update(detector=3), FormatError, "damaged: TypeError"),
        (lambda m: m.update(shards=[{"name": "00000"}]), FormatError, "damaged: TypeError"),
        (lambda m: m.update(dtype="float64"), FormatError, "dtype is 'float64'"),
        (lambda m: m["detector"].update(num_classes="three"), FormatError, "damaged"),
        (lambda m: m["detector"].update(num_classes=4), ShapeError, r"classifier \[5, 5\], the files hold \[4, 5\]"),
        (lambda m: m["detector"].update(digest="0"), FormatError, "is not the one the cache was written with"),
        (lambda m: m["shards"][1].update(rows=5), ShapeError, "places 21 rows; the manifest lists 20"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    write_cache: Write, change: Callable[[dict[str, Any]], object], error: type[CalibError], message: str
) -> None:
    path = write_cache()
    edit_manifest(path, change)
    with pytest.raises(error, match=message) as e:
        Cache(path)
    assert str(path) in str(e.value)


def test_a_manifest_that_is_no_json_is_refused(write_cache: Write, tmp_path: Path) -> None:
    path = write_cache()
    text = (path / MANIFEST).read_text()
    for content in ("", text[: len(text) // 2], "[1, 2]", "\x00\x01"):
        (path / MANIFEST).write_text(content)
        with pytest.raises(FormatError, match=r"manifest\.json"):
            Cache(path)
    with pytest.raises(MissingFileError, match="no feature cache at") as e:
        Cache(tmp_path / "absent")
    assert "calib extract" in e.value.hint


@pytest.mark.parametrize("what", ["features", "logits"])
@pytest.mark.parametrize("shape", [(6, 9), (5, 5), (7, 4), (0, 5)])
def test_a_matrix_of_another_shape_is_refused(
    write_cache: Write, sign: Callable[[Path], None], what: str, shape: tuple[int, int]
) -> None:
    path = write_cache()
    write_matrix(path / f"shards/00001/{what}.parquet", what, np.zeros(shape, np.float32))
    sign(path)
    cache = Cache(path)
    expected = {"features": r"\[6, 5\]", "logits": r"\[6, 4\]"}[what]
    with pytest.raises(ShapeError, match=rf"00001/{what}\.parquet has shape .*: the manifest says {expected}"):
        getattr(cache, what)


def test_tables_of_another_kind_are_refused(write_cache: Write, sign: Callable[[Path], None]) -> None:
    path = write_cache()
    meta = path / "shards/00001/meta.parquet"
    table = pq.read_table(meta)
    pq.write_table(table.slice(1), meta)
    sign(path)
    with pytest.raises(ShapeError, match="has 20 rows in all; the manifest lists 21"):
        Cache(path).meta("label")
    pq.write_table(table.drop(["label"]), meta)
    sign(path)
    with pytest.raises(FormatError, match=r"00001/meta\.parquet cannot be read"):
        Cache(path).meta("label")
    pq.write_table(table.set_column(table.column_names.index("label"), "label", [["x"] * 6]), meta)
    sign(path)
    with pytest.raises(FormatError, match=r"00001/meta\.parquet has columns"):
        Cache(path).meta("label")
    shutil.copy(path / "annotations.parquet", path / "categories.parquet")
    sign(path)
    with pytest.raises(FormatError, match=r"categories\.parquet cannot be read"):
        Cache(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("what", ["features", "logits"])
def test_numbers_that_are_not_finite_are_refused(
    write_cache: Write, sign: Callable[[Path], None], what: str, value: float
) -> None:
    path = write_cache()
    matrix = np.zeros((6, {"features": 5, "logits": 4}[what]), np.float32)
    matrix[4, 2] = value
    write_matrix(path / f"shards/00001/{what}.parquet", what, matrix)
    sign(path)
    rows = getattr(Cache(path), what)
    assert rows.read(0, 15).shape[0] == 15  # the four rows before it are sound
    with pytest.raises(NonFiniteError, match=rf"cache {path} holds NaN or infinite numbers in {what}\.parquet"):
        rows.read(12, 16)
    with pytest.raises(NonFiniteError):
        rows.take(np.asarray([0, 15]))


def test_a_large_sum_is_not_taken_for_infinity(write_cache: Write, rows_of: Callable[..., ImageRows]) -> None:
    image = rows_of(1, 3)
    huge = replace(image, features=np.full((3, 5), 3e38, np.float32))
    cache = Cache(write_cache(shards={"00000": [huge]}))
    assert np.array_equal(cache.features.read(0, 3), huge.features)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_no_rows(write_cache: Write, dtype: str) -> None:
    cache = Cache(write_cache(shards={"00000": [(1, 0), (2, 0)], "00001": [(3, 0)]}, dtype=dtype))
    assert cache.n_rows == 0 and cache.image_start.tolist() == [0, 0, 0, 0]
    assert cache.features.read(0, 0).shape == (0, 5) and cache.labels.shape == (0,)
    assert cache.logits is not None and cache.logits.dtype == dtype


def test_logits_only_where_they_are_kept(write_cache: Write) -> None:
    probe, none = (Cache(write_cache(kind, logits=kind)) for kind in ("probe", "none"))
    assert probe.logits is None and none.logits is None
    assert not list(none.path.glob("shards/*/logits.parquet"))
    assert pq.read_table(probe.path / "shards/00000/logits.parquet").num_rows == 11
    assert np.array_equal(probe.features.read(0, 21), none.features.read(0, 21))


def test_equal_content_has_an_equal_digest(write_cache: Write) -> None:
    first, again = Cache(write_cache("a")), Cache(write_cache("b"))
    other = Cache(write_cache("c", shards={"00000": [(1, 4)], "00001": [(4, 6)]}))
    assert first.digest == again.digest != other.digest


def test_a_cache_that_may_not_be_written_is_read(write_cache: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note of what was verified cannot be kept: everything is hashed at every opening."""
    from calib.cache import check

    path = write_cache()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Read-only file system")

    monkeypatch.setattr(check, "write_json", refuse)
    for _ in range(2):
        assert np.isfinite(Cache(path).features.read(0, 21)).all()
    assert not (path / VERIFIED).exists()


def test_a_folder_without_write_permission_is_read(write_cache: Write) -> None:
    path = write_cache()
    folders = [path, *(p for p in path.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert Cache(path).features.read(0, 21).shape == (21, 5)
    finally:
        for folder in folders:
            folder.chmod(0o755)
