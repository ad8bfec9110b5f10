"""One reference case: arrays (.npz) and what they are (.json), with every array accounted for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-5


class Case:
    """Arrays as tensors by name; remembers which were read, so that nothing in a case goes unchecked.

    ``path`` has no suffix; NAME.json may have ``hyper`` and ``tolerance`` (absolute and relative, 1e-5 when absent).
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        description = json.loads(Path(f"{path}.json").read_text())
        self.hyper: dict[str, Any] = description.get("hyper", {})
        self.description: dict[str, Any] = description
        self._tolerance = float(description.get("tolerance", TOLERANCE))
        with np.load(f"{path}.npz") as arrays:
            self._arrays = {k: torch.from_numpy(np.array(arrays[k])) for k in arrays.files}
        self._unread = set(self._arrays)

    def __getitem__(self, key: str) -> Tensor:
        self._unread.discard(key)
        return self._arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def optional(self, key: str) -> Tensor | None:
        """The array, or None where the case has none of that name."""
        self._unread.discard(key)
        return self._arrays.get(key)

    def keys(self, prefix: str = "") -> Iterator[str]:
        return (k for k in self._arrays if k.startswith(prefix))

    def leaf(self, key: str) -> Tensor:
        """A copy that collects a gradient."""
        return self[key].clone().requires_grad_(True)

    def background_last(self, key: str, dim: int = -1) -> Tensor:
        """Columns or rows of a reference that keeps background first, in our order."""
        return self[key].roll(-1, dims=dim)

    def labels_last(self, key: str) -> Tensor:
        """Labels 0 = background, 1..C -> 0..C-1, C = background; C from ``counts``."""
        return (self[key] - 1) % (len(self["counts"]) + 1)

    def check(self, key: str, found: Tensor | float | None) -> None:
        """``found`` equals the array ``key`` within 1e-5 + 1e-5 |v|, or the tolerance that the case names."""
        assert found is not None, f"{self.name} {key}: nothing to compare"
        wanted, got = self[key].double(), torch.as_tensor(found).detach().double()
        assert got.shape == wanted.shape, f"{self.name} {key}: shape {list(got.shape)}, expected {list(wanted.shape)}"
        excess = (got - wanted).abs() - self._tolerance * (1 + wanted.abs())
        assert not excess.isnan().any() and (excess <= 0).all(), f"{self.name} {key}: off by {float(excess.max()):g}"

    def ignore(self, *keys: str) -> None:
        """Arrays that are given for information (say why where this is called)."""
        self._unread -= set(keys)

    def finish(self) -> None:
        """Every array was an input or was checked."""
        assert not self._unread, f"{self.name}: nothing looks at {sorted(self._unread)}"
