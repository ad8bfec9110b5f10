"""Checkpoint folders as transformers' save_pretrained writes them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calib.errors import ExistsError
from calib.files import require

FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


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
