"""The folders ``MODELS/NAME/VERSION/`` on disk: which there are, which may be read, whether they have changed."""

import logging
import os
import re
from pathlib import Path

from calib.errors import FormatError, InputError, MissingFileError
from calib.layout import DESCRIPTION, FIRST, TENSORS

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
VERSION = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)

_log = logging.getLogger("uvicorn.error")


def scan(root: Path) -> dict[str, dict[int, Path]]:
    """Version folders by name and number.

    Raises:
        MissingFileError, InputError: ``root`` is no folder.
    """
    if not root.exists():
        raise MissingFileError(f"model folder not found: {root}", hint="calib train writes MODELS/NAME/VERSION")
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: expected MODELS/NAME/VERSION/{DESCRIPTION}")
    names = [p for p in sorted(root.iterdir()) if _is_name(p.name) and p.is_dir()]
    found = {p.name: _version_folders(p) for p in names}
    return {name: versions for name, versions in found.items() if versions}


def scan_some(root: Path) -> dict[str, dict[int, Path]]:
    """``scan``, of at least one version.

    Raises:
        MissingFileError, InputError: as ``scan``, or there is none.
    """
    found = scan(root)
    if not found:
        raise _no_model(root)
    return found


def _is_name(name: str) -> bool:
    # "stats" is a word of the protocol: GET /v2/models/stats is about all models.
    return NAME.fullmatch(name) is not None and name != "stats"


def left_out(root: Path) -> list[str]:
    """Heads below ``root`` whose folders have names that are not served, with the reason."""
    found = []
    for description in sorted(root.glob(f"*/*/{DESCRIPTION}")):
        version = description.parent
        if not _is_name(version.parent.name):
            found.append(f"{version}: a model's name is 1 to 128 letters, digits, '.', '_' or '-', and not 'stats'")
        elif not VERSION.fullmatch(version.name):
            found.append(f"{version}: a version is a whole number without zeros in front")
    return found


def _version_folders(folder: Path) -> dict[int, Path]:
    try:
        return {int(p.name): p for p in folder.iterdir() if VERSION.fullmatch(p.name) and p.is_dir()}
    except FileNotFoundError:  # removed while we look
        return {}
    except OSError as e:
        _log.warning("folder %s cannot be read: %s", folder, e)
        return {}


def stamp(path: Path) -> str:
    """Size, number and times of a version's files: that of the change too, which no program can set back."""
    found = [_status(path / part) for part in (DESCRIPTION, TENSORS)]
    return " ".join(f"{s.st_size},{s.st_ino},{s.st_mtime_ns},{s.st_ctime_ns}" if s else "none" for s in found)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _no_model(root: Path) -> MissingFileError:
    """There is none; says what is there instead."""
    hint = f"calib train METHOD --cache CACHE --out {root / 'NAME' / FIRST} writes one"
    if (root / DESCRIPTION).exists():
        hint = f"this is a version of one model: give the folder of all models, {root.absolute().parent.parent}"
    elif any((p / DESCRIPTION).exists() for p in _version_folders(root).values()):
        hint = f"this is one model: give the folder of all models, {root.absolute().parent}"
    return MissingFileError(f"no model in {root}: expected NAME/VERSION/{DESCRIPTION}", hint=hint)


def check_files(path: Path) -> None:
    """Raise InputError or FormatError where a version's files lie elsewhere, or are no files."""
    root = path.parent.parent
    for part in (path, path / DESCRIPTION, path / TENSORS):
        if not part.resolve().is_relative_to(root.resolve()):
            raise InputError(f"{part} is a symbolic link that leaves {root}", hint="copy the files")
        if part is not path and part.exists() and not part.is_file():
            raise FormatError(f"{part} is not a regular file")
