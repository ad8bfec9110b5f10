"""Detector checkpoints, read without running anything in them, and written again as they were but for one layer."""

import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from calib.errors import ExistsError, FormatError
from calib.files import require
from calib.pickles import load_torch, read_pickle

# Of a folder of transformers.
FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Where frameworks keep the state dict: Detectron2 and training scripts, mmdetection.
_STATES = ("model", "state_dict")


@dataclass(frozen=True)
class Checkpoint:
    """``document`` is the whole file, ``state`` the part of it that holds tensors (or numpy arrays) by name."""

    path: Path
    document: Any
    state: dict[str, Any]

    @classmethod
    def read(cls, path: Path, suffix: str = "") -> Self:
        """Read ``.safetensors``, ``.pkl`` (Detectron2's, of numpy arrays) or what torch.save wrote, by its ending.

        Raises:
            MissingFileError: not there. FormatError: damaged, no state dict, or objects that only code can make.
        """
        require(path, "checkpoint")
        try:
            document = _READERS.get(suffix or path.suffix, load_torch)(path)
        except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as e:
            said = " ".join(str(e).partition("(1) In PyTorch")[0].partition("WeightsUnpickler")[0].split())
            raise FormatError(
                f"checkpoint {path} cannot be read as plain tensors: {said[:300]}",
                hint="damaged? else save its state dict alone: torch.save(model.state_dict(), FILE)",
            ) from e
        state = document
        if isinstance(document, dict):
            state = next((document[k] for k in _STATES if isinstance(document.get(k), dict)), document)
        if not isinstance(state, dict) or not any(isinstance(v, Tensor | np.ndarray) for v in state.values()):
            raise FormatError(
                f"checkpoint {path} holds no state dict",
                hint="expected tensors by name, alone or under model, state_dict",
            )
        return cls(path, document, state)

    def tensor(self, name: str) -> Tensor | None:
        """One of them in float32, if there is such a name."""
        value = self.state.get(name)
        return (
            None
            if value is None
            else torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value).float()
        )

    def replace(self, name: str, tensor: Tensor) -> None:
        """Another tensor, in float32, whatever the file's precision: the head's own would be lost in float16."""
        plain = tensor.detach().float().cpu().contiguous()
        self.state[name] = plain.numpy() if isinstance(self.state[name], np.ndarray) else plain

    def write(self, path: Path) -> None:
        """Write the document in the format of the file it was read from."""
        if self.path.suffix == ".safetensors":
            with safe_open(self.path, framework="pt") as f:
                metadata = f.metadata()
            path.write_bytes(save(self.state, metadata))
        elif self.path.suffix == ".pkl":
            path.write_bytes(pickle.dumps(self.document))
        else:
            torch.save(self.document, path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def _read_pickle(path: Path) -> Any:
    return read_pickle(path, "checkpoint")


_READERS = {".safetensors": _read_safetensors, ".pkl": _read_pickle}


def weights_in(folder: Path) -> Path:
    """The weights of a checkpoint folder of transformers.

    Raises:
        MissingFileError: none, or in several files.
    """
    found = next((folder / n for n in FOLDER_WEIGHTS if (folder / n).is_file()), folder / FOLDER_WEIGHTS[0])
    return require(found, "weights of the checkpoint", hint="save_pretrained writes them; in one file, not in shards")


@contextmanager
def folder_like(original: Path, out: Path) -> Iterator[Path]:
    """A copy of the folder ``original`` without its weights, which gets the name ``out`` once it is whole.

    Raises:
        ExistsError: ``out`` exists.
    """
    if out.exists():
        raise ExistsError(f"{out} exists", hint="choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(original, temporary, ignore=shutil.ignore_patterns(*FOLDER_WEIGHTS, ".*"))
        yield temporary
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
