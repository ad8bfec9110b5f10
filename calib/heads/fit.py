"""The one training loop of all learned heads: SGD or AdamW, warm-up, steps or cosine, clipping, checkpoints, resume.

A step takes the rows its sampler names, computes one loss and updates. Randomness comes from (seed, step) alone:
a training that was interrupted and resumed ends in the same bits as one that was not.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.cache import Cache
from calib.cache.rows import RowMatrix
from calib.errors import FitError
from calib.heads.base import FitRun
from calib.heads.checkpoint import Checkpoint
from calib.heads.feed import Feed, Portion, Source
from calib.heads.products import BFloat16Products
from calib.losses.softmax import chunk_mean, chunk_weights
from calib.parallel.distributed import ALONE, World
from calib.progress import Bar
from calib.sampling import Sampler
from calib.settings import Loop

LOOK_EVERY = 50


@dataclass(frozen=True)
class Batch:
    """Rows of one step on the device: features [n, D], labels [n] (C = background), chunk [n] of n_chunks.

    ``generator`` is seeded by (seed, step), on the CPU; ``step`` counts from 0. The features are overwritten by the
    next step. Where several processes train together these are the rows of this one; all of them know the labels
    and chunks of all N rows, draw for all, and divide by what all weigh: their losses sum to that of one process.
    """

    features: Tensor
    all_labels: Tensor
    all_chunk: Tensor
    n_chunks: int
    generator: torch.Generator
    step: int
    world: World = ALONE

    @cached_property
    def labels(self) -> Tensor:
        """[n]."""
        return self.world.mine(self.all_labels)

    @cached_property
    def chunk(self) -> Tensor:
        """[n]."""
        return self.world.mine(self.all_chunk)

    def chunk_mean(self, values: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """[n], [C+1] -> ``losses.softmax.chunk_mean`` of all rows, as far as it comes from these ``values``."""
        weights = torch.ones_like(self.all_labels, dtype=values.dtype)
        if class_weights is not None:
            weights = class_weights[self.all_labels]
        total = chunk_weights(weights, self.all_chunk, self.n_chunks)
        return chunk_mean(values, self.chunk, self.n_chunks, self.world.mine(weights), total)

    def row_mean(self, values: Tensor) -> Tensor:
        """[n] -> the mean of all rows' values, as far as it comes from these."""
        return values.sum() / len(self.all_labels)


Objective = Callable[[Batch], Tensor]


class ShapedStep(ABC):
    """An objective that also knows its gradient in a form that is faster than autograd's in bfloat16."""

    @abstractmethod
    def __call__(self, batch: Batch) -> Tensor:
        """The loss, for autograd."""

    @abstractmethod
    def gradients(self, batch: Batch) -> Tensor:
        """The loss; puts its gradient in bfloat16 products into ``grad`` of the parameters."""


def learning_rate(loop: Loop, step: int) -> float:
    """The rate at ``step``: linear warm-up from lr * warmup_factor, then the schedule."""
    if loop.schedule == "cosine":
        rate = loop.lr * 0.5 * (1 + math.cos(math.pi * step / loop.steps))
    else:
        rate = loop.lr * 0.1 ** sum(step >= m * loop.steps for m in loop.milestones)
    if step < loop.warmup_steps:
        ramp = step / loop.warmup_steps
        rate *= loop.warmup_factor * (1 - ramp) + ramp
    return rate


class Updater:
    """SGD or AdamW on the trainable parameters of a module, one call per step."""

    def __init__(self, module: nn.Module, loop: Loop, loss_weight: float = 1.0) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        how: dict[str, Any] = {"lr": loop.lr, "weight_decay": loop.weight_decay}
        self.optimizer: torch.optim.Optimizer
        if loop.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(self.parameters, betas=(loop.momentum, 0.999), **how)
            self._state: tuple[str, ...] = ("exp_avg", "exp_avg_sq", "step")
        else:
            self.optimizer = torch.optim.SGD(self.parameters, momentum=loop.momentum, **how)
            self._state = ("momentum_buffer",)
        self._clip, self._loss_weight = loop.clip_norm, loss_weight

    def update(self, loss: Tensor, lr: float) -> float:
        """One step with rate ``lr``; returns the gradient norm before clipping (0 when clipping is off)."""
        self.gradients(loss)
        return self.apply(lr)

    def gradients(self, loss: Tensor) -> Tensor:
        """Put the gradients of ``loss`` into the parameters; returns it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def apply(self, lr: float) -> float:
        """``update`` with the gradients that the parameters hold."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self._loss_weight != 1:
            for gradient in (p.grad for p in self.parameters if p.grad is not None):
                gradient.mul_(self._loss_weight)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self._clip)) if self._clip else 0.0
        self.optimizer.step()
        return norm

    def momentum(self) -> list[Tensor]:
        """What the optimiser keeps of every parameter, in their order."""
        state = self.optimizer.state
        return [state[p].get(k, _nothing(p, k)) for p in self.parameters for k in self._state]

    def restore(self, buffers: list[Tensor]) -> None:
        """Put it back."""
        places = [(p, k) for p in self.parameters for k in self._state]
        for (p, key), buffer in zip(places, buffers, strict=True):
            # AdamW counts its steps on the CPU.
            self.optimizer.state[p][key] = buffer.cpu() if key == "step" else buffer.to(p.device)


def _nothing(parameter: Tensor, key: str) -> Tensor:
    return torch.zeros(()) if key == "step" else torch.zeros_like(parameter)


class Training:
    """One head under way: a ``feed.Learner`` of the steps that its checkpoint does not have yet."""

    def __init__(
        self, module: nn.Module, objective: Objective, cache: Cache, loop: Loop, run: FitRun, label: str
    ) -> None:
        module.to(run.device).train()
        self._module, self._objective, self._loop, self._run, self.label = module, objective, loop, run, label
        self._world = run.world
        self._shaped = objective if loop.precision == "bf16" and isinstance(objective, ShapedStep) else None
        self._updater = Updater(module, loop, run.loss_weight)
        self._checkpoint = Checkpoint(run, label, {"loop": asdict(loop), "seed": run.seed, "cache": cache.digest})
        self.first, self.stop = self._checkpoint.resume(module, self._updater), loop.steps
        self.first = self._agreed(self.first)

    def step(self, portion: Portion, bar: Bar) -> None:
        """One update.

        Raises:
            FitError: the loss is not finite.
        """
        step = portion.step
        generator, world = self._generator(step), self._world
        batch = Batch(portion.features, portion.labels, portion.chunk, portion.n_chunks, generator, step, world)
        loss = self._gradients(batch)
        if step % LOOK_EVERY == 0 or step == self.stop - 1:
            self._run.losses.append((step, self._finite(loss, step)))
            bar.advance(0, loss=self._run.losses[-1][1])
        self._updater.apply(learning_rate(self._loop, step))
        bar.advance()
        if (step + 1) % self._loop.checkpoint_every == 0 and step + 1 < self.stop:
            self._checkpoint.save(self._module, self._updater, step + 1)

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
        shaped = self._shaped
        loss = self._updater.gradients(self._loss(batch)) if shaped is None else shaped.gradients(batch)
        figure = loss.detach().float().reshape(1)
        self._world.add([*(p.grad for p in self._updater.parameters if p.grad is not None), figure])
        return figure

    def _agreed(self, first: int) -> int:
        """The step to go on with, and weights and state, of the first process: it alone may have a checkpoint."""
        if self._world.size == 1:
            return first
        step = torch.tensor([first], device=self._run.device)
        self._world.follow_first([step])
        momenta = self._updater.momentum() if step else []
        self._world.follow_first([*self._module.state_dict().values(), *momenta])
        if step:
            self._updater.restore(momenta)
        return int(step)

    def _generator(self, step: int) -> torch.Generator:
        seed = int(np.random.SeedSequence([self._run.seed, step]).generate_state(1)[0])
        return torch.Generator().manual_seed(seed)

    def _finite(self, loss: Tensor, step: int) -> float:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FitError(f"{self.label}: the loss is {value} at step {step}", hint="lower the rate: --set lr=...")
        return value


def fit(
    module: nn.Module,
    objective: Objective,
    sampler: Sampler,
    cache: Cache,
    loop: Loop,
    run: FitRun,
    *,
    label: str,
    rows: RowMatrix | None = None,
) -> None:
    """Train ``module`` in place: ``loop.steps`` steps of ``objective`` over batches of ``sampler``.

    Batches hold features, or what ``rows`` holds (RoI maps).

    Raises:
        FitError: the loss is not finite. NonFiniteError: the cache's features are not.
    """
    source = Source(cache, cache.features if rows is None else rows, sampler)
    training = Training(module, objective, cache, loop, run, label)
    if run.drive is None:
        _alone(training, source, run)
    else:
        run.drive(training, source)
    training.finish()


def _alone(training: Training, source: Source, run: FitRun) -> None:
    with run.progress(f"train {training.label}", total=training.stop, unit="steps") as bar:
        bar.advance(training.first)
        with Feed(source, training.first, training.stop, run.device, run.world) as feed:
            for portion in feed:
                training.step(portion, bar)
