"""One thread that takes what another one makes."""

from collections.abc import Callable, Iterator
from queue import Queue
from threading import Thread
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class ConsumerThread(Generic[T]):
    """``consume`` runs on a thread of its own, over what is ``put``; at most ``ahead`` items wait for it.

    An error of ``consume`` is raised by the next ``put``, or at the end, as itself. Where the ``with`` block fails,
    what is waiting is still consumed, and the block's error is the one that counts.
    """

    def __init__(self, consume: Callable[[Iterator[T]], None], ahead: int = 2) -> None:
        self._queue: Queue[T | None] = Queue(ahead)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, args=(consume,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def put(self, item: T) -> None:
        """Hand ``item`` over; waits while the queue is full."""
        self._queue.put(item)
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self, consume: Callable[[Iterator[T]], None]) -> None:
        items = self._items()
        try:
            consume(items)
        except BaseException as e:
            self._error = e
        for _ in items:  # nobody waits for a full queue
            pass

    def _items(self) -> Iterator[T]:
        while (item := self._queue.get()) is not None:
            yield item
