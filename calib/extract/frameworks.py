"""Which framework opens ``FRAMEWORK:SPEC``. Importing this module imports none of them."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import SettingError, UnknownNameError
from calib.extract.adapter import Adapter

if TYPE_CHECKING:
    import torch

# name -> module with ``open_detector(spec, device, *, weights, arguments)``
FRAMEWORKS = {
    "detectron2": "calib.extract.detectron2_open",
    "mmdet": "calib.extract.mmdet",
    "torchvision": "calib.extract.torchvision",
    "transformers": "calib.extract.transformers",
}


def open_detector(
    name: str, device: "torch.device", *, weights: Path | None = None, arguments: str = "", precision: str = "fp32"
) -> Adapter:
    """Open ``FRAMEWORK:SPEC``; what SPEC, weights and arguments are, the framework's module says.

    Raises:
        UnknownNameError: no such framework. SettingError: a ``precision`` that it does not have. Others as the
            framework's module.
    """
    framework, _, spec = name.partition(":")
    if framework not in FRAMEWORKS:
        known = ", ".join(FRAMEWORKS)
        raise UnknownNameError("detector framework", framework, FRAMEWORKS, hint=f"--detector FRAMEWORK:...; {known}")
    options: dict[str, Any] = {"weights": weights, "arguments": arguments}
    if framework == "torchvision":
        options["precision"] = precision
    elif precision != "fp32":
        raise SettingError(f"precision {precision} is for torchvision's detectors", hint="leave --precision out")
    opened: Adapter = import_module(FRAMEWORKS[framework]).open_detector(spec, device, **options)
    return opened
