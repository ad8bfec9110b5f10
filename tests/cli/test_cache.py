"""``calib cache``: metrics on stdout, progress on stderr, and extracted caches hurt, repaired and extracted again."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.cache import Cache
from calib.cache.schema import Manifest
from calib.layout import MANIFEST

pytest.importorskip("torchvision")

Calib = Callable[..., Any]
Fails = Callable[..., str]
Arguments = Callable[..., list[Any]]
Copied = Callable[[Path], Path]
Content = Callable[[Path], dict[str, bytes]]


def metrics(outcome: Any, code: int = 0) -> dict[str, Any]:
    assert outcome.exit_code == code, (outcome.output, outcome.exception)
    return dict(json.loads(outcome.stdout))


def test_info_tells_what_it_is(calib: Calib, train_cache: Cache) -> None:
    found = metrics(calib("cache", "info", train_cache.path, "--json"))
    assert (found["mode"], found["dtype"], found["layout"]) == ("train", "float16", "mapped")
    assert (found["rows"], found["images"], found["shards"]) == (train_cache.n_rows, 72, 5)
    labels = train_cache.labels
    assert sum(found["labels"].values()) == len(labels)
    assert found["labels"]["background"] == int((labels == 192).sum())
    rare = np.flatnonzero(train_cache.categories.instance_count < 10)
    assert found["labels"]["1-9"] == int(np.isin(labels, rare).sum()) > 0
    outcome = calib("cache", "info", train_cache.path)
    lines = dict(line.split(maxsplit=1) for line in outcome.stdout.splitlines())
    assert lines["labels"].startswith("0 0, 1-9 ") and lines["cache"] == train_cache.digest and outcome.stderr == ""


def test_a_sound_cache_passes(calib: Calib, val_cache: Cache) -> None:
    outcome = calib("cache", "check", val_cache.path)
    assert outcome.exit_code == 0 and outcome.stdout.endswith(": sound\n")
    assert "check" in outcome.stderr and "10/10" in outcome.stderr
    assert metrics(calib("cache", "check", val_cache.path, "--json"))["sound"] is True


def test_a_damaged_cache_fails_with_exit_code_1(calib: Calib, val_cache: Cache, copied: Copied) -> None:
    path = copied(val_cache.path)
    (path / "shards/00001/meta.parquet").unlink()
    file = path / "shards/00000/features.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    shutil.copytree(path / "shards/00000", path / "shards/00009")
    outcome = calib("cache", "check", path)
    assert outcome.exit_code == 1
    lines = outcome.stdout.splitlines()
    first = val_cache.images["image_id"].to_pylist()[:10]
    assert lines[0] == (
        "shards/00000/features.parquet: damaged: rows 0:2400 fail their checksum; "
        f"images {', '.join(map(str, first))} and 6 more"
    )
    assert lines[1].startswith("shards/00001/meta.parquet: missing: it is not there; images 2000017, 2000018")
    assert lines[2] == "shards/00009: not listed in the manifest, never read" and lines[3].endswith(": 2 damaged")
    assert f"hint: calib cache repair {path}" in outcome.stderr
    found = metrics(calib("cache", "check", path, "--json"), code=1)
    assert found["sound"] is False and found["shards"] == ["00000", "00001"] and found["unlisted"] == ["00009"]
    assert found["image_ids"] == val_cache.images["image_id"].to_pylist()
    assert [d["kind"] for d in found["damages"]] == ["damaged", "missing"]


@pytest.fixture
def extracted(calib: Calib, extracting: Arguments, tmp_path: Path) -> Path:
    """The dozen pictures, in six shards."""
    assert calib(*extracting(tmp_path / "c")).exit_code == 0
    return tmp_path / "c"


@pytest.mark.parametrize("lost", [["00000"], ["00002", "00003"], ["00005"], [f"{k:05d}" for k in range(6)]])
def test_repaired_and_resumed_an_extraction_fills_exactly_the_holes(
    calib: Calib, extracting: Arguments, extracted: Path, content: Content, lost: list[str]
) -> None:
    before = content(extracted)
    for name in lost:
        (extracted / "shards" / name / "features.parquet").write_bytes(b"rotten")
    kept = {p: p.stat().st_ino for p in extracted.glob("shards/*/*") if p.parent.name not in lost}
    done = metrics(calib("cache", "repair", extracted, "--json"))
    assert done["shards_taken_out"] == lost and done["images_to_write_again"] == 2 * len(lost)
    assert done["complete"] is False and done["rows_left"] == 300 * (6 - len(lost))
    assert calib(*extracting(extracted)).exit_code == 2  # --resume must be asked for
    assert calib(*extracting(extracted, "--resume")).exit_code == 0
    after = {k: v for k, v in content(extracted).items() if not k.startswith("damaged/")}
    assert after == before
    assert {p: p.stat().st_ino for p in kept} == kept  # the others were not written again
    assert sorted(p.name for p in (extracted / "damaged").iterdir()) == lost


def test_a_lost_table_of_an_extraction_costs_no_picture(
    calib: Calib, extracting: Arguments, extracted: Path, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(extracted)
    for name in ("images.parquet", "categories.parquet", "annotations.parquet", "classifier.safetensors"):
        (extracted / name).write_bytes(b"rotten")
    done = metrics(calib("cache", "repair", extracted, "--json"))
    assert done["shards_taken_out"] == [] and len(done["tables_taken_out"]) == 4 and done["rows_left"] == 1800

    def never(*_: object) -> None:
        raise AssertionError("the detector ran")

    monkeypatch.setattr("calib.extract.pipeline.launch", never)
    assert calib(*extracting(extracted, "--resume")).exit_code == 0
    assert {k: v for k, v in content(extracted).items() if not k.startswith("damaged/")} == before


def test_every_way_to_remake_a_cache_reports_and_is_a_cache(
    calib: Calib, val_cache: Cache, train_cache: Cache, tmp_path: Path
) -> None:
    even = metrics(
        calib("cache", "compact", val_cache.path, "--rows-per-shard", 700, "--out", tmp_path / "e", "--json")
    )
    assert even["rows"] == val_cache.n_rows and even["shards"] == 6 and even["digest"] == Cache(tmp_path / "e").digest
    outcome = calib("cache", "sample", train_cache.path, "--images", 5, "--seed", 3, "--out", tmp_path / "s")
    assert outcome.exit_code == 0 and "sample" in outcome.stderr
    small = Cache(tmp_path / "s")
    assert len(small.images) == 5 and f"digest  {small.digest}" in outcome.stdout
    kept = metrics(calib("cache", "archive", train_cache.path, "--out", tmp_path / "a", "--json"))
    assert kept["bytes"] < 0.8 * sum(f["bytes"] for s in train_cache.manifest.shards for f in s.files.values())
    back = metrics(calib("cache", "unpack", tmp_path / "a", "--out", tmp_path / "u", "--json"))
    assert back["digest"] == train_cache.digest == Cache(tmp_path / "u").digest


def test_merged_halves_are_the_whole(
    calib: Calib, extracting: Arguments, dozen: Callable[..., Path], extracted: Path, tmp_path: Path
) -> None:
    def half(first: bool) -> Callable[[dict[str, Any]], None]:
        def change(d: dict[str, Any]) -> None:
            d["images"] = d["images"][:6] if first else d["images"][6:]
            ids = {i["id"] for i in d["images"]}
            d["annotations"] = [a for a in d["annotations"] if a["image_id"] in ids]

        return change

    for name, first in (("one", True), ("two", False)):
        assert calib(*extracting(tmp_path / name, annotations=dozen(half(first)))).exit_code == 0
    outcome = calib("cache", "merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both", "--json")
    assert metrics(outcome)["shards"] == 6
    whole, both = Cache(extracted), Cache(tmp_path / "both")
    assert both.digest == whole.digest
    ours, theirs = (c.annotations().sort_by("id") for c in (both, whole))
    assert ours.equals(theirs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("info", "absent"), "no feature cache at absent"),
        (("check", "absent"), "no feature cache at absent"),
        (("repair", "absent"), "no feature cache at absent"),
        (("merge", "absent", "absent", "--out", "o"), "no feature cache at absent"),
        (("sample", "absent", "--images", "1", "--out", "o"), "no feature cache at absent"),
        (("compact", "absent", "--out", "o"), "no feature cache at absent"),
        (("archive", "absent", "--out", "o"), "no feature cache at absent"),
        (("unpack", "absent", "--out", "o"), "no feature cache at absent"),
    ],
)
def test_what_is_no_cache_is_named(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in fails("cache", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_outputs_in_the_way_are_refused(fails: Fails, val_cache: Cache, tmp_path: Path, content: Content) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    for command in (("compact",), ("sample", "--images", "2"), ("archive",)):
        message = fails("cache", *command, val_cache.path, "--out", tmp_path / "notes")
        assert "notes exists and is not empty" in message
    assert content(tmp_path) == {"notes/thesis.txt": b"mine"}


def test_training_on_an_archive_says_what_to_do(calib: Calib, fails: Fails, val_cache: Cache, tmp_path: Path) -> None:
    assert calib("cache", "archive", val_cache.path, "--out", tmp_path / "a").exit_code == 0
    message = fails("train", "softmax", "--cache", tmp_path / "a", "--out", tmp_path / "h")
    assert f"hint: calib cache unpack {tmp_path / 'a'} --out" in message


@pytest.mark.slow
def test_extraction_that_filled_the_disk_goes_on(
    calib: Calib,
    extracting: Arguments,
    start: Callable[..., subprocess.Popen[str]],
    extracted: Path,
    content: Content,
    tmp_path: Path,
) -> None:
    """The manifest, which grows, reaches the limit on file sizes once some shards are committed."""
    whole, out = Manifest.read(extracted), tmp_path / "full"
    large = max(p.stat().st_size for p in extracted.rglob("*") if p.is_file())
    before = "import resource, signal, calib.cache.shard as w; real = w.write_meta; n = [0]\n"
    before += f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\ndef full(*a):\n    n[0] += {str(out)!r} in str(a[0])\n"
    before += "    if n[0] == 3:\n"  # of this cache, not of those that the detector's check writes
    before += f"        resource.setrlimit(resource.RLIMIT_FSIZE, ({large // 100}, {large}))\n    real(*a)\n"
    process = start(*extracting(out), before=before + "w.write_meta = full")
    stdout, stderr = process.communicate()
    assert process.returncode == 2 and stdout == "" and "Traceback" not in stderr, stderr
    assert os.strerror(27) in stderr and "committed are whole" in " ".join(stderr.split())
    assert Manifest.read(out).shards == whole.shards[:2] and not list(out.glob("shards/.*"))
    checked = calib("cache", "check", out, "--json")
    found = json.loads(checked.stdout)
    assert checked.exit_code == 1 and found["sound"] is True and found["complete"] is False
    assert calib(*extracting(out, "--resume")).exit_code == 0
    assert content(out) == content(extracted) and (out / MANIFEST).exists()


@pytest.mark.slow
def test_an_extraction_that_committed_nothing_is_begun_again(
    calib: Calib, extracting: Arguments, start: Callable[..., subprocess.Popen[str]], content: Content, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    broken = "import calib.cache.write as w; real = w.write_images\ndef fail(*a):\n"
    broken += (
        f"    if {str(out)!r} in str(a[0]): raise OSError(5, 'broken')\n    return real(*a)\nw.write_images = fail"
    )
    process = start(*extracting(out), before=broken)
    process.communicate()
    assert process.returncode != 0
    assert not Manifest.read(out).shards
    assert calib(*extracting(out)).exit_code == 0
    assert calib(*extracting(out)).exit_code == 2, "what is committed is kept"
