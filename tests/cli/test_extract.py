"""``calib extract``: metrics on stdout, progress on stderr, interrupted and resumed as if nothing had been, and every
kind of bad input named with its remedy."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from calib.cache import Cache
from calib.cache.damage import find_damage
from calib.cache.schema import Manifest

from ..disk import mounted

pytest.importorskip("torchvision")

Arguments = Callable[..., list[Any]]
Calib = Callable[..., Any]
Fails = Callable[..., str]
Start = Callable[..., subprocess.Popen[str]]
Content = Callable[[Path], dict[str, bytes]]
Dozen = Callable[..., Path]


def without_times(content: dict[str, bytes]) -> dict[str, bytes]:
    """All files but the note of what was verified, which holds times."""
    return {k: v for k, v in content.items() if k != ".verified.json"}


def test_json_is_one_object_on_stdout_and_progress_is_on_stderr(
    calib: Calib, extracting: Arguments, tmp_path: Path
) -> None:
    outcome = calib(*extracting(tmp_path / "c"), "--json")
    assert outcome.exit_code == 0, outcome.output
    metrics = json.loads(outcome.stdout)
    cache = Cache(tmp_path / "c")
    assert metrics["cache"] == str(tmp_path / "c") and metrics["images"] == 12
    assert metrics["rows"] == cache.n_rows == 12 * 150
    assert metrics["bytes"] == sum(p.stat().st_size for p in (tmp_path / "c" / "shards").rglob("*.parquet"))
    assert metrics["images_per_second"] == pytest.approx(12 / metrics["seconds"], rel=0.05)
    assert "extract test" in outcome.stderr and "12/12" in outcome.stderr
    assert "rows/s" in outcome.stderr and "MB/s" in outcome.stderr
    assert metrics["shards"] == 6 and metrics["digest"] == cache.digest
    categories = json.loads((tmp_path / "dozen.json").read_bytes())["categories"]
    assert cache.categories.instance_count.tolist() == [c["instance_count"] for c in categories]  # TRAIN counts


def test_the_plain_report_has_a_line_per_metric(calib: Calib, extracting: Arguments, tmp_path: Path) -> None:
    outcome = calib(*extracting(tmp_path / "c"), "--mode", "train", "--dtype", "float32", "--logits", "probe")
    lines = dict(line.split(maxsplit=1) for line in outcome.stdout.splitlines())
    assert lines["images"] == "12" and int(lines["rows"]) == Cache(tmp_path / "c").n_rows
    manifest = Manifest.read(tmp_path / "c")
    assert (manifest.mode, manifest.dtype, manifest.logits) == ("train", "float32", "probe")


@pytest.fixture
def whole(calib: Calib, extracting: Arguments, tmp_path: Path) -> Path:
    """The cache of an uninterrupted run."""
    assert calib(*extracting(tmp_path / "whole")).exit_code == 0
    return tmp_path / "whole"


SLOW = "import time, calib.extract.pipeline as p; real = p.launch\n"
SLOW += "def slow(*a):\n    time.sleep(0.15)\n    return real(*a)\np.launch = slow"


def wait_for(process: subprocess.Popen[str], cache: Path, shards: int) -> None:
    """Until ``shards`` shards are committed."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (cache / "manifest.json").exists() and len(Manifest.read(cache).shards) >= shards:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("shards", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_and_resumed_the_cache_is_that_of_an_uninterrupted_run(
    calib: Calib, extracting: Arguments, start: Start, tmp_path: Path, whole: Path, content: Content, shards: int
) -> None:
    arguments = extracting(tmp_path / "c")
    process = start(*arguments, before=SLOW)
    wait_for(process, tmp_path / "c", shards)
    process.kill()
    process.communicate()
    committed = len(Manifest.read(tmp_path / "c").shards)
    assert process.returncode == -signal.SIGKILL and shards <= committed < 6
    assert calib(*arguments).exit_code == 2  # without --resume nothing is overwritten
    assert calib(*arguments, "--resume").exit_code == 0
    assert content(tmp_path / "c") == content(whole)
    assert Cache(tmp_path / "c").digest == Cache(whole).digest


def test_killed_before_the_first_manifest_the_same_command_starts_again(
    calib: Calib, extracting: Arguments, start: Start, tmp_path: Path, whole: Path, content: Content
) -> None:
    deadly = "import os, calib.cache.schema as s; real = s.Manifest.write\n"
    deadly += f"deadly = {str(tmp_path / 'c')!r}  # the cache that proves the detector is another one\n"
    deadly += "s.Manifest.write = lambda self, at: os.kill(os.getpid(), 9) if str(at) == deadly else real(self, at)"
    process = start(*extracting(tmp_path / "c"), before=deadly)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        ".lock",
        "categories.parquet",
        "classifier.safetensors",
        "shards",
    ]
    assert calib(*extracting(tmp_path / "c"), "--resume").exit_code == 0
    assert content(tmp_path / "c") == content(whole)


def test_ctrl_c_says_how_to_go_on_and_a_second_writer_is_refused(
    calib: Calib, fails: Fails, extracting: Arguments, start: Start, tmp_path: Path, whole: Path, content: Content
) -> None:
    arguments = extracting(tmp_path / "c")
    process = start(*arguments, before=SLOW)
    wait_for(process, tmp_path / "c", 1)
    message = fails(*arguments, "--resume")
    assert "another process is writing the cache" in message and str(tmp_path / "c") in message
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and stdout == "" and "Traceback" not in stderr
    assert stderr.rstrip().endswith("run the same command again with --resume to go on")
    assert calib(*arguments, "--resume").exit_code == 0
    assert content(tmp_path / "c") == content(whole)


def test_resuming_a_finished_cache_does_nothing(
    calib: Calib, extracting: Arguments, whole: Path, content: Content, tmp_path: Path
) -> None:
    before = content(whole)
    outcome = calib(*extracting(whole), "--resume", "--json")
    assert outcome.exit_code == 0 and json.loads(outcome.stdout)["rows"] == 1800
    assert content(whole) == before


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"dtype": "float32"}, "dtype"),
        ({"mode": "train"}, "mode"),
        ({"logits": "none"}, "logits"),
        ({"batch_size": 4}, "batch_size"),
        ({"images_per_shard": 3}, "images_per_shard"),
        ({"seed": 1}, "seed"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    fails: Fails,
    extracting: Arguments,
    val_cache: Cache,
    whole: Path,
    content: Content,
    changed: dict[str, Any],
    named: str,
) -> None:
    before = content(whole)
    message = fails(*extracting(whole, "--resume", **changed))
    assert f"begun with other settings ({named})" in message and "another --out" in message
    assert content(whole) == before


def test_a_folder_with_other_files_is_refused_and_left_alone(
    fails: Fails, extracting: Arguments, tmp_path: Path, content: Content
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for more in ((), ("--resume",)):
        message = fails(*extracting(tmp_path / "out", *more))
        assert "out exists and is not empty" in message and "choose another --out" in message
    assert content(tmp_path / "out") == {"notes.txt": b"mine"}


def test_an_output_that_cannot_be_written(fails: Fails, extracting: Arguments, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "file exists and is not empty" in fails(*extracting(tmp_path / "file"))
    message = fails(*extracting(tmp_path / "file" / "c"))
    assert str(tmp_path / "file") in message and "hint: a file stands where a folder is needed" in message
    assert (tmp_path / "file").read_text() == "mine"


# What is changed in the json, and what the message must say. Nothing may be written.
WRONG_JSON: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda d: d.update(images=[], annotations=[]), "lists no images"),
    (lambda d: d["annotations"][3].update(category_id=9999), "annotations[3]: category_id 9999"),
    (lambda d: d["annotations"][3].update(image_id=9999), "annotations[3]: image_id 9999"),
    (lambda d: d["annotations"][3].update(bbox=[3, 3, -5, 4]), "annotations[3]: bbox [3.0, 3.0, -5.0, 4.0] has a neg"),
    (lambda d: d["annotations"][3].update(bbox=[3, 3, 5]), "annotations[3]: 'bbox' must be a list of 4 numbers"),
    (lambda d: d["annotations"][3].update(id=d["annotations"][0]["id"]), "occurs 2 times, ids must be unique"),
    (lambda d: d["images"][3].update(id=d["images"][0]["id"]), "occurs 2 times, ids must be unique"),
    (lambda d: d["categories"][3].update(id=d["categories"][0]["id"]), "occurs 2 times, ids must be unique"),
    (lambda d: d["categories"].pop(), "detector has 192 foreground classes"),
]


def test_a_list_of_images_is_enough_for_detections_not_for_training(
    calib: Calib, fails: Fails, extracting: Arguments, dozen: Dozen, tmp_path: Path
) -> None:
    info = dozen(lambda d: d.pop("annotations"))
    outcome = calib(*extracting(tmp_path / "c", annotations=info))
    assert outcome.exit_code == 0, outcome.output
    cache = Cache(tmp_path / "c")
    assert cache.manifest.style == "none" and cache.n_rows == 12 * 150
    assert not (tmp_path / "c" / "annotations.parquet").exists()
    assert "dozen.json" in fails(*extracting(tmp_path / "t", annotations=info), "--mode", "train")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(("change", "said"), WRONG_JSON)
def test_a_json_that_is_wrong_is_refused_before_anything_is_written(
    fails: Fails, extracting: Arguments, dozen: Dozen, tmp_path: Path, change: Callable[[Any], object], said: str
) -> None:
    def with_own_annotations(d: dict[str, Any]) -> None:
        change(d)
        if said.startswith("detector has"):  # the last category and what was of it
            ids = {c["id"] for c in d["categories"]}
            d["annotations"] = [a for a in d["annotations"] if a["category_id"] in ids]

    message = fails(*extracting(tmp_path / "c", annotations=dozen(with_own_annotations)))
    assert said in message and "dozen.json" in message
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"annotations": "absent.json"}, "annotation file not found: absent.json"),
        ({"counts_from": "absent.json"}, "annotation file not found: absent.json"),
        ({"detector": "torchvision:absent.safetensors"}, "absent.safetensors"),
        ({"detector": "torchvison:x"}, "unknown detector framework 'torchvison'. Did you mean 'torchvision'"),
        ({"detector": "torchvision:fasterrcnn_resnet"}, "Did you mean 'fasterrcnn_resnet50_fpn"),
        ({"mode": "val"}, "mode is 'val': expected one of train, test"),
        ({"dtype": "float8"}, "dtype is 'float8': expected one of float16, float32"),
        ({"logits": "all"}, "logits is 'all': expected one of full, probe, none"),
        ({"batch_size": 0}, "batch_size is 0: expected at least 1"),
        ({"images_per_shard": 0}, "images_per_shard is 0: expected at least 1"),
        ({"seed": -1}, "seed is -1: expected at least 0"),
        ({"shard": "2/2"}, "shard is 2/2: expected i/N with i from 0 to N - 1"),
        ({"max_shard_bytes": "large"}, "'large' is no size in bytes"),
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"device": "meta"}, "device 'meta' cannot be used"),
    ],
)
def test_arguments_that_are_wrong_are_named(
    fails: Fails, extracting: Arguments, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    assert said in fails(*extracting(tmp_path / "c", **changed))
    assert not (tmp_path / "c").exists()


def test_a_detector_file_that_is_damaged(
    fails: Fails, extracting: Arguments, detector_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "d.safetensors"
    path.write_bytes(detector_file.read_bytes()[:5000])
    message = fails(*extracting(tmp_path / "c", detector=f"torchvision:{path}"))
    assert str(path) in message and "hint:" in message and not (tmp_path / "c").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated", "no picture", "another size"])
def test_a_picture_that_is_missing_or_damaged_stops_the_run_which_can_go_on(
    calib: Calib,
    fails: Fails,
    extracting: Arguments,
    shapes_set: Path,
    tmp_path: Path,
    whole: Path,
    content: Content,
    damage: str,
) -> None:
    """The seventh of twelve: three shards are committed, and once the picture is mended the run goes on."""
    images = Path(shutil.copytree(shapes_set / "images" / "val", tmp_path / "images" / "val")).parent
    picture = images / "val" / "000007.png"
    good = picture.read_bytes()
    if damage == "missing":
        picture.unlink()
    elif damage == "another size":
        Image.new("RGB", (20, 20)).save(picture)
    else:
        picture.write_bytes(good[: len(good) // 2] if damage == "truncated" else b"hello")
    message = fails(*extracting(tmp_path / "c", images=images))
    assert str(picture) in message and "hint:" in message
    assert len(Manifest.read(tmp_path / "c").shards) == 3
    picture.write_bytes(good)
    assert calib(*extracting(tmp_path / "c", "--resume", images=images)).exit_code == 0
    assert content(tmp_path / "c") == content(whole)


def test_what_is_odd_but_not_wrong(calib: Calib, extracting: Arguments, dozen: Dozen, tmp_path: Path) -> None:
    """Pictures without objects, categories without annotations, and boxes without area."""

    def odd(d: dict[str, Any]) -> None:
        first = d["images"][0]["id"]
        d["annotations"] = [a for a in d["annotations"] if a["image_id"] != first]
        d["annotations"][0]["bbox"][2] = 0
        for c in d["categories"]:
            del c["instance_count"], c["image_count"]

    outcome = calib(*extracting(tmp_path / "c", "--mode", "train", annotations=dozen(odd)))
    assert outcome.exit_code == 0, outcome.output
    cache = Cache(tmp_path / "c")
    assert 0 in cache.categories.instance_count and (cache.labels[: cache.image_start[1]] == 192).all()


@pytest.mark.slow
def test_a_limit_on_file_sizes_is_an_error_and_not_a_traceback(
    extracting: Arguments, start: Start, tmp_path: Path
) -> None:
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))"
    process = start(*extracting(tmp_path / "c"), before=limit)
    _, stderr = process.communicate()
    assert process.returncode == 2, stderr
    assert "File too large" in stderr and "hint:" in stderr and "Traceback" not in stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 900 kB, where the tests may mount one."""
    with mounted(tmp_path / "disk", 900) as place:
        yield place


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_loses_nothing_and_the_run_goes_on_when_there_is_room(
    calib: Calib,
    extracting: Arguments,
    start: Start,
    small_disk: Path,
    whole: Path,
    content: Content,
    processes: int,
) -> None:
    out = small_disk / "c"
    process = start(*extracting(out, "--processes", processes))
    stdout, stderr = process.communicate()
    assert process.returncode == 2 and stdout == "", stderr
    said = " ".join(stderr.split())
    committed = Manifest.read(out).shards
    assert f"writing the cache {out}: No space left on device" in said and "Traceback" not in said
    assert f"the {len(committed)} shards that were committed are whole" in said and "--resume" in said
    # Two workers may fill the disk before the first shard of either is committed.
    assert (0 if processes > 1 else 1) <= len(committed) < 6 and not find_damage(out).damages
    assert [p.name for p in sorted((out / "shards").iterdir())] == [s.name for s in committed]  # room is given back
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert calib(*extracting(out, "--resume")).exit_code == 0
    assert without_times(content(out)) == without_times(content(whole))
