"""Caches made of caches: the same rows in other shards, some of them, all of several, compressed and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from calib.cache import Cache
from calib.cache.archive import archive, unpack
from calib.cache.damage import find_damage
from calib.cache.merge import merge
from calib.cache.repair import repair
from calib.cache.rewrite import compact, sample
from calib.cache.schema import META_SCHEMA, Manifest
from calib.cache.write import CacheWriter
from calib.errors import CalibError, ExistsError, FormatError, InputError, SettingError

from ..toy import Toy

Write = Callable[..., Path]
Content = Callable[[Path], dict[str, bytes]]


def same_rows(one: Cache, other: Cache) -> None:
    """Every column of every row, in order, bit for bit."""
    everything = np.arange(one.n_rows)
    assert np.array_equal(one.image_start, other.image_start)
    assert one.meta_of(everything).equals(other.meta_of(everything))
    for name in ("features", "logits", "maps"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.stored(everything).tobytes() == b.stored(everything).tobytes()
    kept = [c for c in one.images.column_names if c not in ("shard", "row_start")]
    assert one.images.select(kept).equals(other.images.select(kept))
    assert one.annotations().equals(other.annotations())
    assert one.classifier.digest() == other.classifier.digest() and one.categories.name == other.categories.name


# ---- compact


@pytest.mark.parametrize("size", [1, 5, 8, 21, 1000])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_compacting_keeps_every_row(write_cache: Write, tmp_path: Path, size: int, dtype: str) -> None:
    cache = Cache(write_cache(dtype=dtype))
    compact(cache.path, tmp_path / "out", rows_per_shard=size)
    out = Cache(tmp_path / "out")
    same_rows(cache, out)
    assert find_damage(out.path).damages == ()
    rows = [s.rows for s in out.manifest.shards]
    assert len(rows) <= max(1, -(-21 // size)) and max(rows) < size + 7  # the largest image has 7 rows


def test_shards_are_of_even_size(tmp_path: Path) -> None:
    cache = Toy(images=40, most=30).write(tmp_path / "toy")
    compact(cache.path, tmp_path / "out", rows_per_shard=40)
    rows = [s.rows for s in Manifest.read(tmp_path / "out").shards]
    largest = int(np.diff(cache.image_start).max())
    assert len(rows) == -(-cache.n_rows // 40) and max(rows) - min(rows) <= 2 * largest
    compact(tmp_path / "out", tmp_path / "back", rows_per_shard=10**6)
    same_rows(cache, Cache(tmp_path / "back"))


def test_roi_maps_and_sigmoid_detectors_come_along(tmp_path: Path) -> None:
    for name, toy in {"maps": Toy(maps=True), "sigmoid": Toy(activation="sigmoid")}.items():
        cache = toy.write(tmp_path / name)
        compact(cache.path, tmp_path / f"{name}-out", rows_per_shard=11)
        same_rows(cache, Cache(tmp_path / f"{name}-out"))


def test_caches_without_rows_or_logits(write_cache: Write, tmp_path: Path) -> None:
    empty = write_cache("empty", shards={"00000": [(1, 0), (2, 0)], "00001": [(3, 0)]})
    compact(empty, tmp_path / "a")
    assert Cache(tmp_path / "a").images["image_id"].to_pylist() == [1, 2, 3]
    for kind in ("probe", "none"):  # probes are the first rows of a shard, which are others now
        compact(write_cache(kind, logits=kind), tmp_path / f"{kind}-out", rows_per_shard=9)
        assert Cache(tmp_path / f"{kind}-out").manifest.logits == "none"


def test_done_again_it_is_done_and_other_settings_are_refused(
    write_cache: Write, tmp_path: Path, content: Content
) -> None:
    path, out = write_cache(), tmp_path / "out"
    first = compact(path, out, rows_per_shard=8)
    before = content(out)
    assert compact(path, out, rows_per_shard=8) == first and content(out) == before
    with pytest.raises(InputError, match=r"begun with other settings \(compact\)"):
        compact(path, out, rows_per_shard=9)
    with pytest.raises(InputError, match=r"begun with other settings \(compact, of, "):
        compact(path, path)
    with pytest.raises(SettingError, match="rows_per_shard is 0"):
        compact(path, tmp_path / "other", rows_per_shard=0)
    assert content(out) == before


def test_repaired_it_is_compacted_where_it_was_hurt(write_cache: Write, tmp_path: Path) -> None:
    path, out = write_cache(), tmp_path / "out"
    digest = compact(path, out, rows_per_shard=8).digest
    (out / "shards/00001/features.parquet").write_bytes(b"x")
    assert repair(out).shards == ("00001",)
    assert compact(path, out, rows_per_shard=8).digest == digest
    same_rows(Cache(path), Cache(out))


def test_a_second_writer_is_refused(
    write_cache: Write, tmp_path: Path, begin: Callable[..., CacheWriter], resume: Callable[..., CacheWriter]
) -> None:
    path = write_cache()
    with begin(tmp_path / "out"):
        for remake in (compact, archive):
            with pytest.raises(ExistsError, match="another process is writing the cache"):
                remake(path, tmp_path / "out")


# ---- sample


def test_a_sample_is_of_whole_images(write_cache: Write, tmp_path: Path) -> None:
    cache = Cache(write_cache(shards={f"{k:05d}": [(5 * k + i, i) for i in range(1, 6)] for k in range(4)}))
    outs = [
        Cache(p)
        for p in (tmp_path / "a", tmp_path / "b", tmp_path / "c")
        if sample(cache.path, p, images=7, seed=p.name == "c")
    ]
    assert outs[0].digest == outs[1].digest != outs[2].digest
    ids = cache.images["image_id"].to_pylist()
    for out in outs:
        chosen = out.images["image_id"].to_pylist()
        assert len(set(chosen)) == 7 and chosen == [i for i in ids if i in chosen]
        rows = np.concatenate([np.arange(*cache.image_start[k : k + 2]) for k in map(ids.index, chosen)])
        assert np.array_equal(out.features.read(0, out.n_rows), cache.features.take(rows))
        assert out.meta_of(np.arange(out.n_rows)).equals(cache.meta_of(rows))
        assert set(out.annotations()["image_id"].to_pylist()) <= set(chosen)


def test_no_more_images_than_there_are(write_cache: Write, tmp_path: Path) -> None:
    path = write_cache()
    sample(path, tmp_path / "all", images=6)
    same_rows(Cache(path), Cache(tmp_path / "all"))
    with pytest.raises(InputError, match="has 6 images, 7 were asked for"):
        sample(path, tmp_path / "more", images=7)
    for wrong in ({"images": 0}, {"images": 1, "seed": -1}):
        with pytest.raises(SettingError):
            sample(path, tmp_path / "more", **wrong)
    assert not (tmp_path / "more").exists()


# ---- merge

OTHERS = {"00000": [(11, 2)], "00001": [(12, 0), (13, 5)]}


def test_merged_caches_are_one_after_the_other(write_cache: Write, tmp_path: Path) -> None:
    one, other = Cache(write_cache("one")), Cache(write_cache("other", shards=OTHERS))
    merge([one.path, other.path], tmp_path / "out")
    out = Cache(tmp_path / "out")
    assert out.images["image_id"].to_pylist() == [1, 2, 3, 4, 5, 6, 11, 12, 13]
    expected = np.concatenate([c.features.read(0, c.n_rows) for c in (one, other)])
    assert np.array_equal(out.features.read(0, out.n_rows), expected)
    assert out.annotations().equals(one.annotations())  # both brought the whole ground truth
    assert find_damage(out.path).damages == ()
    ours, theirs = out.path / "shards/00003/features.parquet", other.path / "shards/00000/features.parquet"
    assert ours.samefile(theirs)  # not a copy
    (out.path / "images.parquet").unlink()
    assert repair(out.path).rows_left == 28  # although the shards have other names there
    merge([one.path, other.path], out.path)
    assert Cache(out.path).images.equals(out.images)


def test_where_there_are_no_hard_links_files_are_copied(
    write_cache: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    paths = [write_cache("one"), write_cache("other", shards=OTHERS)]
    merge(paths, tmp_path / "out")
    assert Cache(tmp_path / "out").n_rows == 28
    assert not (tmp_path / "out/shards/00000/meta.parquet").samefile(paths[0] / "shards/00000/meta.parquet")


def test_caches_that_do_not_go_together_are_refused_with_the_reason(write_cache: Write, tmp_path: Path) -> None:
    one = write_cache("one")
    for name, changes, said in (
        ("a", {"dtype": "float16"}, "differ in dtype 'float32' and 'float16'"),
        ("b", {"mode": "train"}, "differ in mode 'test' and 'train'"),
        ("c", {"logits": "none"}, "differ in logits 'full' and 'none'"),
    ):
        with pytest.raises(InputError, match=said):
            merge([one, write_cache(name, shards=OTHERS, **changes)], tmp_path / "out")
    with pytest.raises(InputError, match=r"image 4 is in .*one and in .*twice \(1 images"):
        merge([one, write_cache("twice", shards={"00000": [(4, 2)]})], tmp_path / "out")
    toys = [Toy(seed=s).write(tmp_path / f"toy{s}").path for s in (0, 1)]
    with pytest.raises(InputError, match=r"differ in detector digest .* classifier"):
        merge(toys, tmp_path / "out")
    with pytest.raises(InputError, match=r"differ in .*detector source"):
        merge([one, toys[0]], tmp_path / "out")
    with pytest.raises(InputError, match="one cache alone"):
        merge([one], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_annotation_ids_that_mean_two_objects_are_refused(
    write_cache: Write, sign: Callable[[Path], None], tmp_path: Path
) -> None:
    one, other = write_cache("one"), write_cache("other", shards=OTHERS)
    table = pq.read_table(other / "annotations.parquet")
    moved = table.set_column(1, table.schema.field(1), [[11]])
    pq.write_table(moved, other / "annotations.parquet")
    sign(other)
    with pytest.raises(InputError, match="annotation id 1 means different objects"):
        merge([one, other], tmp_path / "out")
    (other / "annotations.parquet").unlink()
    sign_without(other)
    with pytest.raises(InputError, match="other has no ground truth"):
        merge([one, other], tmp_path / "out")


def sign_without(cache: Path) -> None:
    import json

    data = json.loads((cache / "manifest.json").read_text())
    del data["tables"]["annotations.parquet"]
    (cache / "manifest.json").write_text(json.dumps(data))


# ---- archive


@pytest.fixture
def large(tmp_path: Path, write_cache: Write, rows_of: Callable[..., Any]) -> Path:
    """Two row groups, half of the features 0, and a shard without rows."""
    wide = [rows_of(k, 1500) for k in range(1, 4)]
    for image in wide:
        np.maximum(image.features, 0, out=image.features)
    return write_cache("large", shards={"00000": wide, "00001": [(9, 0)]}, dtype="float16")


def test_unpacked_it_is_the_same_files(large: Path, tmp_path: Path, content: Content) -> None:
    digest = Cache(large).digest
    archived = archive(large, tmp_path / "archive")
    assert archived.layout == "archive" and archived.digest != digest
    assert find_damage(tmp_path / "archive").damages == ()
    size = [sum(len(v) for k, v in content(p).items() if "features" in k) for p in (large, tmp_path / "archive")]
    assert size[1] < 0.8 * size[0]
    unpack(tmp_path / "archive", tmp_path / "back")
    assert Cache(tmp_path / "back").digest == digest
    ours, theirs = ({k: v for k, v in content(p).items() if k != ".verified.json"} for p in (tmp_path / "back", large))
    assert ours == theirs


def test_everyone_reads_an_archive(large: Path, tmp_path: Path) -> None:
    archive(large, tmp_path / "archive")
    file = tmp_path / "archive/shards/00000/features.parquet"
    x = Cache(large).features.stored(np.arange(4500)).tobytes()
    assert b"".join(pq.read_table(file)["features"].to_pylist()) == x
    assert b"".join(r[0] for r in duckdb.connect().execute(f"SELECT features FROM '{file}'").fetchall()) == x
    meta = pq.read_table(tmp_path / "archive/shards/00000/meta.parquet")
    assert meta.schema.types == META_SCHEMA.types


def test_an_archive_says_what_to_do(large: Path, tmp_path: Path) -> None:
    archive(large, tmp_path / "archive")
    with pytest.raises(InputError, match="is an archive") as e:
        Cache(tmp_path / "archive")
    assert f"calib cache unpack {tmp_path / 'archive'} --out" in e.value.hint
    with pytest.raises(InputError, match="is an archive already"):
        archive(tmp_path / "archive", tmp_path / "twice")
    with pytest.raises(InputError, match="is no archive"):
        unpack(large, tmp_path / "back")
    for remake in (compact, lambda p, o: sample(p, o, images=1), lambda p, o: merge([p, p], o)):
        with pytest.raises(InputError, match="is an archive"):
            remake(tmp_path / "archive", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "twice").exists()


def test_a_damaged_archive_is_found_and_archived_again(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "archive"
    digest = archive(large, out).digest
    file = out / "shards/00000/features.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert find_damage(out).shards == ["00000"]
    with pytest.raises(FormatError, match=r"features\.parquet is not what was written"):
        unpack(out, tmp_path / "back")
    assert repair(out).shards == ("00000",)
    assert archive(large, out).digest == digest


def test_an_archive_that_was_signed_wrong_is_not_believed(
    large: Path, tmp_path: Path, sign: Callable[[Path], None]
) -> None:
    """A tool exchanged the rows and wrote hashes of its own: the rows are not those that were archived."""
    import json

    out = tmp_path / "archive"
    archive(large, out)
    data = json.loads((out / "manifest.json").read_text())
    data["shards"][0]["files"]["features.parquet"]["unpacked"]["xxh3"] = "0" * 16
    (out / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(FormatError, match="does not hold the rows that were archived"):
        unpack(out, tmp_path / "back")


def test_a_matrix_that_another_tool_rewrote_is_kept_as_it_is(
    write_cache: Write, sign: Callable[[Path], None], tmp_path: Path
) -> None:
    path = write_cache()
    file = path / "shards/00000/features.parquet"
    pq.write_table(pq.read_table(file), file, compression="snappy")
    sign(path)
    archive(path, tmp_path / "archive")
    unpack(tmp_path / "archive", tmp_path / "back")
    assert Cache(tmp_path / "back").digest == Cache(path).digest


@pytest.mark.parametrize("remake", [compact, archive, unpack])
def test_what_is_no_whole_cache_is_refused(
    remake: Callable[[Path, Path], object], begin: Callable[..., CacheWriter], tmp_path: Path
) -> None:
    with pytest.raises(CalibError, match="no feature cache at"):
        remake(tmp_path / "absent", tmp_path / "out")
    layout = "archive" if remake is unpack else "mapped"
    with begin(tmp_path / "begun", layout=layout):
        pass
    with pytest.raises(InputError, match="is not complete"):
        remake(tmp_path / "begun", tmp_path / "out")
    assert not (tmp_path / "out").exists()
