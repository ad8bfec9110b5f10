"""Where torch computes."""

import torch

from calib.errors import SettingError


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA when there is one.

    Raises:
        SettingError: torch does not know the name, or has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # "meta" can be made, but holds no numbers
    except (RuntimeError, AssertionError) as e:
        raise SettingError(f"device '{name}' cannot be used: {str(e).splitlines()[0]}", hint="--device auto") from e
    return device


def device_of_rank(name: str, rank: int) -> torch.device:
    """Where process ``rank`` of this machine computes: each on a GPU of its own, or all on the CPU.

    Raises:
        SettingError: as ``choose_device``; one GPU is named for all, or there is none left for this one.
    """
    device = choose_device(name)
    if device.type != "cuda":
        return device
    if str(device) != device.type:
        raise SettingError(f"device '{name}' is one GPU: expected one per process", hint="--device cuda")
    if rank >= torch.cuda.device_count():
        raise SettingError(
            f"there are {torch.cuda.device_count()} GPUs, and more processes", hint="one per GPU, or --device cpu"
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)
