"""Training of all layers of a small detector: in one process or several, and on from where it was interrupted.

With more processes every batch is shared among them, gradients and the statistics of BatchNorm are averaged after every
step. What is drawn, pictures and mirroring, is the same for any number; the sampling of anchors and RoIs is not.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.data.train_set import Target, TrainSet, make_batch
from calib.errors import ExistsError, FitError, SettingError
from calib.files import replacing
from calib.parallel.distributed import ALONE, World
from calib.pickles import read_torch
from calib.settings import at_least

Curve = list[dict[str, float]]
_PER_POINT = 50  # steps that a point of the loss curve is the mean of
_OTHER_RANKS = 1_000_003  # between the seeds of processes


@dataclass(frozen=True)
class TrainSettings:
    """SGD with Nesterov momentum, linear warm-up, cosine decay to 0; with ``mirror`` half of the pictures are mirrored.

    ``save_every``: steps between states to go on from.
    """

    epochs: float = 4.5
    batch: int = 8
    learning_rate: float = 0.04
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    max_gradient_norm: float = 5.0
    bf16: bool = True
    seed: int = 0
    mirror: bool = True
    save_every: int = 500

    def __post_init__(self) -> None:
        at_least(self, 1, "batch", "warmup_steps", "save_every")
        at_least(self, 0, "epochs", "learning_rate", "weight_decay", "seed", "momentum", "max_gradient_norm")

    def steps(self, pictures: int) -> int:
        """How many there are."""
        return max(1, int(self.epochs * pictures / self.batch))

    def rate(self, step: int, steps: int) -> float:
        """Of ``step`` of ``steps``: linear warm-up times half a cosine."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class Store:
    """Where a training keeps its state, and what it is of: another training does not go on from it."""

    path: Path
    identity: dict[str, Any]


def train_model(
    model: nn.Module, train: TrainSet, s: TrainSettings, *, world: World = ALONE, store: Store | None = None
) -> Curve:
    """Train in place; the loss curve, averaged over 50 steps, comes back and goes to stderr as it grows.

    With a ``store`` the training goes on from the state in it, if there is one, and ends as if it had not been
    interrupted: the same bits with the same number of threads.

    Raises:
        FitError: the loss left the finite numbers. SettingError: a batch smaller than the number of processes.
        ExistsError: the state is of another training. FormatError: it is damaged.
    """
    if s.batch < world.size:
        raise SettingError(f"{world.size} processes cannot share a batch of {s.batch}", hint="a larger --batch")
    run = _Run(model, train, s, world)
    if store is not None and store.path.exists():
        run.restore(store)
    while run.step < run.steps:
        run.advance()
        if store is not None and (run.step % s.save_every == 0 or run.step == run.steps):
            run.save(store)
    return run.curve


class _Run:
    """A training under way."""

    def __init__(self, model: nn.Module, train: TrainSet, s: TrainSettings, world: World) -> None:
        self.model, self.train, self.s, self.world = model.train(), train, s, world
        self.rng = np.random.default_rng(s.seed)
        self.steps = s.steps(len(train.targets))
        self.optimizer = torch.optim.SGD(
            model.parameters(), s.learning_rate, s.momentum, weight_decay=s.weight_decay, nesterov=True
        )
        self.queue = np.empty(0, np.int64)
        self.step = 0
        self.curve: Curve = []
        self.sums: Counter[str] = Counter()
        if world.rank:
            torch.manual_seed(s.seed + world.rank * _OTHER_RANKS)

    def advance(self) -> None:
        """One step."""
        s, step = self.s, self.step
        if len(self.queue) < s.batch:
            self.queue = np.concatenate((self.queue, self.rng.permutation(len(self.train.targets))))
        chosen, self.queue = self.queue[: s.batch], self.queue[s.batch :]
        self.optimizer.param_groups[0]["lr"] = s.rate(step, self.steps)
        part = (self.world.rank, self.world.size)
        losses = self._update(make_batch(self.train, chosen, self.rng, mirror=s.mirror, part=part))
        if not all(map(math.isfinite, losses.values())):
            raise FitError(f"the loss is not finite at step {step}", hint="lower --learning-rate, or give --float32")
        self.sums.update(losses)
        self.step += 1
        if self.step % _PER_POINT == 0 or self.step == self.steps:
            self._point()

    def _update(self, batch: tuple[list[Tensor], list[Target]]) -> dict[str, float]:
        """One step of SGD; the four losses of torchvision's Faster R-CNN, means over all processes."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.s.bf16):
            losses: dict[str, Tensor] = self.model(*batch)
        self.optimizer.zero_grad()
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
        summed = {name: loss.detach().float() for name, loss in losses.items()}
        if self.world.size > 1:
            self._average([*self._gradients(), *self._statistics(), *summed.values()])
        nn.utils.clip_grad_norm_(self.model.parameters(), self.s.max_gradient_norm)
        self.optimizer.step()
        return {name.removeprefix("loss_"): float(loss) for name, loss in summed.items()}

    def _average(self, tensors: list[Tensor]) -> None:
        """Over all processes, in place."""
        self.world.all_reduce(tensors)
        for tensor in tensors:
            tensor /= self.world.size

    def _gradients(self) -> Iterator[Tensor]:
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                yield parameter.grad

    def _statistics(self) -> Iterator[Tensor]:
        """Running means and variances of BatchNorm."""
        yield from (buffer for buffer in self.model.buffers() if buffer.is_floating_point())

    def _point(self) -> None:
        n = (self.step - 1) % _PER_POINT + 1
        point = {"step": self.step, **{name: round(total / n, 4) for name, total in self.sums.items()}}
        self.curve.append(point)
        self.sums.clear()
        if self.world.rank == 0:
            sys.stderr.write(f"step {self.step} of {self.steps} {point}\n")

    def save(self, store: Store) -> None:
        """Write the state: rank 0 does, with the generators of all."""
        generators = self._generators()
        if self.world.rank:
            return
        words = {
            "identity": store.identity | {"processes": self.world.size},
            "numpy": self.rng.bit_generator.state,
            "step": self.step,
            "curve": self.curve,
            "sums": dict(self.sums),
        }
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        tensors = {"queue": torch.from_numpy(self.queue), "generators": generators}
        with replacing(store.path) as temporary:
            torch.save({"words": json.dumps(words), **state, **tensors}, temporary)

    def _generators(self) -> Tensor:
        """States of torch's generators, a row per process: bytes, exact in float32."""
        own = torch.get_rng_state()
        rows = torch.zeros(self.world.size, len(own))
        rows[self.world.rank] = own.float()
        self.world.all_reduce([rows])
        return rows.to(torch.uint8)

    def restore(self, store: Store) -> None:
        """Go on from the state.

        Raises:
            ExistsError, FormatError: as ``train_model``.
        """
        found = read_torch(store.path, "state of a training")
        words = json.loads(found["words"])
        if words["identity"] != json.loads(json.dumps(store.identity | {"processes": self.world.size})):
            raise ExistsError(
                f"{store.path} is of a training with other settings, data or number of processes",
                hint="give the same options to go on, or remove the file to begin anew",
            )
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.rng.bit_generator.state = words["numpy"]
        self.queue = found["queue"].numpy()
        self.step, self.curve, self.sums = words["step"], words["curve"], Counter(words["sums"])
        torch.set_rng_state(found["generators"][self.world.rank].contiguous())
