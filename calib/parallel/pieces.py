"""A file that is made in pieces: finished ones wait beside it, so that an interrupted run goes on behind them and any
number of processes, on machines that share the folder, may make them.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import xxhash

from calib.files import hash_file, lock, rename_durably
from calib.layout import HIDDEN_LOCK, PIECES


@dataclass(frozen=True)
class Pieces:
    """``count`` pieces of ``target``; those of another ``request`` are never taken for them."""

    target: Path
    request: dict[str, Any]
    count: int
    suffix: str

    @property
    def waiting(self) -> Path:
        """The folder of everything that waits to become part of ``target``."""
        return self.target.with_name(PIECES.format(self.target.name))

    @cached_property
    def folder(self) -> Path:
        """The folder of pieces; its name is that of the request."""
        return self.waiting / xxhash.xxh3_64_hexdigest(json.dumps(self.request, sort_keys=True).encode())

    def missing(self, numbers: Iterable[int] | None = None) -> list[int]:
        """Those of ``numbers``, or of all, that are not there."""
        there = self._there()
        return [k for k in (range(self.count) if numbers is None else numbers) if k not in there]

    def _there(self) -> dict[int, Path]:
        """By number; a name is ``NUMBER.HASH.SUFFIX``.

        The folder is listed: a network file system may remember for a while that a name was not there.
        """
        names = self.folder.iterdir() if self.folder.is_dir() else ()
        return {int(p.name.partition(".")[0]): p for p in names if p.name[0] != "."}

    @contextmanager
    def held(self, *, shared: bool = False) -> Iterator[None]:
        """While this lasts no other process joins the pieces, or, unless ``shared``, writes any.

        Alone, it removes the pieces of other requests, and those that are not as they were written.

        Raises:
            ExistsError: another process is at it.
        """
        with lock(self.waiting / HIDDEN_LOCK, f"writing {self.target}", shared=shared):
            self.folder.mkdir(exist_ok=True)
            for other in () if shared else self.waiting.iterdir():
                if other.is_dir() and other != self.folder:
                    shutil.rmtree(other)
            for piece in () if shared else self._there().values():
                if piece.name.split(".")[1] != hash_file(piece):
                    piece.unlink()
            yield

    @contextmanager
    def written(self, number: int) -> Iterator[Path]:
        """A temporary name to write piece ``number`` to. Whoever else writes the same one at the same time, on whatever
        machine, has another."""
        temporary = self.folder / f".{number:05d}.{uuid4().hex}.tmp"
        try:
            yield temporary
            rename_durably(temporary, self.folder / f"{number:05d}.{hash_file(temporary)}{self.suffix}")
        finally:
            temporary.unlink(missing_ok=True)

    def all(self) -> list[Path]:
        """In their order."""
        there = self._there()
        return [there[k] for k in range(self.count)]

    def remove(self) -> None:
        """Once ``target`` is there, or there is nothing to go on with."""
        shutil.rmtree(self.waiting, ignore_errors=True)  # a worker may end a moment later than its cluster says
