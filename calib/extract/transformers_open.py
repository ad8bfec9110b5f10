"""``transformers:FOLDER``: a checkpoint folder of Hugging Face transformers, and what its detector takes beside."""

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from calib.errors import FormatError, InputError, MissingExtraError, UnknownNameError
from calib.extract.transformers import FAMILIES, LABELS_HINT, REFUSED, QueryAdapter, TransformersAdapter, refused
from calib.extract.transformers_text import PROMPTS_HINT, TEXT_FAMILIES, TextAdapter
from calib.extract.weights import factory_arguments
from calib.files import read_json, require


def open_detector(spec: str, device: torch.device, *, weights: Path | None = None, arguments: str = "") -> QueryAdapter:
    """Open the checkpoint folder ``spec`` (config.json, model.safetensors, preprocessor_config.json; of a detector with
    prompts processor_config.json and a tokenizer too); nothing is downloaded.

    Args:
        spec: the folder, as ``save_pretrained`` writes it.
        device: where it runs.
        weights: must be None; the folder has them.
        arguments: JSON object; ``labels`` as for ``TransformersAdapter``, ``prompts`` as for ``TextAdapter`` or the
            annotation file whose category names they are.

    Raises:
        MissingExtraError: transformers is not installed. MissingFileError, FormatError: see the messages.
        InputError, UnknownNameError: arguments that do not fit. UnsupportedError: another kind of model.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    try:
        library = import_module("transformers")
    except ImportError:
        raise MissingExtraError("transformers", "transformers") from None
    if weights is not None:
        raise InputError("a transformers checkpoint folder has its own weights", hint="leave out --weights")
    folder = Path(spec)
    config = require(
        folder / "config.json", "transformers checkpoint", hint="--detector transformers:FOLDER; nothing is downloaded"
    )
    given = factory_arguments(arguments, LABELS_HINT)
    kind = _kind(config)
    has_prompts = kind in TEXT_FAMILIES
    prompts, labels = _prompts(given, kind) if has_prompts else [], None if has_prompts else _labels(given, kind)
    if not (has_prompts and (folder / "processor_config.json").exists()):
        require(folder / "preprocessor_config.json", "transformers checkpoint", hint="the processor's save_pretrained")
    model, processor = _loaded(library, folder, has_prompts)
    source = f"transformers:{folder.name}"
    if has_prompts:
        return TextAdapter(model, processor, source, device, prompts)
    return TransformersAdapter(model, processor, source, device, labels)


def _kind(config: Path) -> str:
    document = read_json(config, "transformers checkpoint")
    kind = str(document.get("model_type")) if isinstance(document, dict) else ""
    if kind in REFUSED:
        raise refused(kind)
    known = (*FAMILIES, *TEXT_FAMILIES)
    if kind not in known:
        raise UnknownNameError("transformers detector", kind, known, hint="others as arrays: docs/raw.md")
    return kind


def _loaded(library: Any, folder: Path, has_prompts: bool) -> tuple[Any, Any]:
    """The model and its processor."""
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
    of_processor = library.AutoProcessor if has_prompts else library.AutoImageProcessor
    of_model = library.AutoModelForZeroShotObjectDetection if has_prompts else library.AutoModelForObjectDetection
    options = {"local_files_only": True, "output_loading_info": True, "dtype": torch.float32}  # whatever was saved
    try:
        processor = of_processor.from_pretrained(folder, local_files_only=True)
        model, report = of_model.from_pretrained(folder, **options)
    except ImportError as e:  # a backbone of timm, for one
        raise InputError(f"checkpoint {folder} needs a package: {str(e).strip().splitlines()[0]}") from e
    except Exception as e:  # whatever the library raises for damaged files
        raise FormatError(f"checkpoint {folder} cannot be read: {e}", hint="is it whole? copy it again") from e
    absent = sorted(report["missing_keys"])
    if absent:  # the library would leave them at random
        raise FormatError(
            f"checkpoint {folder} lacks {len(absent)} weights of the detector: {', '.join(absent[:3])} ..."
        )
    return model, processor


def _labels(given: dict[str, Any], kind: str) -> list[int] | None:
    labels = given.get("labels")
    is_list = labels is None or (isinstance(labels, list) and all(type(k) is int for k in labels))
    if set(given) - {"labels"} or not is_list:
        raise InputError(
            f"detector arguments are {json.dumps(given)}: {kind} takes a list of outputs, labels", hint=LABELS_HINT
        )
    return labels


def _prompts(given: dict[str, Any], kind: str) -> list[str]:
    prompts = given.get("prompts")
    if isinstance(prompts, str):
        prompts = _names(Path(prompts))
    texts = [p for p in prompts if isinstance(p, str)] if isinstance(prompts, list) else []
    if set(given) != {"prompts"} or not texts or texts != prompts:
        raise InputError(
            f"detector arguments are {json.dumps(given)}: {kind} needs prompts, a text for each class",
            hint=PROMPTS_HINT,
        )
    return texts


def _names(path: Path) -> list[str]:
    """Of the categories of an annotation file, in ascending id."""
    document = read_json(path, "annotation file")
    try:
        return [str(c["name"]) for c in sorted(document["categories"], key=lambda c: int(c["id"]))]
    except (KeyError, TypeError, ValueError) as e:
        raise FormatError(f"{path} has no categories with id and name: {e!r}") from e
