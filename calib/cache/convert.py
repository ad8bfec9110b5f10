"""float16 to float32 and back, and the test for numbers that are not finite, at the speed of memory.

NumPy converts half precision number by number, at a twentieth of the speed of torch's vector instructions. Both round
to the nearest even number: bits do not depend on who did it (``tests/cache/test_convert.py``).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_float32(x: NDArray[Any], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """float16 or float32 of any shape -> float32, into ``out`` if given; else ``x`` itself where it is that already."""
    if x.dtype == np.float32:
        if out is None:
            return x
        if out is not x:
            out[...] = x
        return out
    import torch  # here: commands that read no feature do without it

    half = torch.from_numpy(np.require(x, requirements=["C", "W"]))
    if out is None:
        return half.float().numpy()
    torch.from_numpy(out).copy_(half)
    return out


def to_dtype(x: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """float32 -> ``dtype`` (float16 or float32); what lies beyond the range of float16 becomes infinite."""
    if dtype == "float32":
        return x.astype(np.float32, copy=False)
    import torch

    return torch.from_numpy(np.require(x, np.float32, ["C", "W"])).half().numpy()


def all_finite(x: NDArray[Any]) -> bool:
    """Whether ``x``, float16 or float32, holds neither NaN nor infinity: their exponents are all ones."""
    if x.itemsize == 2:
        return bool((x.view(np.int16) & np.int16(0x7FFF)).max(initial=0) < 0x7C00)
    return bool((x.view(np.int32) & np.int32(0x7FFFFFFF)).max(initial=0) < 0x7F800000)
