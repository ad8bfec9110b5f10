"""What holds of single objects: conditional writes, leases, the mirror, and what becomes of damage on the way."""

import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from calib.cache import Cache
from calib.errors import DiskFullError, ExistsError, FormatError, InputError, MissingFileError, UnsupportedError
from calib.storage import Remote, as_named, local, parse, writing
from calib.storage.lease import Lease, writing_folder
from calib.storage.mirror import Mirror
from calib.storage.transfer import create, exists, read, replace

from ..toy import Toy
from .conftest import on_both
from .proxy import Proxy

At = Callable[[str], Remote]
Put = Callable[[Path, str], str]


@pytest.mark.parametrize(
    ("text", "path"), [("a/b", "a/b"), ("/a/b", "/a/b"), ("file:///a/b%20c", "/a/b c"), ("s3:/a", "s3:/a")]
)
def test_local_places_are_paths(text: str, path: str) -> None:
    assert parse(text) == Path(path)


def test_a_url_keeps_its_slashes() -> None:
    place = parse("s3://bucket/a/b/")
    assert isinstance(place, Remote)
    assert (str(place), str(place / "c"), place.name, str(place.parent)) == (
        "s3://bucket/a/b",
        "s3://bucket/a/b/c",
        "b",
        "s3://bucket/a",
    )
    assert str(parse("GS://bucket/a")) == "gs://bucket/a"


@pytest.mark.parametrize("url", ["s3://", "s3://bucket", "s3://bucket/", "s3://bucket/a//b", "s3://bucket/../b"])
def test_a_url_names_a_place_in_a_bucket(url: str) -> None:
    with pytest.raises(InputError, match="does not name a place in a bucket"):
        parse(url)


def test_other_protocols_and_credentials_in_urls_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="ftp:// is not supported"):
        parse("ftp://host/file")
    with pytest.raises(InputError, match="credentials") as caught:
        parse("s3://key:secret@bucket/a")
    assert "secret" not in f"{caught.value} {caught.value.hint}"


@on_both
def test_an_object_is_created_once(bucket: str, remote: At) -> None:
    create(remote(f"{bucket}/a"), b"one")
    with pytest.raises(ExistsError, match="exists"):
        create(remote(f"{bucket}/a"), b"two")
    create(remote(f"{bucket}/a"), b"one")  # a request whose first answer was lost
    assert read(remote(f"{bucket}/a")) == b"one"


def test_what_is_not_there_is_missing_and_a_wrong_bucket_too(bucket: str, remote: At) -> None:
    assert not exists(remote(f"{bucket}/none"))
    for url in (f"{bucket}/none", "s3://no-such-bucket/a"):
        with pytest.raises(MissingFileError, match=f"{url} is not there"):
            local(url)
    with pytest.raises(MissingFileError, match="there is no bucket s3://no-such-bucket"):
        create(remote("s3://no-such-bucket/a/b/c"), b"one")


@on_both
def test_a_second_writer_is_refused_and_told_who_writes(bucket: str, remote: At) -> None:
    place = remote(f"{bucket}/caches/a")
    lease = Lease.take(place, patient=False)
    with pytest.raises(ExistsError, match=f"process {os.getpid()} on .* is writing {bucket}/caches/a"):
        Lease.take(place, patient=False)
    with pytest.raises(ExistsError, match="is writing"):  # it waits, and sees a sign of life
        Lease.take(place, patient=True)
    lease.release(done=True)
    assert not exists(writing_folder(place) / "lease-000001.json")
    Lease.take(place, patient=False).release(done=False)
    Lease.take(place, patient=False).release(done=True)  # given back: nobody needs to wait


@on_both
def test_the_lease_of_a_dead_writer_is_taken_over_by_one(bucket: str, remote: At) -> None:
    place = remote(f"{bucket}/caches/a")
    dead = Lease.take(place, patient=False)
    dead._ended.set()  # as a killed process: no sign of life, nothing given back
    dead._beating.join()
    taken: list[Lease | ExistsError] = []

    def take() -> None:
        try:
            taken.append(Lease.take(place, patient=True))
        except ExistsError as e:
            taken.append(e)

    threads = [threading.Thread(target=take) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    (winner,) = [t for t in taken if isinstance(t, Lease)]
    with pytest.raises(ExistsError, match="taken over"):  # it was not dead after all: it must not commit anything
        dead.check()
    winner.check()
    winner.release(done=True)
    with pytest.raises(ExistsError, match="taken over"):
        Lease.check(dead)


def test_a_store_that_ignores_the_condition_is_refused(bucket: str, remote: At, proxy: Proxy) -> None:
    proxy.request = lambda block: re.sub(rb"(?i)if-none-match", b"x-none-atall", block)
    with pytest.raises(UnsupportedError, match="If-None-Match"):
        Lease.take(remote(f"{bucket}/a"), patient=False)


@on_both
def test_two_places_can_be_written_at_once_and_nothing_is_left(
    bucket: str, stored: Callable[[str], dict[str, bytes]]
) -> None:
    with writing(f"{bucket}/out/a") as a, writing(f"{bucket}/out/b.txt") as b:
        a.mkdir(parents=True)
        (a / "x").write_text("x")
        b.write_text("b")
        assert as_named(f"wrote {a / 'x'}") == f"wrote {bucket}/out/a/x"
    assert stored(bucket) == {"out/a/x": b"x", "out/b.txt": b"b"}


def test_after_an_error_nothing_is_uploaded_and_hidden_files_stay(
    bucket: str, stored: Callable[[str], dict[str, bytes]]
) -> None:
    with pytest.raises(ZeroDivisionError), writing(f"{bucket}/out/a") as a:
        (a / ".pieces").mkdir(parents=True)
        (a / "x").write_text("x")
        raise ZeroDivisionError
    assert all("lease" in name for name in stored(bucket))
    with writing(f"{bucket}/out/a") as a:
        assert [p.name for p in a.iterdir()] == [".pieces"]
    assert stored(bucket) == {}


def mirrored(mirror: Mirror, place: Remote, content: bytes) -> Path:
    replace(place, content)
    target = mirror.entry(place.parent, "v") / "shards" / "0" / place.name
    mirror.fetch(target, place, len(content), xxhash.xxh3_64(content).hexdigest()).close()
    return target


def test_the_mirror_keeps_its_limit_and_what_is_in_use(bucket: str, remote: At, tmp_path: Path) -> None:
    one, other = (Mirror(tmp_path / "mirror", 50_000) for _ in range(2))  # locks are those of two processes
    contents = [os.urandom(15_000) for _ in range(5)]
    places = [remote(f"{bucket}/cache/{k}.parquet") for k in range(5)]
    first = mirrored(one, places[0], contents[0])
    held = one.fetch(first, places[0], 15_000, None)
    mapped = np.memmap(held.path, np.uint8, mode="r")
    paths = [first, *(mirrored(other, p, c) for p, c in zip(places[1:], contents[1:], strict=True))]
    sizes = [p.stat().st_size for p in (tmp_path / "mirror").rglob("*") if p.is_file()]
    assert sum(sizes) <= 50_000
    assert [p.exists() for p in paths] == [True, False, False, True, True]  # the oldest that nobody uses went
    assert mapped.tobytes() == contents[0]
    held.close()
    mirrored(other, places[1], contents[1])
    assert not first.exists() and mapped.tobytes() == contents[0]  # what is mapped can still be read
    keep = [one.fetch(p, r, 15_000, None) for p, r in zip(paths[3:], places[3:], strict=True) if p.exists()]
    keep.append(one.fetch(paths[1], places[1], 15_000, None))
    with pytest.raises(DiskFullError, match="are in use"):
        mirrored(one, remote(f"{bucket}/cache/large.parquet"), os.urandom(40_000))
    for k in keep:
        k.close()


@on_both
def test_a_cache_larger_than_the_mirror_reads_as_it_is(
    bucket: str, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Toy(feature_size=64, images=40, most=40).write(tmp_path / "toy")
    size = (tmp_path / "toy/shards/00000/features.parquet").stat().st_size
    rest = sum(p.stat().st_size for p in (tmp_path / "toy").rglob("*") if p.is_file() and p.stem != "features")
    monkeypatch.setenv("CALIB_MIRROR_BYTES", str(int(1.5 * size) + rest))
    cache = Cache(local(put(tmp_path / "toy", f"{bucket}/toy")))
    assert cache.digest == own.digest
    rows = np.random.default_rng(0).permutation(own.n_rows)
    for _ in range(2):
        for part in np.array_split(rows, 4):
            assert cache.features.take(part).tobytes() == own.features.take(part).tobytes()
        assert cache.features.read(0, own.n_rows).tobytes() == own.features.read(0, own.n_rows).tobytes()
    here = list((tmp_path / "mirror").rglob("features.parquet"))
    assert len(here) == 1 < len(own.manifest.shards)


def test_a_byte_that_changes_on_the_way_is_noticed_and_fetched_again(
    bucket: str, put: Put, tmp_path: Path, proxy: Proxy
) -> None:
    own = Toy(feature_size=64).write(tmp_path / "toy")
    cache = Cache(local(put(tmp_path / "toy", f"{bucket}/toy")))
    flips = []

    def flip(block: bytes) -> bytes:
        if len(block) < 10_000 or flips:
            return block
        flips.append(len(block))
        return block[:9_000] + bytes([block[9_000] ^ 1]) + block[9_001:]

    proxy.response = flip
    assert cache.features.read(0, own.n_rows).tobytes() == own.features.read(0, own.n_rows).tobytes()
    assert flips


def test_damage_in_the_store_is_named_by_its_url(
    bucket: str, put: Put, tmp_path: Path, remote: At, calib: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    Toy().write(tmp_path / "toy")
    place = remote(put(tmp_path / "toy", f"{bucket}/toy")) / "shards/00001/features.parquet"
    content = bytearray(read(place))
    content[len(content) // 2] ^= 1
    replace(place, bytes(content))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(FormatError, match=f"{place}: its content is not what was written"):
        Cache(local(f"{bucket}/toy")).features.read(0, 10_000)
    checked: object = calib("cache", "check", f"{bucket}/toy")
    assert checked.exit_code == 1 and "shards/00001/features.parquet: damaged" in checked.stdout  # type: ignore[attr-defined]
    place.fs.rm_file(place.path)
    checked = calib("cache", "check", f"{bucket}/toy")
    assert checked.exit_code == 1 and "shards/00001/features.parquet: missing" in checked.stdout  # type: ignore[attr-defined]


@pytest.mark.slow
def test_several_processes_share_one_mirror(bucket: str, put: Put, tmp_path: Path) -> None:
    own = Toy(feature_size=64).write(tmp_path / "toy")
    put(tmp_path / "toy", f"{bucket}/toy")
    code = "import sys; from calib.cache import Cache; from calib.storage import local; import hashlib; "
    code += "c = Cache(local(sys.argv[1])); print(hashlib.md5(c.features.read(0, c.n_rows).tobytes()).hexdigest())"
    started = [
        subprocess.Popen([sys.executable, "-c", code, f"{bucket}/toy"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    digests = {p.communicate()[0] for p in started}
    assert digests == {hashlib.md5(own.features.read(0, own.n_rows).tobytes()).hexdigest() + "\n"}
    assert not list((tmp_path / "mirror").rglob("*.tmp"))
