"""Images to the device, results back without waiting.

Copies go through page-locked memory and run beside the kernels; on the CPU nothing is copied. That memory comes from
torch's own cache of it, which gives a block out again only when the copies that use it are done.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.cache import Classifier
from calib.extract.adapter import RoIMap


def with_hidden(classifier: Classifier, roi_map: RoIMap) -> Classifier:
    """``classifier`` and the two layers before it."""
    layers = enumerate(roi_map.layers, start=1)
    return replace(classifier, **{f"fc{i}_{p}": array(getattr(m, p)) for i, m in layers for p in ("weight", "bias")})


def to_device(image: NDArray[np.uint8], device: torch.device) -> Tensor:
    """[height, width, 3] RGB in 0..255 -> [3, height, width] float32 in 0..1 on ``device``."""
    pixels = torch.from_numpy(image)
    if device.type == "cuda":
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    return pixels.to(device).permute(2, 0, 1).float().div_(255)


class Staged:
    """Tensors of one forward pass on their way to the host; ``arrays`` waits for them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Begin the copies, behind the kernels that make ``tensors``, which must not be changed afterwards."""
        self._arrived: Any = None
        self._tensors = tensors
        if any(t.is_cuda for t in tensors.values()):
            self._tensors = {n: _to_pinned(t) for n, t in tensors.items()}
            self._arrived = torch.cuda.current_stream().record_event()

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """All of them as float32, in the order of C; callable from any thread."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return {n: array(t) for n, t in self._tensors.items()}


def _to_pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.detach(), non_blocking=True)


def array(tensor: Tensor) -> Any:
    """A contiguous float32 array."""
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())
