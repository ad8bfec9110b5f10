"""The modules of a detector: whether the parts that adapters need are there, and what passes through them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Recorded(Exception):  # noqa: N818 - the normal end, not an error
    """Raised by the last hook of a forward pass: nothing after the classifier is needed."""


def stages(module: Any) -> list[Any]:
    """The modules of all stages of a cascade; itself where there is one."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def lacking(model: Any, needs: Sequence[str], linear: Sequence[str]) -> list[str]:
    """Those of the dotted names that lead to nothing from ``model``, and of ``linear`` those to another kind of layer,
    in some stage of a cascade."""
    missing = []
    for path in (*needs, *linear):
        found = [model]
        for name in path.split("."):
            found = [m for one in found for m in stages(getattr(one, name, None))]
        if not found or any(m is None or (path in linear and not isinstance(m, nn.Linear)) for m in found):
            missing.append(path)
    return missing


@contextmanager
def recording(*handles: RemovableHandle) -> Iterator[None]:
    """A forward pass that hooks look at and may end by ``Recorded``; they are removed on exit."""
    try:
        with suppress(Recorded):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(module: nn.Module, **methods: Callable[..., Any]) -> Iterator[None]:
    """Other methods for this one module; on exit it has its own again, also where they were replaced before."""
    before = {name: vars(module)[name] for name in methods if name in vars(module)}
    vars(module).update(methods)
    try:
        yield
    finally:
        for name in methods:
            del vars(module)[name]
        vars(module).update(before)
