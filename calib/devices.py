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
