"""Caches on object storage, as the mirror holds them: files of shards are fetched whole when they are needed.

A matrix that is read is open and mapped. Where the mirror is smaller than the cache, the file that was not read for
longest is let go for the next one: fine for reading in order, slow for training, which reads everywhere.
"""

import itertools
import tempfile
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.cache.matrix import MatrixFile
from calib.cache.schema import Manifest, Shard, of_stage
from calib.errors import ShapeError
from calib.layout import META, SHARDS
from calib.storage.mirror import Held, fetch, mirror, origin
from calib.storage.transfer import READERS, download, retrying

_clock = itertools.count()
_open: "weakref.WeakSet[MirroredMatrix]" = weakref.WeakSet()
_kept: dict[Path, Held] = {}  # meta tables, until the process ends


def metas(manifest: Manifest) -> list[str]:
    """The meta tables of a shard: one per stage."""
    return [of_stage(META, k) for k in range(manifest.detector.stages)]


def fetch_meta(path: Path, manifest: Manifest) -> None:
    """Fetch the meta tables of all shards of the mirrored cache ``path``; this process keeps them.

    Raises:
        As ``Mirror.fetch``.
    """

    def one(place: tuple[Shard, str]) -> tuple[Path, Held]:
        shard, file = place
        name, what = f"{SHARDS}/{shard.name}/{file}", shard.files[file]
        return path / name, fetch(path, name, what["bytes"], what["xxh3"])

    missing = [(s, f) for s in manifest.shards for f in metas(manifest) if path / SHARDS / s.name / f not in _kept]
    with ThreadPoolExecutor(READERS) as pool:
        _kept.update(pool.map(one, missing))


class MirroredMatrix:
    """As ``MatrixFile``, of a file that is fetched when a row of it is read.

    Raises, from every method: as ``MatrixFile`` and ``Mirror.fetch``.
    """

    def __init__(self, cache: Path, name: str, what: dict[str, Any], dtype: str, shape: tuple[int, int]) -> None:
        """File ``name`` of the mirrored ``cache``; ``what`` the manifest says of it."""
        self.path, self.dtype, self.shape = cache / name, np.dtype(dtype), shape
        self._where = (cache, name, what["bytes"], what["xxh3"])
        self._file: tuple[MatrixFile, Held] | None = None
        self.last_use = 0

    def _opened(self) -> MatrixFile:
        self.last_use = next(_clock)
        file = self._file  # another thread may let go of it meanwhile: what is mapped here stays mapped
        if file is None:
            with mirror().mutex:
                if (file := self._file) is None:
                    mirror().release = _let_go
                    held = fetch(*self._where)
                    matrix = MatrixFile(held.path)
                    self._check(matrix)
                    file = self._file = (matrix, held)
                    _open.add(self)
        return file[0]

    def _check(self, matrix: MatrixFile) -> None:
        if (matrix.shape, matrix.dtype) != (self.shape, self.dtype):
            raise ShapeError(
                f"{self.path} has shape {list(matrix.shape)} of {matrix.dtype}: the manifest says {list(self.shape)} "
                f"of {self.dtype}",
                hint="extract the cache again",
            )

    def let_go(self) -> None:
        """Unmap the file, so that it may be removed."""
        if self._file is not None:
            _, held = self._file
            self._file = None
            held.close()
        _open.discard(self)

    def read(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """As ``MatrixFile.read``."""
        self._opened().read(start, stop, out)

    def ask(self, start: int, stop: int) -> None:
        """As ``MatrixFile.ask``."""
        self._opened().ask(start, stop)


def _let_go() -> bool:
    """Close the open matrix that was not read for longest; False if none is open."""
    opened = sorted(_open, key=lambda m: m.last_use)
    if opened:
        opened[0].let_go()
    return bool(opened)


@contextmanager
def as_stored(path: Path) -> Iterator[Path]:
    """A file of a cache as it lies in its store now: of a mirrored cache, fetched anew and unchecked, for the moment.

    Raises:
        MissingFileError, StorageError: as ``transfer.retrying``.
    """
    cache = next((p for p in path.parents if origin(p) is not None), None)
    remote = None if cache is None else origin(cache)
    if cache is None or remote is None:
        yield path
        return
    place = remote / path.relative_to(cache).as_posix()
    with tempfile.NamedTemporaryFile(dir=mirror().writing, suffix=path.suffix) as file:
        there = retrying(lambda: place.fs.info(place.path)["size"], place)
        download(place, file.fileno(), there, None)
        yield Path(file.name)
