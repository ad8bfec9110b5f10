"""What adapters share: weights of a model that is there already, and the arguments of the function that makes it."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from calib.checkpoint import Checkpoint
from calib.errors import FormatError, InputError

_EXAMPLE = "--detector-args '{\"num_classes\": 1204}'"


def factory_arguments(arguments: str) -> dict[str, Any]:
    """The JSON object ``arguments``, empty where the text is.

    Raises:
        InputError: no JSON, or no object.
    """
    try:
        keywords = json.loads(arguments or "{}")
    except ValueError as e:
        raise InputError(f"detector arguments are not JSON: {e}", hint=_EXAMPLE) from e
    if not isinstance(keywords, dict):
        raise InputError(f"detector arguments are {arguments}: expected a JSON object", hint=_EXAMPLE)
    return keywords


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the state dict in ``path`` (.safetensors, .pth, or Detectron2's .pkl of arrays) into ``model``, out of what
    training scripts and wrappers put around it (``Checkpoint``).

    Raises:
        MissingFileError: not there. FormatError: damaged, or of another model.
    """
    checkpoint = Checkpoint.read(path, what="detector weights")
    state, prefix = checkpoint.of(set(model.state_dict()))
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as e:
        said = " ".join(line.strip() for line in str(e).splitlines()[:3])  # the second line on names keys
        names = [n for n in checkpoint.state if isinstance(n, str)]
        where = f" under {checkpoint.entry}" if checkpoint.entry else ""
        raise FormatError(
            f"weights {path} do not fit the detector: {said[:400].strip()}; the file has {len(names)} tensors{where}"
            f"{f', of which those of {prefix}* were tried' if prefix else ''}: {', '.join(names[:3])}, ...",
            hint="a state dict of the same architecture and number of classes, .safetensors or .pth",
        ) from e
