"""How fast is the feature cache beside a plain memory-mapped matrix, pyarrow's reader and a plain file?

    python benchmarks/cache.py                    1,000,000 x 1,024 float16: 2 GB, twice, in a temporary folder
    python benchmarks/cache.py --rows 200000 --folder /mnt/disk
    python benchmarks/cache.py --quick            40,000 rows

Everything runs in one process with one thread, in rounds, each reader once per round; metrics are the median and the
range over rounds. ``bytes``: rows as stored, into one buffer. ``float32``: as training gets them, a new array; calib's
includes the test for NaN and infinity. Cold: pages are dropped from the page cache before every round (whether the disk
keeps a cache of its own is not known). Runs: 64 of 512 rows, scattered, cold; ``read / wanted`` is what came from the
disk over what was asked for. Written: float32 rows to a committed shard, durable, beside the same bytes as a
plain file with fsync. A table goes to stderr, one JSON object to stdout.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from calib.cache.convert import to_dtype
from calib.cache.matrix import MatrixFile, write_matrix
from calib.cache.rows import RowMatrix
from calib.files import hash_file

CHUNK, SCATTERED = 4096, 512
RUN, RUNS, BATCH = 512, 64, 8  # rows, runs read, runs that are asked for together
ROWS_PER_SHARD = 131_072
Read = Callable[[], None]
Rows = NDArray[np.int64]
Metrics = dict[str, dict[str, float]]


def random_rows(n: int, width: int, seed: int) -> NDArray[np.float16]:
    """Rows as a ReLU leaves them: half of the numbers are 0."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, width), np.float32).clip(0).astype(np.float16)


def make(folder: Path, rows: int, width: int) -> tuple[list[Path], Path]:
    """The same matrix as shards of a cache and as one raw file."""
    base = random_rows(min(rows, 8192), width, 0)  # repeated: only the bytes' number matters
    shards, raw = [], folder / "raw"
    with open(raw, "wb") as f:
        for k, start in enumerate(range(0, rows, ROWS_PER_SHARD)):
            part = np.resize(base, (min(ROWS_PER_SHARD, rows - start), width))
            shards.append(folder / f"{k:05d}" / "features.parquet")
            shards[-1].parent.mkdir()
            write_matrix(shards[-1], "features", part)
            part.tofile(f)
    return shards, raw


class Readers:
    """The ways to read one matrix. Files are opened anew for every reading, before the clock starts: a live map would
    keep its pages."""

    def __init__(self, shards: list[Path], raw: Path, rows: int, width: int) -> None:
        self.shards, self.raw, self.rows, self.width = shards, raw, rows, width
        self.buffer = np.empty((CHUNK, width), np.float16)
        self.chosen = np.random.default_rng(1).integers(0, rows, SCATTERED)

    def calib(self) -> RowMatrix:
        return RowMatrix([MatrixFile(p) for p in self.shards], self.width)

    def memmap(self) -> NDArray[np.float16]:
        return np.memmap(self.raw, np.float16, "r", shape=(self.rows, self.width))

    def chunks(self) -> list[tuple[int, int]]:
        return [(a, min(a + CHUNK, self.rows)) for a in range(0, self.rows, CHUNK)]

    def opened(self, name: str) -> Any:
        """The files of a reader: calib's, memmap's or pyarrow's."""
        who = name.partition("_")[0]
        if who == "pyarrow":
            return [pq.ParquetFile(path, memory_map=True) for path in self.shards]
        return self.calib() if who == "calib" else self.memmap()

    def calib_bytes(self, matrix: RowMatrix) -> None:
        for a, b in self.chunks():
            matrix.fill(a, b, self.buffer[: b - a])

    def memmap_bytes(self, mapped: NDArray[np.float16]) -> None:
        for a, b in self.chunks():
            self.buffer[: b - a] = mapped[a:b]

    def pyarrow_bytes(self, files: list[pq.ParquetFile]) -> None:
        for part in self._of_pyarrow(files):
            self.buffer[: len(part)] = part

    def calib_float32(self, matrix: RowMatrix) -> None:
        for a, b in self.chunks():
            matrix.read(a, b)

    def memmap_float32(self, mapped: NDArray[np.float16]) -> None:
        for a, b in self.chunks():
            mapped[a:b].astype(np.float32)

    def memmap_torch(self, mapped: NDArray[np.float16]) -> None:
        for a, b in self.chunks():
            torch.from_numpy(np.array(mapped[a:b])).float()

    def pyarrow_float32(self, files: list[pq.ParquetFile]) -> None:
        for part in self._of_pyarrow(files):
            part.astype(np.float32)

    def _of_pyarrow(self, files: list[pq.ParquetFile]) -> Iterator[NDArray[np.float16]]:
        for file in files:
            for batch in file.iter_batches(CHUNK):
                yield of_batch(batch, self.width)

    def warm(self) -> None:
        """Bring all files into the page cache in one way: how pages came decides what mapping them costs."""
        self.cool()
        for path in (*self.shards, self.raw):
            with open(path, "rb", buffering=0) as f:
                while f.read(1 << 20):
                    pass

    def cool(self) -> None:
        """Drop the files from the page cache."""
        for path in (*self.shards, self.raw):
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def of_batch(batch: pa.RecordBatch, width: int) -> NDArray[np.float16]:
    """The rows of a batch of FixedSizeBinary, [n, width]."""
    column = batch.column(0)
    content = np.frombuffer(column.buffers()[1], np.float16)
    return content[column.offset * width :][: len(column) * width].reshape(-1, width)


def seconds(work: Read) -> float:
    """Wall seconds of ``work``."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    """Median, least, most."""
    return {"median": median(values), "least": min(values), "most": max(values)}


def sequential(readers: Readers, rounds: int, *, cold: bool) -> Metrics:
    """GB/s of stored bytes, and ratios within a round."""
    size = readers.rows * readers.width * 2 / 1e9
    names = ["calib_bytes", "memmap_bytes", "pyarrow_bytes"]
    names += ["calib_float32", "memmap_float32", "memmap_torch", "pyarrow_float32"]
    speeds: dict[str, list[float]] = {n: [] for n in names}
    order = np.random.default_rng(0)
    if not cold:
        readers.warm()
    for _ in range(rounds):
        for name in order.permutation(names):  # a virtual disk remembers what was read last
            if cold:
                readers.cool()
            files = readers.opened(name)
            speeds[name].append(size / seconds(partial(getattr(readers, name), files)))
            del files
    found = {n.replace("_", " "): spread(v) for n, v in speeds.items()}
    for name in names:
        who, _, what = name.partition("_")
        if who != "calib":
            ours = speeds["calib_bytes" if what == "bytes" else "calib_float32"]
            ratio = [a / b for a, b in zip(ours, speeds[name], strict=True)]
            found[f"calib / {name.replace('_', ' ')}"] = spread(ratio)
    return found


def scattered(readers: Readers, rounds: int) -> Metrics:
    """Milliseconds for rows anywhere, warm, and the ratio within a round."""
    matrix, mapped, chosen = readers.calib(), readers.memmap(), readers.chosen
    work: dict[str, Read] = {
        "calib bytes": lambda: _ignore(matrix.stored(chosen)),
        "memmap bytes": lambda: _ignore(mapped[chosen]),
        "calib float32": lambda: _ignore(matrix.take(chosen)),
        "memmap float32": lambda: _ignore(mapped[chosen].astype(np.float32)),
    }
    times: dict[str, list[float]] = {n: [] for n in work}
    for w in work.values():
        w()
    for _ in range(4 * rounds):
        for name, w in work.items():
            times[name].append(1e3 * seconds(w))
    found = {n: spread(v) for n, v in times.items()}
    for kind in ("bytes", "float32"):
        pairs = zip(times[f"calib {kind}"], times[f"memmap {kind}"], strict=True)
        found[f"calib / memmap {kind}"] = spread([a / b for a, b in pairs])
    return found


def runs(readers: Readers, rounds: int) -> Metrics:
    """Cold runs of rows in random order, as a training reads them: GB/s, and bytes from the disk for one asked for."""
    rng, found = np.random.default_rng(2), {}
    size = RUNS * RUN * readers.width * 2
    kinds = {"calib": _calib_run, "memmap": _memmap_run}
    metrics: dict[str, list[float]] = {f"{name} {what}": [] for name in kinds for what in ("GB/s", "read / wanted")}
    for _ in range(rounds):
        starts = rng.choice(readers.rows // RUN, RUNS, replace=False) * RUN
        for name in rng.permutation([*kinds]):
            readers.cool()
            before, took = _from_disk(), seconds(lambda name=name, starts=starts: kinds[name](readers, starts))
            metrics[f"{name} GB/s"].append(size / took / 1e9)
            metrics[f"{name} read / wanted"].append((_from_disk() - before) / size)
    found = {n: spread(v) for n, v in metrics.items()}
    found["calib / memmap"] = spread(
        [a / b for a, b in zip(metrics["calib GB/s"], metrics["memmap GB/s"], strict=True)]
    )
    return found


def _calib_run(readers: Readers, starts: Rows) -> None:
    matrix = readers.calib()
    for part in starts.reshape(-1, BATCH):
        rows = (part[:, None] + np.arange(RUN)).ravel()
        matrix.ask(rows)
        matrix.stored(rows, readers.buffer)


def _memmap_run(readers: Readers, starts: Rows) -> None:
    mapped = readers.memmap()
    for k, start in enumerate(starts):
        readers.buffer[k % BATCH * RUN :][:RUN] = mapped[start : start + RUN]


def _from_disk() -> int:
    """Bytes that this process had brought from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _ignore(_: object) -> None:
    pass


def written(folder: Path, rows: int, width: int, rounds: int) -> Metrics:
    """MB/s of stored bytes: a shard's matrix from float32 to durable and hashed, and a plain durable file."""
    rows = min(rows, ROWS_PER_SHARD)
    x = random_rows(rows, width, 2).astype(np.float32)
    stored = to_dtype(x, "float16")
    size = stored.nbytes / 1e6

    def ours() -> None:
        path = folder / "written.parquet"
        write_matrix(path, "features", to_dtype(x, "float16"))
        with open(path, "rb") as f:
            os.fsync(f.fileno())
        hash_file(path)

    def plain() -> None:
        with open(folder / "plain", "wb") as f:
            f.write(stored)
            f.flush()
            os.fsync(f.fileno())

    speeds: dict[str, list[float]] = {"calib": [], "plain file": []}
    for _ in range(rounds + 1):  # the first round only finds the disk's free blocks
        speeds["calib"].append(size / seconds(ours))
        speeds["plain file"].append(size / seconds(plain))
        for name in ("written.parquet", "plain"):
            (folder / name).unlink()
    speeds = {k: v[1:] for k, v in speeds.items()}
    ratio = [a / b for a, b in zip(speeds["calib"], speeds["plain file"], strict=True)]
    return {k: spread(v) for k, v in speeds.items()} | {"calib / plain file": spread(ratio)}


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    rows, rounds = (40_000, 2) if options.quick else (options.rows, options.rounds)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        shards, raw = make(folder, rows, options.width)
        readers = Readers(shards, raw, rows, options.width)
        found = {
            "warm, GB/s": sequential(readers, rounds, cold=False),
            "cold, GB/s": sequential(readers, rounds, cold=True),
            f"{SCATTERED} scattered rows, ms": scattered(readers, rounds),
            f"runs of {RUN} rows, cold": runs(readers, rounds),
            "written, MB/s": written(folder, rows, options.width, rounds),
        }
    finally:
        shutil.rmtree(folder)
    print(json.dumps({"rows": rows, "width": options.width, "rounds": rounds, **found}))
    for part, metrics in found.items():
        print(part, file=sys.stderr)
        for name, f in metrics.items():
            print(f"  {name:28} {f['median']:9.3f}   ({f['least']:.3f} - {f['most']:.3f})", file=sys.stderr)


if __name__ == "__main__":
    main()
