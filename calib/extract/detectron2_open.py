"""Detectron2's models by config, LazyConfig or factory, and their weights in every form of its model zoo.

A LazyConfig, a factory and what ``setup`` names are programs of the user, which are run; weights are read without
running what they hold. Federated loss is switched off: it is of training, and wants counts of a registered data set.
"""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib.errors import CalibError, FormatError, InputError, MissingExtraError
from calib.extract.adapter import ClassRule
from calib.extract.detectron2 import Detectron2Adapter
from calib.extract.weights import built, factory_arguments, imported, load_weights
from calib.files import require
from calib.pickles import read_pickle
from calib.registry import load as load_target

_INSTALL = "python -m pip install 'git+https://github.com/facebookresearch/detectron2.git'"
_SIZES = ("min_size", "max_size")
# Buffers that a config or another version of Detectron2 makes anew, or that the loss alone needs.
_MADE_ANEW = ("pixel_mean", "pixel_std")
_UNUSED = (*_MADE_ANEW, "anchor_generator.cell_anchors", "fed_loss_cls_weights", "freq_weight")


def open_detector(
    spec: str, device: torch.device, *, weights: Path | None = None, arguments: str = ""
) -> Detectron2Adapter:
    """Open a detector.

    Args:
        spec: a config (``.yaml``), a LazyConfig (``.py``), or ``package.module:function`` that returns the model or its
            config.
        device: where it runs.
        weights: ``.pth`` or ``.pkl`` as Detectron2 and Caffe2 write them, or ``.safetensors``; nothing in them is
            executed.
        arguments: JSON object: for a config, settings to change (``{"MODEL.ROI_HEADS.NUM_CLASSES": 1203}``); for a
            factory its keyword arguments. ``min_size`` and ``max_size`` are taken for resizing, ``setup`` (a module, or
            ``package.module:function`` that is given the config before the file is read) registers what a project adds.

    Raises:
        MissingExtraError: Detectron2 is not installed. MissingFileError, FormatError: see the messages.
        InputError: arguments or weights that do not fit. UnsupportedError: another kind of model.
    """
    try:
        import_module("detectron2")
    except ImportError:
        raise MissingExtraError("detectron2", "detectron2", hint=_INSTALL) from None
    given = factory_arguments(arguments)
    if weights is None:
        raise InputError(f"detectron2:{spec} without weights is an untrained detector", hint="add --weights FILE")
    sizes = {k: given.pop(k) for k in _SIZES if k in given}
    if wrong := [k for k, v in sizes.items() if type(v) is not int or v < 0]:
        raise InputError(f"{wrong[0]} is {sizes[wrong[0]]}: expected a whole number of pixels (0: not resized)")
    setup = given.pop("setup", "")
    if spec.endswith((".yaml", ".yml")):
        model, own = _from_yaml(require(Path(spec), "Detectron2 config"), given, setup, device)
    elif spec.endswith(".py"):
        model, own = _from_lazy(require(Path(spec), "Detectron2 LazyConfig"), given, setup, sizes)
    else:
        model, own = _from_factory(spec, given, setup, device)
    hints = own.pop("hints", ())
    _load(model, weights)
    adapter = Detectron2Adapter(model, f"detectron2:{Path(spec).name}", device, **(own | sizes))
    adapter.classes = ClassRule(hints=hints)
    return adapter


def _thing_classes(datasets: Any) -> tuple[str, ...]:
    """The names of the classes of the first of ``datasets`` that Detectron2's catalog knows with names."""
    catalog = import_module("detectron2.data").MetadataCatalog
    registered = set(catalog.list())
    for name in [datasets] if isinstance(datasets, str) else list(datasets or ()):
        names = getattr(catalog.get(name), "thing_classes", None) if name in registered else None
        if names:
            return tuple(map(str, names))
    return ()


def _prepare(setup: Any, *config: Any) -> None:
    """Import the module that ``setup`` names, and give its function ``config``."""
    if not setup:
        return
    try:
        if ":" in setup:
            load_target(setup)(*config)
        else:
            import_module(setup)
    except Exception as e:  # a program of the user
        raise InputError(
            f"setup '{setup}' cannot be used: {str(e) or repr(e)}",
            hint='--detector-args \'{"setup": "package.module:function"}\'; the function is given the config',
        ) from e


def _from_yaml(path: Path, changes: dict[str, Any], setup: str, device: torch.device) -> tuple[Any, dict[str, Any]]:
    cfg = import_module("detectron2.config").get_cfg()
    if "_target_:" in path.read_text(errors="replace"):
        raise FormatError(
            f"{path} is a LazyConfig that was saved as yaml: it names functions to call",
            hint="give the LazyConfig itself: --detector detectron2:CONFIG.py",
        )
    _prepare(setup, cfg)
    try:
        cfg.merge_from_file(str(path), allow_unsafe=False)
        return _built(cfg, changes, device)
    except CalibError:
        raise
    except Exception as e:  # yaml, yacs and the builders raise what they like
        hint = json.dumps(changes) if changes else "a project that adds settings: --detector-args '{\"setup\": ...}'"
        raise FormatError(f"Detectron2 config {path}: {str(e) or repr(e)}", hint=hint) from e


def _built(cfg: Any, changes: dict[str, Any], device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The model of a config, how it resizes, and what its data set calls its classes."""
    if cfg.is_frozen():
        cfg = cfg.clone()
        cfg.defrost()
    cfg.merge_from_list([part for pair in changes.items() for part in pair])
    cfg.MODEL.DEVICE = str(device)
    cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = False
    model = import_module("detectron2.modeling").build_model(cfg)
    sizes = {"min_size": int(cfg.INPUT.MIN_SIZE_TEST), "max_size": int(cfg.INPUT.MAX_SIZE_TEST)}
    return model, sizes | {"hints": _thing_classes(cfg.DATASETS.TRAIN)}


def _from_lazy(path: Path, changes: dict[str, Any], setup: str, sizes: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    library, omega = import_module("detectron2.config"), import_module("omegaconf").OmegaConf
    try:
        cfg = library.LazyConfig.load(str(path))
        _prepare(setup, cfg)
        for key, value in changes.items():
            if omega.select(cfg, key, default=omega) is omega:
                raise FormatError(f"LazyConfig {path} has no setting {key}")
            omega.update(cfg, key, value)
        for node in _nodes(cfg.model, omega):
            if "use_fed_loss" in node:
                node.use_fed_loss = False
        model = library.instantiate(cfg.model)
        if not isinstance(model, nn.Module):
            raise FormatError(
                f"LazyConfig {path}: its model is {type(model).__name__}, nothing that LazyCall makes",
                hint=f"of mmdetection: --detector mmdet:{path}",
            )
        own = {} if set(_SIZES) <= set(sizes) else _lazy_sizes(cfg, path, omega)
        return model, own | {"hints": _thing_classes(omega.select(cfg, "dataloader.train.dataset.names", default=()))}
    except CalibError:
        raise
    except Exception as e:  # a config is a program and raises what it likes
        raise FormatError(f"LazyConfig {path}: {str(e) or repr(e)}") from e


def _nodes(config: Any, omega: Any) -> Iterator[Any]:
    """Every dictionary of a config."""
    if omega.is_dict(config):
        yield config
    values = config.items_ex(resolve=False) if omega.is_dict(config) else enumerate(config._iter_ex(resolve=False))
    for _, value in values:
        if omega.is_config(value):
            yield from _nodes(value, omega)


def _lazy_sizes(cfg: Any, path: Path, omega: Any) -> dict[str, int]:
    """Of the one ResizeShortestEdge at test time."""
    steps = omega.select(cfg, "dataloader.test.mapper.augmentations") or []
    names = [getattr(step.get("_target_"), "__name__", str(step.get("_target_"))).split(".")[-1] for step in steps]
    if names != ["ResizeShortestEdge"] or not isinstance(steps[0].get("short_edge_length"), int):
        raise FormatError(
            f"LazyConfig {path} does not say how pictures are resized at test time, or in a way that calib does not "
            f"know: {', '.join(names) or 'no dataloader.test.mapper.augmentations'}",
            hint='--detector-args \'{"min_size": 800, "max_size": 1333}\'',
        )
    return {"min_size": int(steps[0].short_edge_length), "max_size": int(steps[0].get("max_size", 2**31 - 1))}


def _from_factory(spec: str, given: dict[str, Any], setup: str, device: torch.device) -> tuple[Any, dict[str, Any]]:
    _prepare(setup)
    factory, kind = imported(spec), import_module("detectron2.config").CfgNode
    own: dict[str, Any] = {}

    def model(**keywords: Any) -> Any:
        made = factory(**keywords)
        if isinstance(made, kind):
            made, found = _built(made, {}, device)
            own.update(found)
        return made

    return built(spec, model, given), own


class _Weights(nn.Module):
    """Takes a state dict as Detectron2's checkpointer does: but what is left over or missing is an error."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        """The model's own names, which the file's are compared with."""
        return self.model.state_dict(*arguments, **keywords)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """
        Raises:
            RuntimeError: it is of another model.
        """
        found = self.model.load_state_dict(state_dict, strict=False)
        missing = [k for k in found.missing_keys if k not in _MADE_ANEW]
        left = [k for k in found.unexpected_keys if not k.endswith(_UNUSED) and _UNUSED[2] not in k]
        if missing or left:
            problems = [f"{what}: {', '.join(k[:3])}" for what, k in (("Missing", missing), ("Unexpected", left)) if k]
            raise RuntimeError("; ".join(problems))
        return found


def _load(model: nn.Module, path: Path) -> None:
    taking = _Weights(model)
    if path.suffix != ".pkl":
        load_weights(taking, path)
        return
    document = read_pickle(path, "detector weights")
    try:
        taking.load_state_dict(_zoo_state(model.state_dict(), document))
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, AssertionError) as e:
        raise FormatError(
            f"weights {path} do not fit the detector: {str(e)[:400].strip()}",
            hint="a state dict of the same architecture and number of classes",
        ) from e


def _zoo_state(own: dict[str, Any], document: Any) -> dict[str, Any]:
    """A ``.pkl`` of the model zoo -> weights by the model's names, matched by Detectron2 where the file asks for that.

    Detectron2's own have "model" and "__author__"; Caffe2's are arrays by Caffe2's names, alone or under "blobs".
    """
    is_named = "model" in document
    content = document["model"] if is_named else document.get("blobs", document)
    arrays = {k: torch.as_tensor(v) for k, v in content.items() if hasattr(v, "shape") and not k.endswith("_momentum")}
    is_caffe = document.get("__author__") == "Caffe2" if is_named else not set(own) & set(arrays)
    if not (is_caffe or document.get("matching_heuristics", False)):
        return arrays
    align = import_module("detectron2.checkpoint.c2_model_loading").align_and_update_state_dicts
    found: dict[str, Any] = align(own, arrays, c2_conversion=is_caffe)
    return found
