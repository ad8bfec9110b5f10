"""SGD or AdamW with warm-up, a schedule and clipping."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from calib.settings import Loop


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
