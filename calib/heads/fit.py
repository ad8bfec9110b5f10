"""The one training loop of all learned heads: SGD, warm-up, steps or cosine, clipping, checkpoints, resume.

A step reads the rows its sampler names, computes one loss and updates. Randomness comes from (seed, step) alone:
a training that was interrupted and resumed ends in the same bits as one that was not.
"""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from calib.cache import Cache
from calib.cache.rows import RowMatrix
from calib.errors import FitError
from calib.files import replacing, write_json
from calib.heads.base import FitRun
from calib.sampling import Sampler
from calib.settings import Loop

LOOK_EVERY = 50


@dataclass(frozen=True)
class Batch:
    """Rows of one step on the device: features [n, D], labels [n] (C = background), chunk [n] of n_chunks.

    ``generator`` is seeded by (seed, step), on the CPU; ``step`` counts from 0.
    """

    features: Tensor
    labels: Tensor
    chunk: Tensor
    n_chunks: int
    generator: torch.Generator
    step: int


Objective = Callable[[Batch], Tensor]


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
    """SGD on the trainable parameters of a module, one call per step."""

    def __init__(self, module: nn.Module, loop: Loop) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            self.parameters, lr=loop.lr, momentum=loop.momentum, weight_decay=loop.weight_decay
        )
        self._clip = loop.clip_norm

    def update(self, loss: Tensor, lr: float) -> float:
        """One step with rate ``lr``; returns the gradient norm before clipping (0 when clipping is off)."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self._clip)) if self._clip else 0.0
        self.optimizer.step()
        return norm

    def momentum(self) -> list[Tensor]:
        """Momentum buffers, in the order of the parameters."""
        state = self.optimizer.state
        return [state[p].get("momentum_buffer", torch.zeros_like(p)) for p in self.parameters]

    def restore(self, buffers: list[Tensor]) -> None:
        """Put momentum buffers back."""
        for p, buffer in zip(self.parameters, buffers, strict=True):
            self.optimizer.state[p]["momentum_buffer"] = buffer.to(p.device)


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
    rows = cache.features if rows is None else rows
    module.to(run.device).train()
    updater = Updater(module, loop)
    checkpoint = _Checkpoint(run, label, {"loop": asdict(loop), "seed": run.seed, "cache": cache.digest})
    first = checkpoint.resume(module, updater)
    with run.progress(f"train {label}", total=loop.steps, unit="steps") as bar:
        bar.advance(first)
        for step in range(first, loop.steps):
            loss = objective(_batch(cache, rows, sampler, step, run))
            if step % LOOK_EVERY == 0 or step == loop.steps - 1:
                run.losses.append((step, _finite(loss, step, label)))
                bar.advance(0, loss=run.losses[-1][1])
            updater.update(loss, learning_rate(loop, step))
            bar.advance()
            if (step + 1) % loop.checkpoint_every == 0 and step + 1 < loop.steps:
                checkpoint.save(module, updater, step + 1)
    if not all(bool(torch.isfinite(p).all()) for p in updater.parameters):
        raise FitError(f"{label}: weights left the finite numbers", hint="lower the rate: --set lr=...")
    checkpoint.remove()
    module.eval()


def _finite(loss: Tensor, step: int, label: str) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FitError(f"{label}: the loss is {value} at step {step}", hint="lower the rate: --set lr=...")
    return value


def _batch(cache: Cache, rows: RowMatrix, sampler: Sampler, step: int, run: FitRun) -> Batch:
    chosen = sampler.step(step)
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([run.seed, step]).generate_state(1)[0]))
    return Batch(
        torch.from_numpy(rows.take(chosen.rows)).to(run.device),
        torch.from_numpy(cache.labels[chosen.rows].astype(np.int64)).to(run.device),
        torch.from_numpy(chosen.chunk).to(run.device),
        chosen.n_chunks,
        generator,
        step,
    )


class _Checkpoint:
    """What an interrupted training needs to go on; kept beside the head, refused when anything differs."""

    def __init__(self, run: FitRun, label: str, request: dict[str, object]) -> None:
        self._folder: Path | None = None if run.checkpoint is None else run.checkpoint / label.replace(" ", "-")
        self._request = json.loads(json.dumps(request))
        self._run = run

    def resume(self, module: nn.Module, updater: Updater) -> int:
        """Load the latest checkpoint of the same request; returns the step to go on with."""
        if self._folder is None or not (self._folder / "state.json").exists():
            return 0
        with suppress(OSError, ValueError, KeyError, RuntimeError, SafetensorError):
            state = json.loads((self._folder / "state.json").read_text())
            if state["request"] == self._request:
                tensors = load_file(self._folder / f"{state['step']}.safetensors")
                module.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("m.")})
                updater.restore([tensors[f"v.{i}"] for i in range(len(updater.parameters))])
                self._run.losses.extend((int(s), float(v)) for s, v in state["losses"])
                return int(state["step"])
        return 0

    def save(self, module: nn.Module, updater: Updater, step: int) -> None:
        """Write tensors under a new name, then the JSON that points at them, then drop the older tensors."""
        if self._folder is None:
            return
        tensors = {f"m.{k}": v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
        tensors |= {f"v.{i}": v.cpu().contiguous() for i, v in enumerate(updater.momentum())}
        with replacing(self._folder / f"{step}.safetensors") as temporary:
            temporary.write_bytes(save(tensors))
        write_json(self._folder / "state.json", {"step": step, "request": self._request, "losses": self._run.losses})
        for old in self._folder.glob("*.safetensors"):
            if old.stem != str(step):
                old.unlink()

    def remove(self) -> None:
        """The training is done."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
