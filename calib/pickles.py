"""Pickles of other tools, read without running them: only arrays, numbers and plain containers are built.

A pickle is a program; ``pickle.load`` runs whatever it names. Here every name but those of ``_KNOWN`` is refused, or,
where the rest of the file is wanted, stands for a ``Kept``.
"""

import argparse
import io
import pathlib
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calib.errors import FormatError
from calib.files import require


def _storage(content: bytes) -> Any:
    """A tensor's numbers, which torch pickles as a file of its own."""
    import torch

    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _numpy(name: str) -> Callable[[], Any]:
    def load() -> Any:
        from numpy import dtype, ndarray
        from numpy._core import multiarray, numeric

        parts = {"ndarray": ndarray, "dtype": dtype, "_frombuffer": numeric._frombuffer}  # type: ignore[attr-defined]
        return parts.get(name) or getattr(multiarray, name)

    return load


def _size() -> Any:
    from torch import Size

    return Size


def _rebuild(name: str) -> Callable[[], Any]:
    def load() -> Any:
        from torch import _utils

        return getattr(_utils, name)

    return load


_KNOWN: dict[tuple[str, str], Callable[[], Any]] = {
    ("collections", "OrderedDict"): lambda: OrderedDict,
    ("collections", "defaultdict"): lambda: defaultdict,
    ("builtins", "list"): lambda: list,
    ("builtins", "dict"): lambda: dict,
    ("builtins", "set"): lambda: set,
    ("__builtin__", "set"): lambda: set,
    ("_codecs", "encode"): lambda: _encode,
    ("torch.storage", "_load_from_bytes"): lambda: _storage,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild("_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"): _rebuild("_rebuild_parameter"),
    # What training scripts keep of their command line: names and values, and paths, which open nothing.
    ("argparse", "Namespace"): lambda: argparse.Namespace,
    ("pathlib", "PosixPath"): lambda: pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): lambda: pathlib.PurePosixPath,
    ("pathlib", "PurePosixPath"): lambda: pathlib.PurePosixPath,
}
for _module in (
    "numpy",
    "numpy.core.multiarray",
    "numpy._core.multiarray",
    "numpy.core.numeric",
    "numpy._core.numeric",
):
    for _name in ("ndarray", "dtype", "_reconstruct", "scalar", "_frombuffer"):
        _KNOWN[_module, _name] = _numpy(_name)


def _encode(text: str, encoding: str) -> bytes:
    """Bytes, as protocol 2 pickles them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


class Kept(dict[Any, Any]):
    """In the place of an object that only code can make: what it holds, where it is a dict or list; nothing is done."""

    name = ""
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__()

    def __call__(self, *args: Any, **keywords: Any) -> "Kept":
        """What it would make is itself."""
        return self

    def __setstate__(self, state: Any) -> None:
        """What it would be made from is not looked at."""

    def append(self, item: Any) -> None:
        """As a list; numbered."""
        self[len(self)] = item

    def extend(self, items: Any) -> None:
        """As a list; numbered."""
        for item in items:
            self.append(item)


def holds_kept(value: Any) -> bool:
    """Whether there is a ``Kept``, or the class of one, in plain containers."""
    if isinstance(value, Kept) or (isinstance(value, type) and issubclass(value, Kept)):
        return True
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return any(holds_kept(v) for pair in value.items() for v in pair)
    return isinstance(value, list | tuple | set) and any(map(holds_kept, value))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]()
        if module == "torch" and (dtype := _dtype(name)) is not None:
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is neither array nor plain container")


class _KeepingUnpickler(_Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except pickle.UnpicklingError:
            return type("Kept", (Kept,), {"name": f"{module}.{name}"})


def _dtype(name: str) -> Any:
    import torch

    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


class _Plain:
    """``pickle`` for ``torch.load``."""

    Unpickler: type[_Unpickler] = _Unpickler

    @classmethod
    def load(cls, file: Any, **options: Any) -> Any:
        """As ``pickle.load``."""
        return cls.Unpickler(file, **options).load()


class _Keeping(_Plain):
    Unpickler = _KeepingUnpickler


def read_pickle(path: Path, what: str, *, keep: bool = False) -> Any:
    """The content of the pickle ``path``; ``what`` it is, for errors. ``keep``: what is not known is a ``Kept``.

    Raises:
        MissingFileError: not there. FormatError: damaged, or it holds more than arrays and plain containers.
    """
    require(path, what)
    try:
        with open(path, "rb") as file:
            return (_KeepingUnpickler if keep else _Unpickler)(file, encoding="latin1").load()
    except Exception as e:  # a damaged pickle can raise anything
        raise FormatError(
            f"{what} {path} cannot be read: {_said(e)}", hint="a pickle is read without running what it holds"
        ) from e


def read_torch(path: Path, what: str, *, keep: bool = False) -> Any:
    """What ``torch.save`` wrote to ``path``, on the CPU; ``what`` and ``keep`` as for ``read_pickle``.

    By torch's own reader of plain tensors, or, where there is more than those, by ours, which runs as little.

    Raises:
        MissingFileError, FormatError: as ``read_pickle``; a TorchScript program.
    """
    import torch

    if zipfile.is_zipfile(require(path, what)):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise FormatError(f"{what} {path} is a TorchScript program", hint="torch.save(m.state_dict(), …)")
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            # As little is run as by torch's own: names of ``_KNOWN`` alone are called.
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_Keeping if keep else _Plain)
    except Exception as e:  # a damaged file can raise anything
        raise FormatError(
            f"{what} {path} cannot be read: {_said(e)}",
            hint="is it damaged? it is read without running what it holds",
        ) from e


def _said(error: Exception) -> str:
    """In one line; of errors that hold a number or a key, what they are, too."""
    text = " ".join(str(error).split())[:300]
    return text if " " in text else f"{type(error).__name__} {text}".strip()
