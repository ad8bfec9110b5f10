"""Batches from the cache: a thread reads the next ones while the current one is computed on.

Batches are those that the sampler names, in its order: what a training sees does not depend on the thread. Memory is
that of ``SLOTS`` batches as stored and one in float32, whatever the size of the cache.

Letters: n rows of a step, D feature size, C foreground classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from calib.cache import Cache
from calib.cache.rows import RowMatrix, Rows
from calib.parallel.distributed import ALONE, World
from calib.sampling import Sampler, Step
from calib.training.batch import Batch

SLOTS = 2  # one is read while the other waits for its turn; the batch in use has a place of its own


_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class BatchSource:
    """Where batches come from: the rows that ``sampler`` names, of ``rows`` (features or RoI maps of ``cache``)."""

    cache: Cache
    rows: RowMatrix
    sampler: Sampler

    def gives_batches_of(self, other: "BatchSource") -> bool:
        """Whether both give the same batches."""
        return self.rows is other.rows and self.sampler.identity == other.sampler.identity


class _Slot:
    """A place for one batch as stored; pinned where it is copied to a GPU, so that the copy runs beside the kernels."""

    def __init__(self, rows: RowMatrix, device: torch.device) -> None:
        self._width, self._dtype = rows.shape[1], _DTYPES[rows.dtype.name]
        self._pinned = device.type == "cuda"
        self._place = torch.empty(0, self._width, dtype=self._dtype)
        self._copied: torch.cuda.Event | None = None

    def room(self, n: int) -> Tensor:
        """[n, D] to write into; waits until what lay there was copied."""
        if self._copied is not None:
            self._copied.synchronize()
        if len(self._place) < n:
            self._place = torch.empty(n, self._width, dtype=self._dtype, pin_memory=self._pinned)
        return self._place[:n]

    def on(self, device: torch.device, n: int) -> Tensor:
        """[n, D] of what was read, as stored; on a CPU the place itself."""
        copy = self._place[:n].to(device, non_blocking=True)
        if self._pinned:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        return copy


@dataclass(frozen=True)
class _Read:
    slot: _Slot
    rows: Rows
    chosen: Step
    labels: Tensor


class BatchLoader:
    """The batches of steps ``first`` to ``stop``, read ahead. A context: its thread ends with it, however it ends.

    Every process of ``world`` goes through the same steps and reads its own share of their rows. Iterating raises what
    the reading raised, at the step that it belongs to.
    """

    def __init__(self, source: BatchSource, first: int, stop: int, device: torch.device, world: World = ALONE) -> None:
        self._source, self._steps, self._device, self._world = source, range(first, stop), device, world
        self._free: SimpleQueue[_Slot | None] = SimpleQueue()
        self._ready: SimpleQueue[_Read | BaseException] = SimpleQueue()
        self._closed = False
        self._whole = torch.empty(0, source.rows.shape[1], device=device)
        preloaded = source.rows.preloaded
        self._preloaded = preloaded if preloaded is not None and preloaded.device == self._whole.device else None
        for _ in range(SLOTS):
            self._free.put(_Slot(source.rows, device))
        # A daemon: a second Ctrl-C while the first is being dealt with must not wait for a slow disk.
        self._thread = Thread(target=self._read_all, name="calib-loader", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closed = True
        self._free.put(None)
        self._thread.join()

    def __iter__(self) -> Iterator[Batch]:
        for step in self._steps:
            read = self._ready.get()
            if isinstance(read, BaseException):
                raise read
            features = self._float32(self._stored(read))
            self._free.put(read.slot)
            labels, chunk = read.labels.to(self._device), torch.from_numpy(read.chosen.chunk).to(self._device)
            yield Batch(step, features, labels, chunk, read.chosen.n_chunks, self._world, rows=read.chosen.rows)

    def _stored(self, read: _Read) -> Tensor:
        if self._preloaded is None:
            return read.slot.on(self._device, len(read.rows))
        return self._preloaded.index_select(0, torch.from_numpy(read.rows).to(self._device))

    def _float32(self, stored: Tensor) -> Tensor:
        if self._device.type != "cpu":
            return stored.float()  # the device's own allocator keeps the memory
        if len(self._whole) < len(stored):
            self._whole = torch.empty(stored.shape)
        return self._whole[: len(stored)].copy_(stored)

    def _read_all(self) -> None:
        try:
            for step in self._steps:
                slot = self._free.get()
                if slot is None or self._closed:
                    return
                self._ready.put(self._read(slot, step))
        except BaseException as e:
            self._ready.put(e)

    def _read(self, slot: _Slot, step: int) -> _Read:
        source, chosen = self._source, self._source.sampler.step(step)
        rows = self._world.shard(chosen.rows)
        if self._preloaded is None:
            source.rows.ask(chosen.rows)
            source.rows.checked(rows, slot.room(len(rows)).numpy())
        return _Read(slot, rows, chosen, torch.from_numpy(source.cache.labels[chosen.rows].astype(np.int64)))
