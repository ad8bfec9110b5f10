"""What adapters share: weights of a model that is there already, and the arguments of the function that makes it."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from calib.errors import FormatError, InputError
from calib.files import require
from calib.pickles import load_torch, read_pickle

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
    """Load the state dict ``path`` (.safetensors, .pth, or Detectron2's .pkl of arrays) into ``model``.

    Raises:
        MissingFileError: not there. FormatError: damaged, or of another model.
    """
    try:
        kind = require(path, "detector weights").suffix
        state: Any
        if kind == ".pkl":
            state = read_pickle(path, "detector weights")
            own = state.get("model", state) if isinstance(state, dict) else {}
            state = {k: torch.as_tensor(v) for k, v in own.items()}
        else:
            safe = kind == ".safetensors"
            state = load_file(path) if safe else load_torch(path)
        if isinstance(state, dict):
            state = next((state[k] for k in ("model", "state_dict") if k in state), state)
        model.load_state_dict(state)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, TypeError, AttributeError) as e:
        # The second line on names keys; torch's advice to run what the file holds is not passed on.
        said = " ".join(line.strip() for line in str(e).splitlines()[:3]).partition("WeightsUnpickler")[0]
        said = said.partition("(1) In PyTorch")[0].partition("Re-running")[0]
        raise FormatError(
            f"weights {path} do not fit the detector: {said[:400].strip()}",
            hint="a state dict of the same architecture and number of classes, .safetensors or .pth",
        ) from e
