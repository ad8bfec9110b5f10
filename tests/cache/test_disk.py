"""What is asked of the disk ahead of reading it."""

import os
import subprocess
import sys
import time
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.cache.disk import ASKED_BYTES, Disk
from calib.cache.matrix import ROWS_PER_GROUP, MatrixFile, write_matrix
from calib.cache.rewrite import compact
from calib.cache.rows import RowMatrix

from ..toy import Toy

WIDTH = 300


class Asked(Disk):
    """Keeps which pages were asked for."""

    def __init__(self, file: MatrixFile) -> None:
        super().__init__(file.path)
        self.pages = np.zeros(-(-len(file.mapped) // PAGESIZE), bool)
        file._disk = self

    def ask(self, low: int, high: int) -> None:
        super().ask(low, high)
        self.pages[low // PAGESIZE : (high - 1) // PAGESIZE + 1] = True


def written(path: Path, n: int) -> MatrixFile:
    write_matrix(path, "features", np.random.default_rng(n).standard_normal((n, WIDTH)).astype(np.float16))
    return MatrixFile(path)


def pages_of(file: MatrixFile, picked: Any) -> Any:
    """The pages on which rows lie, found by where their numbers are in memory."""
    pages = np.zeros(-(-len(file.mapped) // PAGESIZE), bool)
    for i in picked:
        row = file._blocks[i // ROWS_PER_GROUP][i % ROWS_PER_GROUP]
        at = row.ctypes.data - file.mapped.ctypes.data
        pages[at // PAGESIZE : (at + row.nbytes - 1) // PAGESIZE + 1] = True
    return pages


def test_for_the_rows_and_nothing_else(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a", ROWS_PER_GROUP), written(tmp_path / "b", 2 * ROWS_PER_GROUP)
    of_a, of_b = Asked(a), Asked(b)
    picked = np.concatenate([np.arange(4000, 5000), [8191, 8192, 7, 12287]])
    RowMatrix([a, b], WIDTH).ask(picked)
    assert np.array_equal(of_a.pages, pages_of(a, picked[picked < ROWS_PER_GROUP]))
    assert np.array_equal(of_b.pages, pages_of(b, picked[picked >= ROWS_PER_GROUP] - ROWS_PER_GROUP))


LIMITED = """
import resource, sys
from pathlib import Path
from calib.cache import Cache
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
print(Cache(Path(sys.argv[1])).features.shape[0])
"""


@pytest.mark.parametrize(("hard", "said"), [(4096, "{rows}"), (150, "{shards} files are to be mapped, for which")])
def test_many_shards_raise_the_soft_limit_on_open_files(tmp_path: Path, hard: int, said: str) -> None:
    rows = Toy(images=60).write(tmp_path / "two").n_rows
    shards = len(compact(tmp_path / "two", tmp_path / "cache", rows_per_shard=1).shards)
    assert shards > 40
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "cache"), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert said.format(rows=rows, shards=shards) in done.stdout + done.stderr


def test_what_was_asked_for_is_in_memory_soon(tmp_path: Path) -> None:
    file = written(tmp_path / "m", ROWS_PER_GROUP)
    with open(file.path, "rb") as f:
        os.fsync(f.fileno())
        del file
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    disk = Disk(tmp_path / "m")
    if disk._has(2 * ASKED_BYTES):
        pytest.skip("this file system keeps its files in memory")
    disk.ask(ASKED_BYTES, 4 * ASKED_BYTES)
    for _ in range(1000):
        if disk._has(ASKED_BYTES) and disk._has(4 * ASKED_BYTES - 1):
            break
        time.sleep(0.01)
    else:
        pytest.fail("it did not come within ten seconds")
    assert not disk._has(8 * ASKED_BYTES)
