"""compact, merge, archive and unpack killed anywhere, or stopped by a full disk: the same call then ends in the same
files as one that was never interrupted."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from calib.cache import Cache
from calib.cache.archive import archive
from calib.cache.damage import find_damage
from calib.cache.rewrite import compact
from calib.cache.schema import Manifest
from calib.layout import MANIFEST

from ..disk import mounted
from ..toy import Toy

Content = Callable[[Path], dict[str, bytes]]

# A process of its own, killed by the kernel at its n-th system call of those that change files: moments between any two
# changes, whatever the machine's speed. Without a number it prints how many there are.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from calib.cache.archive import archive, unpack
from calib.cache.merge import merge
from calib.cache.rewrite import compact

what, source, out, n = sys.argv[1], [Path(p) for p in sys.argv[2].split(":")], Path(sys.argv[3]), int(sys.argv[4])
WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"}
calls = 0

def watch(event, arguments):
    global calls
    if event in WATCHED and str(out) in str(arguments[0]) + str(arguments[-1]) + str(arguments[1:2]):
        calls += 1
        if calls == n:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
if what == "compact":
    compact(source[0], out, rows_per_shard=25)
elif what == "merge":
    merge(source, out)
else:
    {"archive": archive, "unpack": unpack}[what](source[0], out)
print(calls)
"""


def run(what: str, sources: list[Path], out: Path, n: int) -> subprocess.CompletedProcess[str]:
    paths = ":".join(map(str, sources))
    return subprocess.run([sys.executable, "-c", SCRIPT, what, paths, str(out), str(n)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """What each command reads; opened before, so that notes of what was verified are there."""
    folder = tmp_path_factory.mktemp("sources")
    toy = Toy(images=30, most=20).write(folder / "toy").path
    archive(toy, folder / "archive")
    parts = [folder / "one", folder / "other"]
    compact(toy, parts[0])
    other = Toy(images=30, most=20)
    renumbered(other, parts[1])
    return {"compact": [toy], "archive": [toy], "unpack": [folder / "archive"], "merge": parts}


def renumbered(toy: Toy, path: Path) -> None:
    """The toy's rows as those of other images, so that both can be merged."""
    import pyarrow as pa

    from calib.cache.image_rows import ImageRows
    from calib.cache.write import CacheWriter

    cache = toy.write(path.parent / "renumbered")
    request = Manifest.read(cache.path)
    request = type(request)(request.mode, request.dtype, request.logits, request.detector, request.source)
    assert cache.logits is not None
    with CacheWriter.create(path, request, cache.categories, cache.classifier) as writer:
        writer.write_annotations(cache.annotations())
        for i, image in enumerate(cache.images.to_pylist()):
            a, b = (int(k) for k in cache.image_start[i : i + 2])
            table: pa.Table = cache.meta_of(np.arange(a, b))
            meta = {n: table[n].to_numpy() for n in table.column_names}
            meta["image_id"] = meta["image_id"] + 1000
            record = {k: v for k, v in image.items() if k not in ("shard", "row_start", "n_rows")}
            record["image_id"] += 1000
            features, logits = cache.features.read(a, b), cache.logits.read(a, b)
            if i % 10 == 0:
                rows: list[ImageRows] = []
            rows.append(ImageRows(record, meta, features, logits))
            if i % 10 == 9:
                writer.commit(f"{i // 10:05d}", rows)
        writer.finish()


def check(what: str, sources: dict[str, list[Path]], tmp_path: Path, content: Content, moments: int, seed: int) -> None:
    whole = run(what, sources[what], tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    expected, count = content(tmp_path / "whole"), int(whole.stdout)
    chosen = np.random.default_rng(seed).choice(np.arange(1, count + 1), min(moments, count), replace=False)
    for n in sorted(chosen.tolist()):
        out = tmp_path / f"killed-{n}"
        killed = run(what, sources[what], out, n)
        assert killed.returncode == -signal.SIGKILL, (n, count, killed.stderr)
        if (out / MANIFEST).exists():
            assert not [d for d in find_damage(out).damages if d.shard], n  # what is committed is whole
        again = run(what, sources[what], out, 0)
        assert again.returncode == 0, (n, again.stderr)
        assert content(out) == expected, n
        assert Manifest.read(out).digest == Manifest.read(tmp_path / "whole").digest


@pytest.mark.parametrize(("what", "moments"), [("compact", 4), ("merge", 3)])
def test_killed_anywhere_and_run_again_it_is_the_same(
    what: str, moments: int, sources: dict[str, list[Path]], tmp_path: Path, content: Content
) -> None:
    check(what, sources, tmp_path, content, moments, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["compact", "merge", "archive", "unpack"])
def test_killed_at_fifty_moments(what: str, sources: dict[str, list[Path]], tmp_path: Path, content: Content) -> None:
    check(what, sources, tmp_path, content, 50, seed=1)


# ---- a full disk

LIMIT = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
LIMIT += "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 kB, where the tests may mount one."""
    with mounted(tmp_path / "disk", 160) as place:
        yield place


def test_a_full_disk_stops_compact_which_can_go_on(
    sources: dict[str, list[Path]], small_disk: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    source, out = sources["compact"][0], small_disk / "out"
    arguments = ("cache", "compact", source, "--rows-per-shard", 10, "--out", out)
    process = start(*arguments)
    stdout, stderr = process.communicate()
    assert process.returncode == 2 and stdout == "", stderr
    assert "No space left on device" in stderr and "is there space on the disk?" in stderr
    committed = Manifest.read(out).shards
    assert committed and not find_damage(out).damages
    assert not list(out.glob("shards/.*"))  # the unfinished shard gave its space back
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    process = start(*arguments)
    assert process.wait() == 0, process.communicate()
    process.communicate()
    assert Manifest.read(out).shards[: len(committed)] == committed
    assert Cache(out).n_rows == Cache(source).n_rows


def test_a_limit_on_file_sizes_stops_compact_which_can_go_on(
    sources: dict[str, list[Path]], tmp_path: Path, start: Callable[..., subprocess.Popen[str]], content: Content
) -> None:
    """Shards are small, the manifest grows: some shards are committed, then it is too large for a file."""
    source, out = sources["compact"][0], tmp_path / "out"
    arguments = ("cache", "compact", source, "--rows-per-shard", 2, "--out")
    whole = compact(source, tmp_path / "whole", rows_per_shard=2)
    largest = (tmp_path / "whole" / MANIFEST).stat().st_size
    process = start(*arguments, out, before=LIMIT.format(largest - 1500))
    stdout, stderr = process.communicate()
    assert process.returncode == 2 and stdout == "", stderr
    assert os.strerror(errno.EFBIG) in stderr and "hint:" in stderr and "Traceback" not in stderr
    committed = Manifest.read(out).shards
    assert (
        0 < len(committed) < len(whole.shards)
        and committed == whole.shards[: len(committed)]
        and not find_damage(out).damages
    )
    process = start(*arguments, out)
    assert process.communicate() and process.returncode == 0
    assert content(out) == content(tmp_path / "whole")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
