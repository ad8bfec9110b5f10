"""Several heads trained from one reading of the cache.

Every head is fitted by its own thread, but only one of them, or the pass that feeds them, runs at any time: a thread
that wants to train waits until all have come as far, then those whose batches are the same learn from each batch in
turn. What a head learns is what it learns alone, to the bit.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread

import torch

from calib.heads.feed import Feed, Learner, Portion, Source
from calib.progress import Bar, Progress


@dataclass
class _Member:
    """A training that waits in its thread; ``outcome`` wakes it, with an error or with none."""

    learner: Learner
    source: Source
    outcome: "SimpleQueue[BaseException | None]" = field(default_factory=SimpleQueue)


class Cancelled(BaseException):
    """Raised in a waiting training when another thing ended all of them; it is no error of its own."""


class Passes:
    """``run`` starts the fits; each is given ``join`` as its ``FitRun.drive``.

    Args:
        device: of all heads.
        progress: opens one bar per pass.
        note: told of every pass: the names of its trainings.
    """

    def __init__(self, device: torch.device, progress: Progress, note: Callable[[list[str]], None]) -> None:
        self._device, self._progress, self._note = device, progress, note
        self._waiting: list[_Member] = []
        self._turn: SimpleQueue[_Member | None] = SimpleQueue()  # a training that waits, or None: a fit has ended
        self._closed = False

    def join(self, learner: Learner, source: Source) -> None:
        """Wait until ``learner`` has had all its steps; raises what its training or the reading raised."""
        if self._closed:
            raise Cancelled
        member = _Member(learner, source)
        self._turn.put(member)
        error = member.outcome.get()
        if error is not None:
            raise error

    def run(self, fits: Sequence[Callable[[], None]]) -> list[BaseException | None]:
        """Run all ``fits``; the error of each, None where it ended well. One that fails does not stop the others.

        An interruption (Ctrl-C) ends all of them, with ``Cancelled``, before it is raised.
        """
        errors: list[BaseException | None] = [None] * len(fits)

        def work(k: int) -> None:
            try:
                fits[k]()
            except BaseException as e:
                errors[k] = e
            self._turn.put(None)

        threads = [Thread(target=work, args=(k,), name=f"calib-fit-{k}", daemon=True) for k in range(len(fits))]
        started: list[Thread] = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
                self._wait()
            while self._waiting:
                self._pass()
        finally:
            self._cancel(started)
        return errors

    def _wait(self) -> None:
        """Until the one thread that runs waits or ends."""
        member = self._turn.get()
        if member is not None:
            self._waiting.append(member)

    def _wake(self, member: _Member, error: BaseException | None) -> None:
        self._waiting.remove(member)
        member.outcome.put(error)
        self._wait()

    def _pass(self) -> None:
        """Train the first of those that wait, and all that take the same batches."""
        source = self._waiting[0].source
        members = [m for m in self._waiting if m.source.feeds(source)]
        names = [m.learner.label for m in members]
        self._note(names)
        first, stop = min(m.learner.first for m in members), max(m.learner.stop for m in members)
        total = sum(m.learner.stop for m in members)
        with self._progress(f"train {', '.join(names)}", total=total, unit="steps") as bar:
            bar.advance(sum(m.learner.first for m in members))
            self._feed(members, Feed(source, first, stop, self._device), _Count(bar))

    def _feed(self, members: list[_Member], feed: Feed, bar: Bar) -> None:
        for member in [m for m in members if m.learner.first == m.learner.stop]:
            self._end(members, member, None)
        try:
            with feed:
                for portion in feed:
                    for member in list(members):
                        self._learn(members, member, portion, bar)
                    if not members:
                        return
        except Exception as e:  # of the reading: all that still learn from it have failed
            for member in list(members):
                self._end(members, member, e)

    def _learn(self, members: list[_Member], member: _Member, portion: Portion, bar: Bar) -> None:
        """One step of ``member``; it leaves as soon as it ends, so that its head is saved while others go on."""
        if portion.step < member.learner.first:
            return
        try:
            member.learner.step(portion, bar)
        except Exception as e:
            self._end(members, member, e)
            return
        if portion.step + 1 == member.learner.stop:
            self._end(members, member, None)

    def _end(self, members: list[_Member], member: _Member, error: BaseException | None) -> None:
        members.remove(member)
        self._wake(member, error)

    def _cancel(self, started: Sequence[Thread]) -> None:
        """End what waits; a thread in the midst of something is waited for until it ends or wants to train."""
        self._closed = True
        for member in self._waiting:
            member.outcome.put(Cancelled())
        for thread in started:
            while thread.is_alive():
                with suppress(Empty):
                    late = self._turn.get(timeout=0.05)
                    if late is not None:
                        late.outcome.put(Cancelled())
            thread.join()


class _Count:
    """Counts the steps of all trainings; the loss of one of many would say nothing."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def advance(self, n: int = 1, **figures: float) -> None:
        self._bar.advance(n)
