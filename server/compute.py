"""Features to scores, on the device and in the precision that the service was given.

Letters: N proposals, D feature size, C foreground classes.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.errors import NonFiniteError
from calib.heads.base import Head
from calib.heads.bfloat16 import in_bfloat16
from calib.parallel.devices import choose_device


class Compute:
    """One per process. ``prepare`` may run in any thread, ``scores`` in one thread only: its buffers are reused."""

    def __init__(self, device: str = "cpu", precision: str = "fp32") -> None:
        """
        Raises:
            SettingError: there is no such device.
        """
        self.device, self.precision = choose_device(device), precision
        self._pinned: dict[str, Tensor] = {}

    def prepare(self, head: Head) -> Head:
        """``head`` as ``scores`` takes it."""
        head = head.requires_grad_(False).eval()
        return (in_bfloat16(head) if self.precision == "bf16" else head).to(self.device)

    def scores(self, head: Head, features: Tensor, logits: Tensor | None = None) -> NDArray[np.float32]:
        """[N, D], [N, C+1] of any float type at any address -> [N, C] float32, valid until the next call.

        Raises:
            NonFiniteError: NaN or infinity in what was sent, or in what comes out.
        """
        with torch.inference_mode():
            x = self._input("features", features)
            scores = head.scores(x, None if logits is None else self._input("logits", logits))
            if scores.numel() and not bool(torch.isfinite(scores.sum())):
                raise NonFiniteError("the scores are not finite: features or logits are too large for this head")
            return self._output(scores)

    def _input(self, name: str, tensor: Tensor) -> Tensor:
        """Finite float32 on the device.

        Rounding inside a matrix product may depend on the address of its operands: in memory that torch aligns, the
        same numbers give the same scores whatever the length of the JSON in front of them.
        """
        if tensor.numel():
            low, high = tensor.aminmax()  # NaN passes through to both
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise NonFiniteError(f"{name} hold NaN or infinity")
        if self.device.type == "cpu":
            return torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)
        staged = self._staging(f"{name} {tensor.dtype}", tensor).copy_(tensor)
        return staged.to(self.device, non_blocking=True).float()

    def _output(self, scores: Tensor) -> NDArray[np.float32]:
        if self.device.type == "cpu":
            return _array(scores)
        staged = self._staging("scores", scores).copy_(scores, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        return _array(staged)

    def _staging(self, name: str, like: Tensor) -> Tensor:
        """Pinned memory of the shape of ``like``, kept from call to call: the driver copies to and from it directly."""
        kept = self._pinned.get(name)
        if kept is None or kept.numel() < like.numel():
            kept = torch.empty(like.numel(), dtype=like.dtype, pin_memory=True)
            self._pinned[name] = kept
        return kept[: like.numel()].view(like.shape)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[Any] = tensor.numpy()
    return array
