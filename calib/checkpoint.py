"""Detector checkpoints, read without running anything in them, and written again as they were but for one layer.

A training script saves more than weights: its arguments, its optimizer, a moving average. The state dict is found in
the entries of ``ENTRIES``, however deep they lie; objects that only code can make become ``pickles.Kept``.
"""

import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from calib.errors import FormatError
from calib.files import require
from calib.pickles import Kept, holds_kept, read_pickle, read_torch

# Where state dicts lie: Detectron2 and training scripts; mmdetection and Lightning; tutorials; wrapped modules;
# moving averages, which are taken where there is nothing else.
ENTRIES = ("model", "state_dict", "model_state_dict", "model_state", "net", "network", "detector", "weights", "params",
           "module", "ema", "model_ema", "ema_model", "ema_state_dict", "averaged_model")  # fmt: skip
_DEEPEST = 4  # of entries in each other


@dataclass(frozen=True)
class Checkpoint:
    """``document`` is the whole file, ``state`` the part of it that holds tensors (or numpy arrays) by name.

    ``entry``: where it lies in the document (``ema.module``), empty where it is the document. ``copies``: further
    entries that hold weights.
    """

    path: Path
    document: Any
    state: dict[str, Any]
    entry: str = ""
    copies: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path, suffix: str = "", what: str = "checkpoint") -> Self:
        """Read ``.safetensors``, ``.pkl`` (Detectron2's, of numpy arrays) or what torch.save wrote, by its ending.

        Raises:
            MissingFileError: not there. FormatError: damaged, or no state dict.
        """
        document = _document(path, suffix or path.suffix, what)
        found = list(_states(document))
        if not found:
            raise FormatError(
                f"{what} {path} holds no state dict: {_seen(document)}",
                hint=f"expected tensors by name, alone or under {', '.join(ENTRIES[:3])} and the like",
            )
        (entry, state), *others = found
        return cls(path, document, state, entry, tuple(name for name, _ in others))

    def tensor(self, name: str) -> Tensor | None:
        """One of them in float32, if there is such a name."""
        value = self.state.get(name)
        return None if value is None else _tensor(value).float()

    def replace(self, name: str, tensor: Tensor) -> None:
        """Another tensor, in float32, whatever the file's precision: the head's own would be lost in float16."""
        plain = tensor.detach().float().cpu().contiguous()
        self.state[name] = plain.numpy() if isinstance(self.state[name], np.ndarray) else plain

    def of(self, names: set[str]) -> tuple[dict[str, Tensor], str]:
        """The tensors of the module whose state dict has ``names``, and the prefix that they have in the file.

        Wrappers put ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile), ``model.`` (Lightning) or others before
        the names; what lies outside the prefix is of other modules and left out. A prefix under which no name of the
        module is found is empty.

        Raises:
            FormatError: several prefixes with all names.
        """
        plain = {name.replace("_orig_mod.", ""): name for name in self.state if isinstance(name, str)}
        prefix, found = _prefix(plain, names, self.path)
        if found < len(names):  # DataParallel around a part of the module
            inner = {re.sub(r"(^|\.)module\.", r"\1", name): own for name, own in plain.items()}
            other, more = _prefix(inner, names, self.path)
            if more > found:
                plain, prefix = inner, other
        own = {name.removeprefix(prefix): self.state[key] for name, key in plain.items() if name.startswith(prefix)}
        return {k: _tensor(v) if isinstance(v, np.ndarray | np.generic) else v for k, v in own.items()}, prefix

    def unwritten(self) -> list[str]:
        """Entries of the document with objects that only code can make: ``write`` leaves them out."""
        return [str(k) for k, v in self.document.items() if holds_kept(v)] if isinstance(self.document, dict) else []

    def write(self, path: Path) -> None:
        """Write the document, but for ``unwritten``, in the format of the file it was read from."""
        left_out = self.unwritten()
        document = {k: v for k, v in self.document.items() if str(k) not in left_out} if left_out else self.document
        if self.path.suffix == ".safetensors":
            with safe_open(self.path, framework="pt") as f:
                metadata = f.metadata()
            path.write_bytes(save(self.state, metadata))
        elif self.path.suffix == ".pkl":
            path.write_bytes(pickle.dumps(document))
        else:
            torch.save(document, path)


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, np.ndarray):
        return torch.as_tensor(value)
    native = value.astype(value.dtype.newbyteorder("="))  # a copy: the file's own may be read-only, or big-endian
    return torch.as_tensor(native)


def _states(document: Any, at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """State dicts in the entries of ``document``; itself where none of them has any."""
    if not isinstance(document, dict) or at.count(".") > _DEEPEST:
        return
    inner = [
        found for name in ENTRIES if name in document for found in _states(document[name], f"{at}.{name}".strip("."))
    ]
    if inner:
        yield from inner
    elif any(isinstance(v, Tensor | np.ndarray) for v in document.values()):
        yield at, document


def _prefix(names: Mapping[str, str], wanted: set[str], path: Path) -> tuple[str, int]:
    """What stands before the most of ``wanted`` in ``names``, and before how many."""
    counts: Counter[str] = Counter()
    for name in names:
        starts = ["", *accumulate(f"{part}." for part in name.split(".")[:-1])]
        counts.update(start for start in starts if name.removeprefix(start) in wanted)
    most = max(counts.values(), default=0)
    best = [p for p, n in counts.items() if n == most]
    plain = [p for p in best if not re.search("ema|teacher|averag", p)] or best
    if len(plain) > 1 and most == len(wanted) and "" not in plain:
        raise FormatError(
            f"checkpoint {path} holds {len(plain)} such modules, under {', '.join(sorted(plain))}",
            hint="save the state dict of one of them",
        )
    return ("", counts[""]) if counts[""] == most else (plain[0], most)


def _seen(document: Any) -> str:
    """What a file holds, for errors."""
    if isinstance(document, Kept) or not isinstance(document, dict):
        return f"it holds {_kind(document)}"
    entries = [f"{k} ({_kind(v)})" for k, v in list(document.items())[:8]]
    return f"its entries are {', '.join(entries)}" if entries else "it is empty"


def _kind(value: Any) -> str:
    return f"{value.name}, which only code can make" if isinstance(value, Kept) else type(value).__name__


def _document(path: Path, suffix: str, what: str) -> Any:
    if suffix == ".pkl":
        return read_pickle(path, what, keep=True)
    if suffix != ".safetensors":
        return read_torch(path, what, keep=True)
    try:
        return load_file(require(path, what))
    except (SafetensorError, OSError, ValueError) as e:
        raise FormatError(f"{what} {path} cannot be read: {e}", hint="is it damaged? copy it again") from e
