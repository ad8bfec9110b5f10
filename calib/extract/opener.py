"""A detector by its description, so that every process can open its own."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from calib.extract.adapter import Adapter
from calib.extract.frameworks import open_detector
from calib.parallel.devices import choose_device


@dataclass(frozen=True)
class Opener:
    """``Opener(...)(k)`` opens the detector ``FRAMEWORK:SPEC`` for process ``k`` of this machine.

    Where ``device`` is a CUDA device without a number, processes take the devices in turn.
    """

    detector: str
    device: str = "auto"
    weights: Path | str | None = None
    arguments: str = ""
    precision: str = "fp32"

    def __call__(self, number: int) -> Adapter:
        """
        Raises:
            SettingError: no such device. Others as ``frameworks.open_detector``.
        """
        device = choose_device(self.device)
        if device == torch.device("cuda"):
            device = torch.device("cuda", number % torch.cuda.device_count())
        weights = None if self.weights is None else Path(self.weights)
        return open_detector(self.detector, device, weights=weights, arguments=self.arguments, precision=self.precision)


def local_rank() -> int:
    """The place of this process among those that torchrun or Slurm started on this machine; 0 without them."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
