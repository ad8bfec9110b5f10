"""The thread that writes: bounded, and its errors arrive as themselves."""

import threading
from collections.abc import Iterator

import pytest

from calib.extract.consumer_thread import ConsumerThread


def test_everything_arrives_in_order_and_is_done_at_the_end() -> None:
    got: list[int] = []
    with ConsumerThread(got.extend) as background:
        for i in range(100):
            background.put(i)
    assert got == list(range(100))


def test_no_more_waits_than_is_allowed() -> None:
    go, made = threading.Event(), []

    def consume(items: Iterator[int]) -> None:
        for _ in items:
            go.wait()

    def produce() -> None:
        with ConsumerThread(consume, ahead=2) as background:
            for i in range(9):
                background.put(i)
                made.append(i)

    thread = threading.Thread(target=produce)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and len(made) <= 3  # one is in work, two wait
    go.set()
    thread.join()
    assert len(made) == 9


def failing(error: Exception) -> ConsumerThread[int]:
    def consume(items: Iterator[int]) -> None:
        next(items)
        raise error

    return ConsumerThread(consume, ahead=1)


@pytest.mark.parametrize("puts", [1, 50])
def test_an_error_is_raised_as_itself_and_nobody_waits_for_the_dead(puts: int) -> None:
    error = OSError(28, "full")
    with pytest.raises(OSError) as e, failing(error) as background:
        for i in range(puts):
            background.put(i)
    assert e.value is error


def test_an_error_of_the_block_comes_first_and_what_waits_is_still_consumed() -> None:
    got: list[int] = []
    with pytest.raises(KeyboardInterrupt), ConsumerThread(got.extend) as background:
        background.put(1)
        background.put(2)
        raise KeyboardInterrupt
    assert got == [1, 2]
    with pytest.raises(KeyError), failing(ValueError()) as other:
        other._queue.put(1)
        raise KeyError
