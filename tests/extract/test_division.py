"""Parts of a set, several processes and limits on shards: the cache is that of one process and one command."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.cache import Cache
from calib.cache.merge import merge
from calib.cache.schema import Manifest
from calib.cache.shard import row_bytes
from calib.errors import InputError, ProcessError, SettingError
from calib.extract.dataset import Dataset
from calib.extract.extraction import Division, extract
from calib.extract.options import Extraction
from calib.extract.torchvision import TorchvisionAdapter
from calib.parallel.part import ARRAY, LAUNCHERS, Part
from calib.settings import parse_bytes

pytest.importorskip("torchvision")

Document = Callable[..., dict[str, Any]]
Read = Callable[[dict[str, Any]], Dataset]
Content = Callable[[Path], dict[str, bytes]]

BOXES = [(i + 1, 10 * (i % 4 + 1), 5, 5, 20, 20) for i in range(7)]
SETTINGS = Extraction("train", images_per_shard=2, batch_size=2)


@pytest.fixture
def dataset(document: Document, read: Read) -> Dataset:
    return read(document([(40, 60)] * 7, BOXES))


@pytest.fixture
def run(adapter: TorchvisionAdapter, dataset: Dataset, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, division: Division = Division(), resume: bool = False, **changed: Any) -> Path:
        settings = replace(SETTINGS, **changed)
        extract(adapter, dataset, tmp_path / "images", tmp_path / name, settings, division, resume=resume)
        return tmp_path / name

    return make


@pytest.mark.parametrize("count", [2, 3, 4])
def test_merged_parts_are_the_cache_of_one_run(run: Callable[..., Path], tmp_path: Path, count: int) -> None:
    whole = Cache(run("whole"))
    parts = [run(f"part-{i}", Division(Part(i, count))) for i in range(count)]
    names = [s.name for p in parts for s in Manifest.read(p).shards]
    assert names == [s.name for s in whole.manifest.shards]
    merge(parts, tmp_path / "merged")
    merged = Cache(tmp_path / "merged")
    assert merged.digest == whole.digest and merged.manifest.shards == whole.manifest.shards
    assert merged.images.equals(whole.images)
    assert merged.annotations().equals(whole.annotations())
    assert np.array_equal(merged.features.read(0, merged.n_rows), whole.features.read(0, whole.n_rows))


def test_parts_cover_everything_once() -> None:
    for total in range(20):
        for count in range(1, 9):
            parts = [Part(i, count).of(total) for i in range(count)]
            assert [k for p in parts for k in p] == list(range(total))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_part_is_resumed_as_that_part_only(run: Callable[..., Path]) -> None:
    path = run("part", Division(Part(0, 2)))
    for other in (Division(Part(1, 2)), Division()):
        with pytest.raises(InputError, match=r"other settings \(part\)"):
            run("part", other, resume=True)
    before = Manifest.read(path)
    run("part", Division(Part(0, 2)), resume=True)
    assert Manifest.read(path) == before
    with pytest.raises(InputError, match="part 0 of 9 is empty: 7 images make 4 shards"):
        run("none", Division(Part(0, 9)))


def test_parts_are_named_or_told_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*(n for names in LAUNCHERS for n in names), *ARRAY):
        monkeypatch.delenv(name, raising=False)
    assert Part.parse("0/1") == Part() and Part.parse("3/4") == Part(3, 4)
    for wrong in ("4/4", "1", "a/b", "-1/4", "1/0", ""):
        with pytest.raises(SettingError, match=r"expected i/N with i from 0 to N - 1"):
            Part.parse(wrong)
    with pytest.raises(SettingError, match="neither RANK and WORLD_SIZE nor"):
        Part.parse("env")
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert Part.parse("env") == Part(2, 8)
    for name, value in zip(ARRAY, ("3", "10", "0", "9"), strict=True):
        monkeypatch.setenv(name, value)
    assert Part.parse("env") == Part(3 * 8 + 2, 10 * 8)
    monkeypatch.delenv("SLURM_PROCID")
    assert Part.parse("env") == Part(3, 10)
    for name, value in zip(ARRAY, ("3", "2", "3", "7"), strict=True):  # two tasks of an array, sent again
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match="2 tasks numbered 3 to 7: expected 0 to N - 1"):
        Part.parse("env")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Part.parse("env") == Part(1, 3)


@pytest.mark.parametrize("logits", ["full", "probe", "none"])
@pytest.mark.parametrize("mode", ["train", "test"])
def test_no_shard_is_larger_than_it_may_be(
    run: Callable[..., Path], adapter: TorchvisionAdapter, mode: str, logits: str
) -> None:
    plain = Manifest.read(run("plain", mode=mode, logits=logits, images_per_shard=7))
    assert len(plain.shards) == 1
    per_image = adapter.most_rows(mode) * row_bytes(plain)
    path = run("small", mode=mode, logits=logits, images_per_shard=7, max_shard_bytes=3 * per_image + 5)
    shards = Manifest.read(path).shards
    assert [s.images for s in shards] == [3, 3, 1]
    assert all(s.rows <= 3 * adapter.most_rows(mode) for s in shards)
    for s in shards:
        matrices = sum((path / "shards" / s.name / f"{n}.parquet").stat().st_size for n in ("features",))
        assert matrices <= 3 * per_image + 5
    tiny = Manifest.read(run("tiny", mode=mode, logits=logits, max_shard_bytes=1))
    assert [s.images for s in tiny.shards] == [1] * 7  # an image is never divided


def test_sizes_are_read_as_people_write_them() -> None:
    sizes = {"0": 0, "1000": 1000, "256MB": 256_000_000, "1GiB": 2**30, "1.5 kB": 1500}
    assert {t: parse_bytes(t) for t in sizes} == sizes
    for wrong in ("large", "", "5 XB"):
        with pytest.raises(SettingError, match="is no size in bytes"):
            parse_bytes(wrong)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_changes_the_forward_pass_and_nothing_else(
    detector: Any, adapter: TorchvisionAdapter, dataset: Dataset, tmp_path: Path, precision: str
) -> None:
    """Proposals stay float32 boxes, rows are near those of float32, and logits are features times the classifier."""
    half = TorchvisionAdapter(detector, "tiny", torch.device("cpu"))
    half.precision = precision
    settings = replace(SETTINGS, mode="test", dtype="float32")
    for name, a in (("exact", adapter), ("half", half)):
        extract(a, dataset, tmp_path / "images", tmp_path / name, settings)
    exact, cache = Cache(tmp_path / "exact"), Cache(tmp_path / "half")
    assert cache.manifest.source["precision"] == precision and "precision" not in exact.manifest.source
    x, z = cache.features.read(0, cache.n_rows), cache.logits.read(0, cache.n_rows)  # type: ignore[union-attr]
    assert np.abs(cache.classifier.logits(x) - z).max() < 1e-5
    assert np.abs(x).max() > 0.1 and not np.array_equal(x, exact.features.read(0, exact.n_rows)[: len(x)])
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    own = half.rois([picture])[0].proposals
    assert (own != own.astype(np.float16)).any()  # boxes are not decoded in half precision
    boxes = np.asarray([[2, 3, 30, 35], [10, 4, 50, 30], [0, 0, 60, 40]], np.float32)
    pair = [a.rois([picture], lambda *_: (boxes, np.ones(3, np.float32)))[0].features for a in (adapter, half)]
    assert np.abs(pair[0] - pair[1]).max() < 0.03 * np.abs(pair[0]).max()
    with pytest.raises(InputError, match=r"other settings \(precision\)"):
        extract(adapter, dataset, tmp_path / "images", tmp_path / "half", settings, resume=True)


def test_the_rows_of_a_shard_are_not_held_in_memory(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image is handed to the matrices before the next but few is made: told by the order of both."""
    from calib.cache import shard
    from calib.extract import pipeline

    events: list[str] = []
    real_launch, real_add = pipeline.launch, shard._Sink.add
    monkeypatch.setattr(pipeline, "launch", lambda *a: events.append("made") or real_launch(*a))  # type: ignore[func-returns-value]
    monkeypatch.setattr(shard._Sink, "add", lambda s, one: events.append("written") or real_add(s, one))  # type: ignore[func-returns-value]
    run("whole", images_per_shard=7, batch_size=1, logits="none", check_images=0)
    waiting, most = 0, 0
    for e in events:
        waiting += 1 if e == "made" else -1
        most = max(most, waiting)
    assert events.count("written") == 7 and waiting == 0 and most <= 4  # in work, two in the queue, one being made


# ---- several processes, on the command line


Start = Callable[..., subprocess.Popen[str]]
Command = Callable[..., list[Any]]


def test_several_processes_write_the_cache_of_one(
    calib: Callable[..., Any], start: Start, command: Command, tmp_path: Path, content: Content
) -> None:
    assert calib(*command(tmp_path / "one")).exit_code == 0
    process = start(*command(tmp_path / "two", "--processes", 2))
    assert process.communicate() and process.returncode == 0
    assert content(tmp_path / "two") == content(tmp_path / "one")


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def extracting_children(process: subprocess.Popen[str], cache: Path) -> list[int]:
    """The workers, once a shard is committed; not the resource tracker."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (cache / "manifest.json").exists() and Manifest.read(cache).shards:
            found = [c for c in children(process.pid) if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
            assert found
            return found
        time.sleep(0.01)
    raise AssertionError(process.communicate())


SLOW = """
import os
os.environ["PYTHONPATH"] = {path!r} + os.pathsep + os.environ.get("PYTHONPATH", "")
"""
SLOWER = """
import calib.extract.pipeline as p, time
real = p.launch
def slow(*a):
    time.sleep(0.4)
    return real(*a)
p.launch = slow
"""


@pytest.fixture
def slow(tmp_path: Path) -> str:
    """Python that makes the workers of a command slow."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(
        "import sys\nif any('spawn_main' in a for a in sys.orig_argv):\n"
        + "".join(f"    {line}\n" for line in SLOWER.strip().splitlines())
    )
    return SLOW.format(path=str(tmp_path / "slow"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["worker", "all", "ctrl-c"])
def test_processes_that_are_killed_lose_no_committed_shard(
    calib: Callable[..., Any], start: Start, command: Command, slow: str, tmp_path: Path, content: Content, how: str
) -> None:
    out = tmp_path / "cache"
    process = start(*command(out, "--processes", 2), before=slow)
    workers = extracting_children(process, out)
    if how == "worker":
        os.kill(workers[0], signal.SIGKILL)
    else:
        process.send_signal(signal.SIGKILL if how == "all" else signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == {"worker": 2, "all": -9, "ctrl-c": 130}[how], stderr
    if how == "worker":
        assert "of 2 ended with code -9" in stderr and "--resume" in stderr and "Traceback" not in stderr
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{w}").exists() for w in workers):  # nobody is left behind
        assert time.monotonic() < deadline
        time.sleep(0.05)
    committed = Manifest.read(out).shards
    assert 0 < len(committed) < 6
    assert calib(*command(out, "--resume")).exit_code == 0
    assert calib(*command(tmp_path / "whole")).exit_code == 0
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
def test_an_error_of_a_process_arrives_as_itself(
    start: Start, command: Command, shapes_set: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "val").symlink_to(shapes_set / "images" / "val")
    data = json.loads((shapes_set / "val.json").read_bytes())
    data["images"][-1]["file_name"] = "val/absent.png"
    (tmp_path / "a.json").write_text(json.dumps(data))
    arguments = command(tmp_path / "cache", "--processes", 2, "--annotations", tmp_path / "a.json")
    process = start(*arguments)
    stderr = process.communicate()[1]
    assert process.returncode == 2 and "absent.png" in stderr and "Traceback" not in stderr, stderr


def test_errors_that_cannot_be_sent_are_told() -> None:
    from calib.extract.workers import _sendable

    class LocalError(Exception):
        pass

    sent = _sendable(LocalError("what happened"))
    assert isinstance(sent, ProcessError) and "LocalError: what happened" in str(sent)
    kept = InputError("x", hint="y")
    assert _sendable(kept) is kept
