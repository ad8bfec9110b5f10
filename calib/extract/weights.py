"""What adapters share: weights of a model that is there already, and the arguments of the function that makes it."""

import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

import calib
from calib.checkpoint import Checkpoint
from calib.errors import CalibError, FormatError, InputError
from calib.registry import load as load_target

_EXAMPLE = "--detector-args '{\"num_classes\": 1204}'"


def factory_arguments(arguments: str, hint: str = _EXAMPLE) -> dict[str, Any]:
    """The JSON object ``arguments``, empty where the text is; ``hint`` shows one as it should be.

    Raises:
        InputError: no JSON, or no object.
    """
    try:
        keywords = json.loads(arguments or "{}")
    except ValueError as e:
        raise InputError(f"detector arguments are not JSON: {e}", hint=hint) from e
    if not isinstance(keywords, dict):
        raise InputError(f"detector arguments are {arguments}: expected a JSON object", hint=hint)
    return keywords


def imported(spec: str) -> Any:
    """What ``package.module:function`` names.

    Raises:
        InputError: it cannot be imported, or is no function.
    """
    # The script of an installed command does not look here. Processes that it starts do, too: where a checkout of calib
    # lies in this folder, they would take that for the package, if the package's own place did not stand before it.
    for place in (Path(calib.__file__).parents[1], Path.cwd()):
        if str(place) not in sys.path:
            sys.path.append(str(place))
    try:
        target = load_target(spec)
    except (Exception, SystemExit) as e:  # a module is a program and raises what it likes
        raise InputError(
            f"detector factory '{spec}' cannot be imported: {_said(e)}",
            hint="package.module:function; is the folder of the module in PYTHONPATH?",
        ) from e
    if isinstance(target, nn.Module) or not callable(target):
        raise InputError(
            f"detector factory '{spec}' is {type(target).__name__}, no function",
            hint="name a function that returns the model: def build(): return model",
        )
    return target


def built(spec: str, factory: Callable[..., Any], keywords: dict[str, Any]) -> nn.Module:
    """The model that ``factory`` returns, out of DataParallel and torch.compile.

    Raises:
        InputError: it raises, or returns something else than a model with numbers.
    """
    try:
        model = factory(**keywords)
    except CalibError:
        raise
    except (TypeError, ValueError) as e:
        raise InputError(f"detector factory '{spec}' refused {keywords}: {e}", hint="--detector-args") from e
    except (Exception, SystemExit) as e:
        raise InputError(
            f"detector factory '{spec}' failed on {keywords}: {_said(e)}", hint="call it in Python to see where"
        ) from e
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    if not isinstance(model, nn.Module):
        raise InputError(
            f"detector factory '{spec}' returned {type(model).__name__}: expected a torch module",
            hint="it must return the model itself; weights go to --weights",
        )
    meta = [name for name, t in chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
    if meta:
        raise InputError(
            f"detector factory '{spec}' returned a model whose {meta[0]} is on the meta device: it has no numbers",
            hint="build it outside of torch.device('meta') and init_empty_weights",
        )
    return model


# Where training scripts keep the names of their classes, and in which entries of a checkpoint.
_NAMES = ("classes", "class_names", "names", "thing_classes", "categories", "id2label", "labels", "label_map")
_BESIDE = ("meta", "dataset_meta", "metadata", "metainfo", "hyper_parameters", "args", "config")


def names_in(document: Any) -> tuple[str, ...]:
    """The names of classes that a checkpoint has beside its weights, in their order; empty where there are none.

    A list of texts, or an object from numbers to texts (or back), under a name that training scripts use for it.
    """
    for part in _parts(document):
        for key, value in part.items():
            if str(key).lower() in _NAMES and (names := _in_order(value)):
                return names
    return ()


def _parts(document: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(document, dict):
        yield document
        for key in _BESIDE:
            yield from _parts(document.get(key))


def _in_order(value: Any) -> tuple[str, ...]:
    if isinstance(value, dict) and value:
        pairs = (
            value.items()
            if all(isinstance(name, str) for name in value.values())
            else ((k, n) for n, k in value.items())
        )
        numbered = [(int(k), name) for k, name in pairs if str(k).isdecimal()]
        value = [name for _, name in sorted(numbered)] if len(numbered) == len(value) else ()
    if isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(name, str) for name in value):
        return tuple(value)
    return ()


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def load_weights(model: nn.Module, path: Path) -> Checkpoint:
    """Load the state dict in ``path`` (.safetensors, .pth, or Detectron2's .pkl of arrays) into ``model``, out of what
    training scripts and wrappers put around it, which is the result.

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
    return checkpoint
