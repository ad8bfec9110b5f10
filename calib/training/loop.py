"""The loop that trains heads: all those that take the same batches learn from each batch in turn.

A step takes the rows that its sampler names, computes one loss and updates. Randomness comes from (seed, step) alone: a
training that was interrupted and resumed ends in the same bits as one that was not, and a head that learns beside
others in the bits that it has alone.

A method's ``fit`` that trains something is a generator: it yields each ``Training`` and goes on when that one is done.
"""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from time import perf_counter
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from calib.cache import Cache
from calib.cache.rows import RowMatrix
from calib.errors import FitError
from calib.heads.base import Head
from calib.progress import Bar
from calib.sampling import Sampler
from calib.settings import Loop
from calib.training.batch import Batch, FusedLoss, Objective
from calib.training.bfloat16 import BFloat16Products
from calib.training.checkpoint import Checkpoint
from calib.training.context import FitContext
from calib.training.loader import BatchLoader, BatchSource
from calib.training.optimizer import Updater, learning_rate
from calib.training.virtual import VirtualFeatures, head_in

REPORT_EVERY = 50  # steps


class Training:
    """One module to be trained in place: ``loop.steps`` steps of ``objective`` over batches of ``sampler``.

    ``first`` is the step to go on with, after the latest checkpoint. Batches hold the features of ``cache``, or what
    ``rows`` holds (RoI maps).
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        sampler: Sampler,
        cache: Cache,
        loop: Loop,
        context: FitContext,
        *,
        label: str,
        rows: RowMatrix | None = None,
    ) -> None:
        self._virtual: VirtualFeatures | None = None
        if loop.virtual:
            self._virtual = VirtualFeatures(cache, loop, head_in(module), cache.features)
            module = nn.ModuleDict({"trained": module, "virtual": self._virtual})
        module.to(context.device).train()
        self.label, self.context, self.first, self.stop = label, context, 0, loop.steps
        self.source = BatchSource(cache, cache.features if rows is None else rows, sampler)
        self._module, self._objective, self._loop = module, objective, loop
        self._fused = objective if loop.precision == "bf16" and isinstance(objective, FusedLoss) else None
        self._updater = Updater(module, loop, context.loss_weight)
        folder = None if context.checkpoint is None else context.checkpoint / label.replace(" ", "-")
        request = {"loop": asdict(loop), "seed": context.seed, "cache": cache.digest}
        self._checkpoint = Checkpoint(folder, request, context.losses)
        self.first = self._broadcast_state(self._checkpoint.resume(module, self._updater))

    def step(self, batch: Batch, bar: Bar) -> None:
        """One update.

        Raises:
            FitError: the loss is not finite.
        """
        begin, step = perf_counter(), batch.step
        loss = self._gradients(replace(batch, generator=self._generator(step)))
        if step % REPORT_EVERY == 0 or step == self.stop - 1:
            self.context.losses.append((step, self._finite(loss, step)))
            bar.advance(0, loss=self.context.losses[-1][1])
        self._updater.apply(learning_rate(self._loop, step))
        bar.advance()
        if (step + 1) % self._loop.checkpoint_every == 0 and step + 1 < self.stop:
            self._checkpoint.save(self._module, self._updater, step + 1)
        self.context.spent.seconds += perf_counter() - begin

    def finish(self) -> None:
        """All steps are done.

        Raises:
            FitError: a weight is not finite.
        """
        if not all(bool(torch.isfinite(p).all()) for p in self._updater.parameters):
            raise FitError(f"{self.label}: weights left the finite numbers", hint="lower the rate: --set lr=...")
        self._checkpoint.remove()
        self._module.eval()

    def _loss(self, batch: Batch) -> Tensor:
        products: AbstractContextManager[object] = nullcontext()
        if self._loop.precision == "bf16":
            products = BFloat16Products()
        with products:
            return self._objective(batch)

    def _gradients(self, batch: Batch) -> Tensor:
        """The loss of all rows; every process has the gradients of it."""
        fused = self._fused
        virtual = None if self._virtual is None else self._virtual.beside(batch)
        own = self._updater.gradients(self._loss(batch)) if fused is None else fused.gradients(batch)
        if virtual is not None:
            more = self._loop.virtual * self._loss(virtual)
            more.backward()  # type: ignore[no-untyped-call]
            own = own.detach() + more.detach()
        loss = own.detach().float().reshape(1)
        gradients = [p.grad for p in self._updater.parameters if p.grad is not None]
        self.context.world.all_reduce([*gradients, loss])
        return loss

    def _broadcast_state(self, first: int) -> int:
        """The step to go on with, and weights and state, of the first process: it alone may have a checkpoint."""
        world = self.context.world
        if world.size == 1:
            return first
        step = torch.tensor([first], device=self.context.device)
        world.broadcast([step])
        momenta = self._updater.momentum() if step else []
        world.broadcast([*self._module.state_dict().values(), *momenta])
        if step:
            self._updater.restore(momenta)
        return int(step)

    def _generator(self, step: int) -> torch.Generator:
        seed = int(np.random.SeedSequence([self.context.seed, step]).generate_state(1)[0])
        return torch.Generator().manual_seed(seed)

    def _finite(self, loss: Tensor, step: int) -> float:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FitError(f"{self.label}: the loss is {value} at step {step}", hint="lower the rate: --set lr=...")
        return value


T = TypeVar("T")
Trainings = Generator[Training, None, T]


class Method(Protocol):
    """Hyper-parameters that can be fitted: a frozen dataclass."""

    def fit(self, cache: Cache, context: FitContext) -> Head | Trainings[Head]:
        """The head, or a generator of the trainings that it needs, which returns it."""


def fitting(method: Method, cache: Cache, context: FitContext) -> Trainings[Head]:
    """``method.fit`` as a generator, also where nothing is trained."""
    head = method.fit(cache, context)
    return head if isinstance(head, Head) else (yield from head)


def run_alone(fit: Trainings[T]) -> T:
    """Train all that ``fit`` yields; what it returns.

    Raises:
        What ``fit`` raises. FitError: a loss is not finite. NonFiniteError: the cache's features are not.
    """
    result = run_trainings([fit])[0]
    if isinstance(result, Exception):
        raise result
    return result


def run_trainings(
    fits: Sequence[Trainings[T]], note: Callable[[list[str]], None] = lambda labels: None
) -> list[T | Exception]:
    """Train all that ``fits`` yield, those that take the same batches in one pass; what each returns, or its error.

    An error ends its own fit only. An interruption (Ctrl-C) closes all of them. ``note`` is called with the labels
    of every pass.
    """
    results: dict[int, T | Exception] = {}
    waiting: dict[int, Training] = {}

    def resume(k: int, error: Exception | None = None) -> None:
        try:
            waiting[k] = next(fits[k]) if error is None else fits[k].throw(error)
        except StopIteration as end:
            results[k] = end.value
        except Exception as e:
            results[k] = e

    try:
        for k in range(len(fits)):
            resume(k)
        while waiting:
            source = next(iter(waiting.values())).source
            together = {k: t for k, t in waiting.items() if t.source.gives_batches_of(source)}
            for k in together:
                del waiting[k]
            note([t.label for t in together.values()])
            _one_pass(source, together, resume)
    finally:
        for fit in fits:
            fit.close()
    return [results[k] for k in range(len(fits))]


def _one_pass(source: BatchSource, trainings: dict[int, Training], resume: Callable[..., None]) -> None:
    """Train all of ``trainings``; each fit goes on as soon as its own is done, so that its head is saved then."""
    every = list(trainings.values())
    first, stop, context = min(t.first for t in every), max(t.stop for t in every), every[0].context
    label, total = f"train {', '.join(t.label for t in every)}", sum(t.stop for t in every)

    def end(k: int, error: Exception | None = None) -> None:
        training = trainings.pop(k)
        try:
            if error is None:
                training.finish()
        except Exception as e:
            error = e
        resume(k, error)

    with context.progress(label, total=total, unit="steps") as bar:
        bar.advance(sum(t.first for t in every))
        shown = bar if len(every) == 1 else _StepsOnly(bar)
        for k in [k for k, t in trainings.items() if t.first == t.stop]:
            end(k)
        try:
            with BatchLoader(source, first, stop, context.device, context.world) as loader:
                for batch in loader:
                    for k, training in list(trainings.items()):
                        if batch.step < training.first:
                            continue
                        try:
                            training.step(batch, shown)
                        except Exception as e:
                            end(k, e)
                            continue
                        if batch.step + 1 == training.stop:
                            end(k)
                    if not trainings:
                        return
        except Exception as e:  # of reading the batches: every training that still waits for one has failed
            for k in list(trainings):
                end(k, e)


class _StepsOnly:
    """Counts the steps of several trainings; the loss of one of them would say nothing."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def advance(self, n: int = 1, **metrics: float) -> None:
        self._bar.advance(n)
