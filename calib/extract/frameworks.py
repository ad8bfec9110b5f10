"""Which framework opens ``FRAMEWORK:SPEC``. Importing this module imports none of them."""

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from calib.errors import InputError, SettingError, UnknownNameError
from calib.extract.adapter import Adapter
from calib.registry import load

if TYPE_CHECKING:
    import torch

    from calib.checkpoint import Checkpoint

# name -> module with ``open_detector(spec, device, *, weights, arguments)``
FRAMEWORKS = {
    "detectron2": "calib.extract.detectron2_open",
    "mmdet": "calib.extract.mmdet",
    "torchvision": "calib.extract.torchvision",
    "transformers": "calib.extract.transformers_open",
    "ultralytics": "calib.extract.ultralytics",
}
# What each takes behind the colon.
SPECS = {
    "detectron2": "CONFIG.yaml, LAZYCONFIG.py or package.module:function",
    "mmdet": "CONFIG.py",
    "torchvision": "NAME, package.module:function or CHECKPOINT.safetensors",
    "transformers": "FOLDER",
    "ultralytics": "CHECKPOINT.pt",
}
# Whose checkpoints hold more than a state dict: what reads and writes them.
CHECKPOINTS = {"ultralytics": "calib.extract.ultralytics:YoloCheckpoint"}
_OTHER_NAMES = {
    "mmdetection": "mmdet",
    "hf": "transformers",
    "huggingface": "transformers",
    "d2": "detectron2",
    "yolo": "ultralytics",
}
_ELSE = "any other detector: its arrays, docs/raw.md"


def open_detector(
    name: str, device: "torch.device", *, weights: Path | None = None, arguments: str = "", precision: str = "fp32"
) -> Adapter:
    """Open ``FRAMEWORK:SPEC``; what SPEC, weights and arguments are, the framework's module says.

    Raises:
        UnknownNameError: no such framework. InputError: what another framework takes. SettingError: a ``precision``
            that it does not have. Others as the framework's module.
    """
    framework, _, spec = name.partition(":")
    if framework not in FRAMEWORKS:
        raise _unknown(framework, name)
    _check_spec(framework, spec)
    opened: Adapter = import_module(FRAMEWORKS[framework]).open_detector(
        spec, device, weights=weights, arguments=arguments
    )
    if precision not in opened.precisions:
        raise SettingError(
            f"precision is '{precision}': detectors of {framework} run in {', '.join(opened.precisions)}",
            hint="leave --precision out",
        )
    opened.precision = precision
    return opened


def checkpoint_reader(framework: str) -> "type[Checkpoint]":
    """What reads checkpoints of ``framework``."""
    from calib.checkpoint import Checkpoint

    return load(CHECKPOINTS[framework]) if framework in CHECKPOINTS else Checkpoint


def _unknown(framework: str, name: str) -> UnknownNameError:
    """With the framework that takes ``name``, or what is behind its colon, where that can be seen."""
    own = _OTHER_NAMES.get(framework.lower(), "")
    spec = name.partition(":")[2]
    if own or (spec and (own := _taken_by(spec))):
        hint = f"--detector {own}:{spec}"
    elif whole := _taken_by(name):
        hint = f"--detector {whole}:{name}"
    elif re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+:\w+", name):
        hint = f"--detector torchvision:{name} or detectron2:{name}"
    else:
        hint = f"--detector FRAMEWORK:...; {', '.join(FRAMEWORKS)}; {_ELSE}"
        return UnknownNameError("detector framework", framework, FRAMEWORKS, hint=hint)
    return UnknownNameError("detector framework", framework, (), hint=hint)


def _check_spec(framework: str, spec: str) -> None:
    """Raise InputError for what the framework does not take, with the one that does where that can be seen."""
    if not spec:
        raise InputError(f"{framework}: names no detector", hint=f"--detector {framework}:{SPECS[framework]}")
    is_factory, takes_factory = ":" in spec and not Path(spec).exists(), "function" in SPECS[framework]
    # Detectron2's LazyConfigs are Python as mmdetection's configs are.
    owner = framework if framework == "detectron2" and spec.endswith(".py") else _taken_by(spec)
    if owner and owner != framework and not Path(spec).is_dir():
        raise InputError(
            f"{framework} takes {SPECS[framework]}; {spec} is what {owner} takes", hint=f"--detector {owner}:{spec}"
        )
    if is_factory and not takes_factory:
        raise InputError(f"{framework} takes {SPECS[framework]}, no function: {spec}", hint=_ELSE)
    if framework == "detectron2" and not is_factory and owner != framework:
        raise InputError(
            f"{framework} takes {SPECS[framework]}: {spec} is none of these", hint="--detector detectron2:..."
        )


def _taken_by(spec: str) -> str:
    """The framework that takes ``spec``, from its text alone; empty where that cannot be seen."""
    if (Path(spec) / "config.json").is_file():
        return "transformers"
    endings = {".yaml": "detectron2", ".yml": "detectron2", ".py": "mmdet", ".safetensors": "torchvision"}
    endings |= {".pt": "ultralytics"}
    if Path(spec).suffix in endings:
        return endings[Path(spec).suffix]
    return "torchvision" if re.fullmatch(r"(faster|mask|keypoint)rcnn_\w+", spec) else ""
