"""The picture of an image record: where it lies, and its pixels as it is seen.

A record names its picture by ``file_name``, else by the address it was taken from. The name is never shortened: of
``cam_a/1.png`` and ``cam_b/1.png`` neither stands for the other. Only what is the same in any folder by its making, the
numbers of COCO and of Flickr, is looked for without its folder.
"""

import os
import re
import struct
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from unicodedata import normalize
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image as PillowImage

from calib.errors import FormatError, InputError, MissingFileError
from calib.extract.adapter import Image

MOST_PIXELS = 1 << 29  # of a picture; Pillow takes a third of that for an attack
if PillowImage.MAX_IMAGE_PIXELS is not None:
    PillowImage.MAX_IMAGE_PIXELS = max(PillowImage.MAX_IMAGE_PIXELS, MOST_PIXELS)

# What decoders raise of damaged files.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
)
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: PillowImage.Transpose.FLIP_LEFT_RIGHT,
    3: PillowImage.Transpose.ROTATE_180,
    4: PillowImage.Transpose.FLIP_TOP_BOTTOM,
    5: PillowImage.Transpose.TRANSPOSE,
    6: PillowImage.Transpose.ROTATE_270,
    7: PillowImage.Transpose.TRANSVERSE,
    8: PillowImage.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = tuple(_UPRIGHT[tag] for tag in (5, 6, 7, 8))  # height and width change places
_COCO_FOLDER = re.compile(r"(train|val|test|unlabeled)20\d\d")
_COCO_2014 = re.compile(r"COCO_((?:train|val|test)20\d\d)_\d{12}\.\w+")
_FLICKR = re.compile(r"\d{6,}_[0-9a-f]{8,}(_\w)?\.\w+")


def image_path(record: dict[str, Any], folder: Path) -> Path:
    """Where the picture lies under ``folder``, or under the folder that it is in, if its name begins so.

    Raises:
        MissingFileError: nowhere. InputError: in two places. FormatError: a name that is no text.
    """
    looked: dict[Path, None] = {}
    for name in _names(record):
        places = _places(name, folder)
        found = [p for p in places if os.path.isfile(p)]  # noqa: PTH113 - it raises nothing
        if len(found) > 1 and not all(found[0].samefile(p) for p in found[1:]):
            raise InputError(
                f"image {record['id']} may be any of {', '.join(map(str, found))}",
                hint=f"--images names the folder in which {name} lies: move the others away",
            )
        if found:
            return found[0]
        looked |= dict.fromkeys(places)
    where = ", ".join(f"{p} (a folder)" if os.path.isdir(p) else str(p) for p in looked)  # noqa: PTH112 - nor this
    raise MissingFileError(
        f"image {record['id']} not found: {where or 'it has no file_name and no coco_url'}",
        hint="--images names the folder of pictures, in which they lie as their names say",
    )


def _names(record: dict[str, Any]) -> Iterator[str]:
    """Names to look for, one after the other."""
    given = {key: record.get(key) for key in ("file_name", "coco_url", "flickr_url")}
    for key, name in given.items():
        if name is not None and not isinstance(name, str):
            raise FormatError(f"{key} of image {record['id']} must be text, got {name!r}")
    name = given.pop("file_name") or ""
    if name and "://" not in name:
        yield from _spellings(name)
        if split := _COCO_2014.fullmatch(name):
            yield f"{split[1]}/{name}"
        yield from _anywhere(name, record)
    for address in (name if "://" in name else None, *given.values()):
        try:
            parts = PurePosixPath(urlsplit(address or "").path).parts[-2:]
        except ValueError:  # no address
            continue
        tail = "/".join(part for part in parts if part != "/")
        for spelled in dict.fromkeys((unquote(tail), tail)):
            if spelled:
                yield from _spellings(spelled)
                yield from _anywhere(spelled, record)


def _spellings(name: str) -> Iterator[str]:
    """``name``, then as other systems write it: letters with their accents as one sign or two, Windows' folders."""
    windows = PureWindowsPath(name)
    for spelled in (name, name if windows.anchor else windows.as_posix()):
        yield from dict.fromkeys((spelled, normalize("NFC", spelled), normalize("NFD", spelled)))


def _anywhere(name: str, record: dict[str, Any]) -> Iterator[str]:
    """Its last part, if that alone names one picture: COCO counts over all its splits, Flickr over all its pictures."""
    *folders, last = PurePosixPath(PureWindowsPath(name).as_posix()).parts or ("",)
    number = re.search(r"(\d+)\.\w+$", last)
    is_coco = folders and _COCO_FOLDER.fullmatch(folders[-1]) and number and int(number[1]) == record["id"]
    if folders and (is_coco or _FLICKR.fullmatch(last)):
        yield last


def _places(name: str, folder: Path) -> list[Path]:
    """Of ``a/1.png`` in ``folder``: ``folder/a/1.png``, and ``folder/1.png`` if that folder is itself ``a``."""
    parts = PurePosixPath(name).parts
    inside = [
        folder.joinpath(*parts[k:])
        for k in range(1, len(parts))
        if ".." not in parts and any(own[-k:] == parts[:k] for own in _own_names(folder))
    ]
    return [folder / name, *inside]


@lru_cache(maxsize=8)
def _own_names(folder: Path) -> tuple[tuple[str, ...], ...]:
    return folder.absolute().parts, folder.resolve().parts


def read_image(record: dict[str, Any], folder: Path) -> Image:
    """[height, width, 3] RGB, turned as its EXIF tag says, unless only the unturned one has the json's size.

    So Detectron2, OpenCV (mmdetection) and transformers read it. Of several frames or pages the first is read; what is
    transparent has the colour that is stored under it.

    Raises:
        MissingFileError, InputError: as ``image_path``. FormatError: not a picture, more than ``MOST_PIXELS``, or of
            another size than the json says.
    """
    path = image_path(record, folder)
    try:
        with PillowImage.open(path) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise PillowImage.DecompressionBombError(f"{picture.width} x {picture.height} pixels")
            if picture.mode[0] in "IF":  # Pillow would cut what is above 255 to white
                raise FormatError(
                    f"image {path} has more than 8 bits per channel ({picture.mode})",
                    hint="convert it to 8 bits as for training",
                )
            # Pillow warns of transparency in a palette on the way to RGB alone.
            stored = (picture.convert("RGBA") if "transparency" in picture.info else picture).convert("RGB")
            turn = _turn(picture)
    except (PillowImage.DecompressionBombError, PillowImage.DecompressionBombWarning) as e:
        hint = f"it is whole, but pictures of at most {MOST_PIXELS} pixels are read: cut it into tiles"
        raise FormatError(f"image {path} is too large: {e}", hint=hint) from e
    except _DAMAGED as e:
        raise FormatError(f"image {path} cannot be read: {e}", hint="the file is damaged: restore it and resume") from e
    return _as_said(stored, turn, record, path)


def stored_size(path: Path) -> tuple[tuple[int, int], bool]:
    """Height and width of the picture as its file has it, and whether its EXIF tag turns it on its side. Of the file
    only the beginning is read.

    Raises:
        FormatError: no picture.
    """
    try:
        with PillowImage.open(path) as picture:
            return (picture.height, picture.width), _turn(picture) in _ON_ITS_SIDE
    except (*_DAMAGED, PillowImage.DecompressionBombError, PillowImage.DecompressionBombWarning) as e:
        raise FormatError(f"image {path} cannot be read: {e}", hint="the file is damaged: restore it") from e


def _turn(picture: PillowImage.Image) -> PillowImage.Transpose | None:
    """What makes a loaded picture upright. Formats that Pillow turns by itself have no tag any more."""
    try:
        return _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # of damaged tags, on which the pixels do not depend; Detectron2 and OpenCV pass over them, too
        return None


def _as_said(
    stored: PillowImage.Image, turn: PillowImage.Transpose | None, record: dict[str, Any], path: Path
) -> Image:
    """The pixels, upright unless ``record`` gives the size of ``stored`` only."""
    upright = stored if turn is None else stored.transpose(turn)
    expected = (int(record.get("width") or upright.width), int(record.get("height") or upright.height))
    for pixels in (upright, stored):
        if pixels.size == expected:
            return np.array(pixels)
    tagged = "" if upright.size == stored.size else f" ({stored.height} x {stored.width} without its EXIF orientation)"
    raise FormatError(
        f"image {path} is {upright.height} x {upright.width}{tagged}, the json says {expected[1]} x {expected[0]}",
        hint="--images names the folder of another split or size?",
    )
