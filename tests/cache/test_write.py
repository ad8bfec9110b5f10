"""Writing caches: killed anywhere and resumed, the files are those of a run that was not; foreign folders stay as
they are; numbers that a cache cannot hold are refused with the image's name."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calib.cache import Cache
from calib.cache.image_rows import ImageRows
from calib.cache.schema import Manifest
from calib.cache.write import CacheWriter
from calib.errors import ExistsError, FormatError, InputError, MissingFileError, NonFiniteError, ShapeError
from calib.layout import MANIFEST

Write = Callable[..., Path]
Writer = Callable[..., CacheWriter]
Content = Callable[[Path], dict[str, bytes]]

# Runs as a process of its own: writes the cache of conftest.write_cache, or goes on with it, and is killed by the
# kernel at the n-th call of a function of calib.cache.
SCRIPT = """
import importlib.util, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("made_up", sys.argv[1])
made_up = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made_up)
from calib.cache import matrix, shard, write
from calib.cache.schema import Manifest

path, point, n = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
owner, _, name = point.rpartition(".")
owner = {"write": write, "shard": shard, "MatrixWriter": matrix.MatrixWriter, "Manifest": Manifest}[owner]
real, calls = getattr(owner, name), []

def deadly(*arguments, **options):
    calls.append(1)
    if len(calls) == n:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)

setattr(owner, name, deadly)
made_up.fill(write.CacheWriter.create(path, made_up.manifest(), made_up.categories(), made_up.classifier()))
"""
# What was committed when the process died there.
KILLS = [
    ("Manifest.write", 1, None),  # categories and classifier are written
    ("Manifest.write", 2, 0),  # the first shard and images.parquet are in place, but not listed
    ("Manifest.write", 4, 2),
    ("Manifest.write", 5, 3),  # before it was marked as complete
    ("MatrixWriter._write", 2, 0),  # in the midst of the first shard
    ("MatrixWriter._write", 3, 1),
    ("shard.fsync_dir", 2, 1),  # the second shard is whole under its temporary name
    ("write.fsync_dir", 2, 1),  # ... and under its own
    ("write.write_images", 3, 2),
]


@pytest.mark.parametrize(("point", "n", "committed"), KILLS)
def test_killed_and_resumed_it_is_the_cache_of_an_uninterrupted_run(
    tmp_path: Path,
    write_cache: Write,
    begin: Writer,
    resume: Writer,
    go_on: Callable[[CacheWriter], None],
    content: Content,
    point: str,
    n: int,
    committed: int | None,
) -> None:
    path, conftest = tmp_path / "killed", Path(__file__).with_name("conftest.py")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(conftest), str(path), point, str(n)], capture_output=True, text=True
    )
    assert run.returncode == -9, run.stderr
    if committed is None:
        assert not (path / MANIFEST).exists() and (path / "classifier.safetensors").exists()
        go_on(begin(path))
    else:
        assert len(Manifest.read(path).shards) == committed
        with pytest.raises(InputError, match=f"stopped after {committed} shards") as e:
            Cache(path)
        assert "--resume" in e.value.hint
        go_on(resume(path))
    whole = write_cache("uninterrupted")
    assert content(path) == content(whole)
    assert Cache(path).digest == Cache(whole).digest


def test_resuming_removes_what_a_killed_run_left_even_if_its_number_lives_on(
    tmp_path: Path, begin: Writer, resume: Writer
) -> None:
    """Whoever holds the lock is alone: a temporary file is nobody's, although a process of that number runs."""
    with begin(tmp_path / "cache"):
        pass
    (tmp_path / "cache" / f".images.parquet.{os.getppid()}.tmp").touch()
    with resume(tmp_path / "cache"):
        assert not list((tmp_path / "cache").glob(".*.tmp"))


def test_a_second_writer_is_refused(tmp_path: Path, begin: Writer, resume: Writer) -> None:
    path = tmp_path / "cache"
    with begin(path) as writer:
        for second in (resume, begin):
            with pytest.raises(ExistsError, match=str(path)):
                second(path)
        assert writer.manifest == Manifest.read(path)
    with resume(path):  # free again
        pass


def test_a_writer_that_waited_sees_what_was_committed_meanwhile(
    tmp_path: Path, begin: Writer, resume: Writer, rows_of: Callable[[int, int], ImageRows]
) -> None:
    with begin(tmp_path / "cache") as writer:
        writer.commit("00000", [rows_of(1, 2)])
    with resume(tmp_path / "cache") as writer:
        assert [s.name for s in writer.manifest.shards] == ["00000"]
        writer.commit("00001", [rows_of(2, 2)])
        writer.finish()
    assert Cache(tmp_path / "cache").images["image_id"].to_pylist() == [1, 2]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mode": "train"}, "mode"),
        ({"dtype": "float16"}, "dtype"),
        ({"logits": "none"}, "logits"),
        ({"source": {"annotations": "val.json", "seed": 1}}, "seed"),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, begin: Writer, resume: Writer, content: Content, changes: dict[str, object], named: str
) -> None:
    with begin(tmp_path / "cache"):
        pass
    before = content(tmp_path / "cache")
    with pytest.raises(InputError, match=rf"begun with other settings \({named}\)"):
        resume(tmp_path / "cache", **changes)
    assert content(tmp_path / "cache") == before
    with resume(tmp_path / "cache"):  # the lock is free
        pass


def test_nothing_to_resume(tmp_path: Path, resume: Writer) -> None:
    with pytest.raises(MissingFileError, match="no feature cache"):
        resume(tmp_path)


def test_a_table_that_was_damaged_before_resuming_is_named(
    tmp_path: Path, begin: Writer, resume: Writer, rows_of: Callable[[int, int], ImageRows]
) -> None:
    with begin(tmp_path / "cache") as writer:
        writer.commit("00000", [rows_of(1, 2)])
    (tmp_path / "cache" / "images.parquet").write_bytes(b"PAR1")
    with pytest.raises(FormatError, match=r"images\.parquet cannot be read"):
        resume(tmp_path / "cache")


@pytest.mark.parametrize("name", ["notes.txt", ".git/config", "shards/mine.txt", "images.parquet", ".notes.tmp"])
def test_a_folder_with_other_files_is_refused_and_left_alone(
    tmp_path: Path, begin: Writer, content: Content, name: str
) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ExistsError, match="exists and is not empty"):
        begin(tmp_path / "out")
    assert content(tmp_path / "out") == {name: b"mine"}


def test_a_file_or_a_cache_is_not_overwritten(tmp_path: Path, begin: Writer, write_cache: Write) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExistsError, match="file exists and is not empty"):
        begin(tmp_path / "file")
    with pytest.raises(ExistsError, match="holds a cache already") as e:
        begin(write_cache())
    assert "--resume" in e.value.hint


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("what", ["features", "logits"])
def test_numbers_that_are_not_finite_never_enter(
    tmp_path: Path, begin: Writer, rows_of: Callable[[int, int], ImageRows], what: str, value: float
) -> None:
    bad = rows_of(8, 3)
    getattr(bad, what)[2, 1] = value
    with begin(tmp_path / "cache") as writer:
        writer.commit("00000", [rows_of(7, 3)])
        with pytest.raises(NonFiniteError, match=f"gave NaN or infinite {what} for image 8"):
            writer.commit("00001", [rows_of(9, 3), bad])
    assert [s.name for s in Manifest.read(tmp_path / "cache").shards] == ["00000"]


def test_numbers_beyond_float16_are_refused_and_fit_float32(
    tmp_path: Path, begin: Writer, rows_of: Callable[[int, int], ImageRows]
) -> None:
    large = rows_of(8, 3)
    large.features[0, 0] = 65519.9  # rounds to the largest float16, 65504
    with begin(tmp_path / "fits", dtype="float16") as writer:
        writer.commit("00000", [large])
    large.features[0, 0] = 65520  # rounds to infinity
    with begin(tmp_path / "half", dtype="float16") as writer, pytest.raises(NonFiniteError) as e:
        writer.commit("00000", [rows_of(7, 1), large])
    assert "features of image 8 exceed the range of float16" in str(e.value)
    assert "--dtype float32" in e.value.hint
    with begin(tmp_path / "full", dtype="float32") as writer:
        writer.commit("00000", [large])


def test_rows_of_unequal_number_are_refused(rows_of: Callable[[int, int], ImageRows]) -> None:
    with pytest.raises(ShapeError, match=r"image 8 has 2 feature rows but .*'logits': 3"):
        replace(rows_of(8, 3), features=np.zeros((2, 5), np.float32))


def test_a_shard_that_failed_leaves_no_trace_after_resuming(
    tmp_path: Path,
    begin: Writer,
    resume: Writer,
    rows_of: Callable[[int, int], ImageRows],
    go_on: Callable[[CacheWriter], None],
    content: Content,
    write_cache: Write,
) -> None:
    bad = rows_of(8, 3)
    bad.features[0] = np.nan
    with begin(tmp_path / "cache") as writer, pytest.raises(NonFiniteError):
        writer.commit("00000", [bad])
    go_on(resume(tmp_path / "cache"))
    assert content(tmp_path / "cache") == content(write_cache("whole"))
