"""One compute thread behind a bounded queue, so that health is answered while heads compute."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from .errors import BusyError

T = TypeVar("T")


@dataclass
class Place:
    """Bytes that a request holds; ``works`` once the compute thread has it."""

    size: int
    works: bool = False


class Engine:
    """Runs work one piece after the other, in the order of arrival. ``torch_threads`` is per operation."""

    def __init__(self, torch_threads: int, max_pending: int, max_pending_bytes: int) -> None:
        # OpenMP keeps its thread count per calling thread: it must be set in the thread that computes.
        self._pool = ThreadPoolExecutor(1, "calib-compute", torch.set_num_threads, (torch_threads,))
        self._max_pending, self._max_bytes = max_pending, max_pending_bytes
        self._pending = self._bytes = 0

    @property
    def pending(self) -> int:
        """Requests that were accepted and not yet answered."""
        return self._pending

    @contextmanager
    def place(self, size: int, unsent: int = 0) -> Iterator["Place"]:
        """A place in the queue for a body of at most ``size`` bytes, given back at the end, or when the work is done.

        Taken before the body is read, since waiting bodies are what fills memory, and ``unsent`` bytes of replies that
        clients have not read. A body larger than the bound on all of them is taken where it waits alone.

        Raises:
            BusyError: all places are taken.
        """
        held = self._bytes + unsent
        if self._pending >= self._max_pending or (held and held + size > self._max_bytes):
            raise BusyError(
                f"{self._pending} requests of {self._bytes} bytes are waiting already, and {unsent} bytes of replies",
                hint="try again",
            )
        self._pending += 1
        self._bytes += size
        place = Place(size)
        try:
            yield place
        finally:
            if not place.works:
                self._leave(place)

    def _leave(self, place: "Place") -> None:
        self._pending -= 1
        self._bytes -= place.size

    async def run(self, work: Callable[[], T], place: "Place") -> T:
        """Result of ``work``, computed in the compute thread.

        Who stops waiting for it drops it, and with it the body, while it is queued; begun, it keeps its ``place``.
        """
        loop = asyncio.get_running_loop()
        job = [work]
        future = self._pool.submit(lambda: job.pop()())
        place.works = True

        def ended(_: object) -> None:
            job.clear()  # the pool's queue holds on to what was cancelled
            loop.call_soon_threadsafe(self._leave, place)

        future.add_done_callback(ended)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Finish what was accepted and end the thread."""
        self._pool.shutdown(wait=True)
