"""What adapters do with torch: look at modules and hook them, images to the device, results back without waiting.

Copies go through page-locked memory and run beside the kernels; on the CPU nothing is copied. That memory comes from
torch's own cache of it, which gives a block out again only when the copies that use it are done.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from calib.cache import Classifier
from calib.extract.adapter import Recorded, RoIMap


def stages(module: Any) -> list[Any]:
    """The modules of all stages of a cascade; itself where there is one."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def lacking(model: Any, needs: Sequence[str], linear: Sequence[str]) -> list[str]:
    """Those of the dotted names that lead to nothing from ``model``, and of ``linear`` those to another kind of layer,
    in some stage of a cascade."""
    missing = []
    for path in (*needs, *linear):
        found = [model]
        for name in path.split("."):
            found = [m for one in found for m in stages(getattr(one, name, None))]
        if not found or any(m is None or (path in linear and not isinstance(m, nn.Linear)) for m in found):
            missing.append(path)
    return missing


@contextmanager
def recording(*handles: RemovableHandle) -> Iterator[None]:
    """A forward pass that hooks look at and may end by ``Recorded``; they are removed on exit."""
    try:
        with suppress(Recorded):
            yield
    finally:
        for handle in handles:
            handle.remove()


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
