"""What a fit is given beside the cache and the method's own settings."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from calib.heads.base import Head
from calib.parallel.distributed import ALONE, World
from calib.progress import Progress, silent


@dataclass
class Spent:
    """Wall time of training steps, in seconds."""

    seconds: float = 0.0


@dataclass
class FitContext:
    """Seed, device, base, and where a fit reports.

    ``base``: the fitted head that is built on, in place of the detector's own classifier (``training/bases.py``).
    ``checkpoint``: a folder where learned methods keep what they need to go on after an interruption. ``losses``
    collects (step, loss), ``spent`` the time of the steps. ``loss_weight`` multiplies the gradient, as the weight of a
    cascade's stage does; reported losses are without it. ``world``: the processes that train the head together.
    """

    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    base: Head | None = None
    progress: Progress = silent
    checkpoint: Path | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)
    loss_weight: float = 1.0
    world: World = ALONE
