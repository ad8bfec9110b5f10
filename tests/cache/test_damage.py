"""Every kind of damage is found and named with its images, the rest stays readable, and repairing and writing again
gives the cache as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from calib.analysis import query
from calib.cache import Cache
from calib.cache.damage import Report, find_damage
from calib.cache.matrix import ROWS_PER_GROUP
from calib.cache.repair import repair
from calib.cache.schema import Manifest
from calib.cache.summary import summarise
from calib.cache.write import CacheWriter
from calib.errors import ExistsError, FormatError, InputError, MissingFileError
from calib.layout import MANIFEST

Write = Callable[..., Path]
Resume = Callable[..., CacheWriter]
Content = Callable[[Path], dict[str, bytes]]
Damage = Callable[[Path, Path], object]
MIDDLE = "shards/00001"
FAMILIES = ("meta", "features", "logits")


def flip(name: str, share: float) -> Damage:
    def damage(cache: Path, _: Path) -> None:
        content = bytearray((cache / name).read_bytes())
        content[int(share * (len(content) - 1))] ^= 8
        (cache / name).write_bytes(content)

    return damage


def cut(name: str, share: float) -> Damage:
    return lambda cache, _: (cache / name).write_bytes((c := (cache / name).read_bytes())[: int(share * len(c))])


def hole(name: str) -> Damage:
    """Zeros where a page was, as a file system leaves them after a crash."""

    def damage(cache: Path, _: Path) -> None:
        content = bytearray((cache / name).read_bytes())
        content[60:120] = bytes(60)
        (cache / name).write_bytes(content)

    return damage


def swap(cache: Path, _: Path) -> None:
    one, other = cache / "shards/00001", cache / "shards/00002"
    one.rename(cache / "aside")
    other.rename(one)
    (cache / "aside").rename(other)


def lose(name: str) -> Damage:
    return lambda cache, _: (cache / name).unlink()


def longer(cache: Path, _: Path) -> None:
    file = cache / MIDDLE / "meta.parquet"
    file.write_bytes(file.read_bytes() + b"more")


def foreign(cache: Path, other: Path) -> None:
    shutil.copy(other / MIDDLE / "features.parquet", cache / MIDDLE)


def of_middle(names: str, damage: Callable[..., Damage], kinds: set[str], *shares: float) -> dict[str, Any]:
    """``damage`` to the middle shard's file of each family, at each share of its length."""
    files = [f"{MIDDLE}/{f}.parquet" for f in FAMILIES]
    cases = [(f, (s,)) for f in files for s in shares] or [(f, ()) for f in files]
    return {f"{names} {f} {s}": (damage(f, *s), {"00001"}, kinds) for f, s in cases}


# What happens to the cache (beside another one), the shards it hits, and the kinds it is told as.
DAMAGES: dict[str, tuple[Damage, set[str], set[str]]] = {
    **of_middle("flip", flip, {"damaged", "foreign"}, 0, 0.15, 0.6, 1),
    **of_middle("cut", cut, {"truncated"}, 0, 0.5, 0.99),
    **of_middle("hole", hole, {"damaged"}),
    **of_middle("lose", lose, {"missing"}),
    "first shard lost": (lambda c, _: shutil.rmtree(c / "shards/00000"), {"00000"}, {"missing"}),
    "all shards lost": (lambda c, _: shutil.rmtree(c / "shards"), {"00000", "00001", "00002"}, {"missing"}),
    "shards swapped": (swap, {"00001", "00002"}, {"exchanged"}),
    "file of another cache": (foreign, {"00001"}, {"foreign"}),
    "longer": (longer, {"00001"}, {"damaged"}),
}
IMAGES = {"00000": [1, 2, 3], "00001": [4], "00002": [5, 6]}


@pytest.fixture
def damaged(write_cache: Write, request: pytest.FixtureRequest) -> tuple[Path, set[str], set[str]]:
    damage, shards, kinds = DAMAGES[request.param]
    path, other = write_cache("hurt"), write_cache("other", shards={"00000": [(7, 2)], "00001": [(8, 6)]})
    damage(path, other)
    return path, shards, kinds


@pytest.mark.parametrize("damaged", DAMAGES, indirect=True)
def test_it_is_named_and_the_rest_is_read(damaged: tuple[Path, set[str], set[str]], write_cache: Write) -> None:
    path, shards, kinds = damaged
    report = find_damage(path)
    assert set(report.shards) == shards and not report.tables
    assert {d.kind for d in report.damages} <= kinds
    assert report.image_ids == [i for s in sorted(shards) for i in IMAGES[s]]
    with pytest.raises((FormatError, MissingFileError)) as e:
        Cache(path)
    assert "repair" in e.value.hint
    whole, rest = Cache(write_cache("whole")), Cache.sound_part(path)
    ids = np.repeat(whole.images["image_id"].to_numpy(), np.diff(whole.image_start))
    kept = np.flatnonzero([not any(i in IMAGES[s] for s in shards) for i in ids])
    assert rest.n_rows == len(kept)
    assert np.array_equal(rest.features.read(0, rest.n_rows), whole.features.take(kept))
    assert np.array_equal(rest.labels, whole.labels[kept])
    assert rest.images["image_id"].to_pylist() == [i for s in IMAGES if s not in shards for i in IMAGES[s]]


@pytest.mark.parametrize("damaged", DAMAGES, indirect=True)
def test_repaired_and_written_again_it_is_the_same(
    damaged: tuple[Path, set[str], set[str]],
    write_cache: Write,
    resume: Resume,
    go_on: Callable[[CacheWriter], None],
    content: Content,
) -> None:
    path, shards, _ = damaged
    done = repair(path)
    assert set(done.shards) == shards and not done.complete
    assert [s.name for s in Manifest.read(path).shards] == [s for s in IMAGES if s not in shards]
    assert find_damage(path).damages == ()
    with pytest.raises(InputError, match="is not complete"):
        Cache(path)
    assert Cache.sound_part(path).n_rows == done.rows_left
    go_on(resume(path))
    whole = write_cache("whole")
    assert Cache(path).digest == Cache(whole).digest
    theirs = {k: v for k, v in content(whole).items() if k != ".verified.json"}
    ours = {k: v for k, v in content(path).items() if k != ".verified.json" and not k.startswith("damaged/")}
    assert ours == theirs


def test_a_repair_keeps_what_it_took_out(write_cache: Write) -> None:
    path = write_cache()
    for _ in range(2):
        flip(f"{MIDDLE}/features.parquet", 0.5)(path, path)
        bad = (path / MIDDLE / "features.parquet").read_bytes()
        repair(path)
        shutil.copytree(write_cache("again") / "shards/00001", path / MIDDLE)
        shutil.copy(path.parent / "again" / MANIFEST, path / MANIFEST)
        shutil.rmtree(path.parent / "again")
    kept = [path / "damaged" / n / "features.parquet" for n in ("00001", "00001.1")]
    assert [k.read_bytes() for k in kept] == [bad, bad]


def test_a_sound_cache_is_left_as_it_is(write_cache: Write, content: Content) -> None:
    path = write_cache()
    before = content(path)
    done = repair(path)
    assert done.complete and done.rows_left == 21 and done.shards == () and done.report.files == 13
    assert content(path) == before | {".lock": b""}


@pytest.mark.parametrize(
    "name", ["images.parquet", "categories.parquet", "annotations.parquet", "classifier.safetensors"]
)
@pytest.mark.parametrize("how", ["lost", "cut", "flipped"])
def test_a_damaged_table_costs_no_row(
    write_cache: Write, begin: Resume, go_on: Callable[[CacheWriter], None], content: Content, name: str, how: str
) -> None:
    from calib.cache import Categories, Classifier

    path, whole = write_cache("hurt"), write_cache("whole")
    if how == "lost":
        (path / name).unlink()
    else:
        (cut if how == "cut" else flip)(name, 0.5)(path, path)
    assert find_damage(path).tables == [name] and find_damage(path).shards == []
    with pytest.raises(FormatError, match=name):
        Cache.sound_part(path)
    done = repair(path)
    assert done.shards == () and done.tables == (name,) and done.rows_left == 21
    tables = Categories.read(whole / "categories.parquet"), Classifier.read(whole / "classifier.safetensors")
    request = Manifest.read(path)
    go_on(CacheWriter.open(path, request, *tables))
    assert Cache(path).digest == Cache(whole).digest
    assert Cache(path).images.equals(Cache(whole).images)
    assert (path / name).read_bytes() == (whole / name).read_bytes()


def test_images_of_an_older_calib_are_written_again(write_cache: Write, sign: Callable[[Path], None]) -> None:
    """Their meta tables do not carry them: without images.parquet their shards cannot be placed."""
    path = write_cache()
    meta = path / MIDDLE / "meta.parquet"
    pq.write_table(pq.read_table(meta).replace_schema_metadata(None), meta, write_page_checksum=True)
    sign(path)
    (path / "images.parquet").unlink()
    assert repair(path).shards == ("00001",)
    assert [s.name for s in Manifest.read(path).shards] == ["00000", "00002"]


def test_a_page_names_its_own_images(write_cache: Write, rows_of: Callable[..., Any]) -> None:
    """Two row groups: what is wrong in the second does not concern the images of the first."""
    path = write_cache(shards={"00000": [rows_of(1, ROWS_PER_GROUP - 1), rows_of(2, 3), rows_of(3, 4)]})
    flip("shards/00000/features.parquet", 0.5)(path, path)
    assert find_damage(path).image_ids == [1, 2]
    shutil.rmtree(path)
    path = write_cache(shards={"00000": [rows_of(1, ROWS_PER_GROUP), rows_of(2, 300), rows_of(3, 300)]})
    content = bytearray((path / "shards/00000/features.parquet").read_bytes())
    content[ROWS_PER_GROUP * 20 + 2000] ^= 1
    (path / "shards/00000/features.parquet").write_bytes(content)
    report = find_damage(path)
    assert (
        report.image_ids == [2, 3] and f"rows {ROWS_PER_GROUP}:{ROWS_PER_GROUP + 600} fail" in report.damages[0].detail
    )


def test_what_was_signed_after_it_was_damaged_fails_its_checksum(
    write_cache: Write, sign: Callable[[Path], None]
) -> None:
    path = write_cache()
    hole(f"{MIDDLE}/features.parquet")(path, path)
    sign(path)
    assert [d.detail for d in find_damage(path).damages] == ["rows 0:6 fail their checksum"]


def test_a_folder_that_is_not_listed_is_told_and_no_damage(write_cache: Write) -> None:
    path = write_cache()
    shutil.copytree(path / MIDDLE, path / "shards/00007")
    assert find_damage(path) == Report(13, find_damage(path).bytes, (), ("00007",))


def test_a_repair_waits_for_nobody(write_cache: Write, resume: Resume) -> None:
    path = write_cache()
    with resume(path), pytest.raises(ExistsError, match="another process is writing the cache"):
        repair(path)
    with pytest.raises(MissingFileError, match="no feature cache"):
        repair(path / "absent")


@pytest.mark.parametrize("how", ["lost", "unreadable", "of zeros"])
def test_metadata_never_touches_features(write_cache: Write, how: str, tmp_path: Path) -> None:
    """DuckDB over meta, calib analyze and calib cache info on a cache whose matrices are gone."""
    path = write_cache()
    whole = summarise(path)
    for file in [*path.glob("shards/*/features.parquet"), *path.glob("shards/*/logits.parquet")]:
        if how == "lost":
            file.unlink()
        elif how == "unreadable":
            file.unlink()
            file.mkdir()  # opening it fails, whoever asks
        else:
            file.write_bytes(bytes(file.stat().st_size))
    assert duckdb.sql(f"SELECT count(*) FROM '{path}/shards/*/meta.parquet'").fetchall() == [(21,)]
    assert query([path], "SELECT count(*), count(DISTINCT image_id) FROM meta").rows == ((21, 5),)
    assert summarise(path) == whole
    with pytest.raises((FormatError, MissingFileError)):
        Cache(path)


def test_the_summary_counts_rows_per_bin(write_cache: Write) -> None:
    path = write_cache()
    labels, metrics = Cache(path).labels, summarise(path)
    counts = {"0": 1, "1-9": 2, "10-99": 0, "background": 3}  # instances 40, 0, 7
    assert metrics["labels"] == {
        "0": 0,
        "1-9": 0,
        "10-99": 0,
        "100-999": 0,
        "1000+": 0,
        "ignored": 0,
        **{name: int((labels == label).sum()) for name, label in counts.items()},
    }
    sizes = {f: sum(p.stat().st_size for p in path.glob(f"shards/*/{f}.parquet")) for f in FAMILIES}
    assert metrics["bytes"] == sizes | {"all": sum(sizes.values())}
    assert (metrics["rows"], metrics["images"], metrics["shards"], metrics["complete"]) == (21, 6, 3, True)
    data = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(data | {"complete": False}))
    assert summarise(path) == metrics | {"complete": False}
