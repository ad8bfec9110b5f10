"""Pictures that the annotation file names: missing, named twice or in two ways, damaged, of other sizes.

Every picture is looked for; of at most ``OPENED``, evenly spread over the file, the size is read, and some are decoded.
Which picture is meant, and how it is turned, is the rule of ``calib.extract.pictures``. Letter: I images.
"""

import glob
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from calib.annotations import Integers
from calib.doctor.findings import EXAMPLES, Finding, first, share
from calib.doctor.reading import Split
from calib.errors import CalibError, InputError, MissingFileError
from calib.extract.dataset import records_of
from calib.extract.pictures import image_path, read_image, stored_size
from calib.extract.plan import READERS
from calib.progress import Bar, Progress, silent

OPENED = 2000
ALIKE = 0.9  # of pictures of other sizes: above it all of them have one cause
Records = list[dict[str, Any]]
Size = tuple[int, int]  # height, width


class Seen(NamedTuple):
    """Of an opened file: how it is read, whether a tag turns it, and why it cannot be read."""

    size: Size = (0, 0)  # as ``read_image`` gives it, if it were to give any
    is_turned: bool = False
    as_stored: bool = False  # though it has a tag: the json has the size of the unturned picture
    fault: str = ""


@dataclass(frozen=True)
class Pictures:
    """Of a split's images, in ascending id: the file, None where there is none, and what was seen of those opened."""

    records: Records
    path: list[Path | None]
    seen: dict[int, Seen]

    def usable(self) -> list[int]:
        """Images whose pictures are there and not known to be damaged."""
        return [i for i, p in enumerate(self.path) if p and not self.seen.get(i, Seen()).fault]

    def sizes(self, listed: Integers) -> Integers:
        """Height and width that boxes are in: as the json says, else as the file has it, else 0. [I, 2]"""
        size = listed.copy()
        for i, one in self.seen.items():
            if not size[i].all():
                size[i] = one.size
        return size


def look(split: Split, decoded: int, progress: Progress = silent) -> tuple[list[Finding], Pictures]:
    """Look for all pictures of ``split``, open ``OPENED`` of them, decode ``decoded``."""
    assert split.folder is not None
    records = records_of(split.read.images)
    opened, total = min(OPENED, len(records)), len(records)
    work = total + opened + min(decoded, opened)
    with progress(f"pictures of {split.name}", total=work, unit="steps") as bar:
        path, faults = _find(records, split.folder, bar)
        there = [i for i, p in enumerate(path) if p]
        chosen = spread(there, OPENED)
        seen = dict(zip(chosen, _map(lambda i: _open(path[i], records[i]), chosen, bar), strict=True))
        sound = spread([i for i in chosen if not seen[i].fault], decoded)
        for i, fault in zip(sound, _map(lambda i: _decode(records[i], split.folder), sound, bar), strict=True):
            seen[i] = seen[i]._replace(fault=fault)
    pictures = Pictures(records, path, seen)
    found = [*_lost(split, path, faults), *_one_for_two(split, pictures), *_damaged(split, pictures)]
    return [*found, *_sizes(split, pictures), *_turned(split, pictures)], pictures


def _find(records: Records, folder: Path, bar: Bar) -> tuple[list[Path | None], dict[int, CalibError]]:
    path: list[Path | None] = []
    faults: dict[int, CalibError] = {}
    for i, record in enumerate(records):
        try:
            path.append(image_path(record, folder))
        except CalibError as e:
            path.append(None)
            faults[i] = e
        bar.advance()
    return path, faults


def spread(among: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of ``among``, evenly spread."""
    if len(among) <= most:
        return list(among)
    return [among[k] for k in np.linspace(0, len(among) - 1, most).astype(int).tolist()] if most else []


def _map(look_at: Callable[[int], Any], images: Iterable[int], bar: Bar) -> list[Any]:
    found = []
    with ThreadPoolExecutor(READERS) as pool:
        for one in pool.map(look_at, images):
            found.append(one)
            bar.advance()
    return found


def _open(path: Path | None, record: dict[str, Any]) -> Seen:
    assert path is not None
    try:
        stored, is_turned = stored_size(path)
    except CalibError as e:
        return Seen(fault=str(e))
    upright = stored[::-1] if is_turned else stored
    as_stored = is_turned and _fits(record, stored) and not _fits(record, upright)
    return Seen(stored if as_stored else upright, is_turned, as_stored)


def _fits(record: dict[str, Any], size: Size) -> bool:
    return all(record[key] in (None, side) for key, side in zip(("height", "width"), size, strict=True))


def unsized(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` for a picture of any size."""
    return record | {"height": None, "width": None}


def _decode(record: dict[str, Any], folder: Path | None) -> str:
    """Why the picture cannot be read; empty where it can."""
    assert folder is not None
    try:
        read_image(unsized(record), folder)
    except CalibError as e:
        return str(e)
    return ""


def _lost(split: Split, path: list[Path | None], faults: dict[int, CalibError]) -> list[Finding]:
    found = []
    for code, kind, what, remedy in (
        ("pictures-missing", MissingFileError, "are not where their names say", _elsewhere(split, faults)),
        ("pictures-ambiguous", InputError, "may be any of several files", "move the files that are not meant away"),
    ):
        own = [str(e) for e in faults.values() if type(e) is kind]
        if own:
            text = f"{share(len(own), len(path))} pictures {what}: {own[0]}"
            details = {"pictures": len(own), "of": len(path)}
            found.append(Finding(code, "error", split.where, text, remedy, tuple(own[:EXAMPLES]), details))
    return found


def _elsewhere(split: Split, faults: dict[int, CalibError]) -> str:
    """The folder that does have the first missing picture, if it lies near."""
    apart = f" (--{split.name}-images of calib doctor, where they lie apart)"
    option = "--images" if split.name == "train" else f"--images{apart}"
    plain = f"{option} names the folder of pictures, in which they lie as their names say"
    names, folder = split.read.images.names["file_name"], split.folder
    missing = next((i for i, e in faults.items() if isinstance(e, MissingFileError)), None)
    name = "" if missing is None else names[missing] or ""
    if not name or folder is None or "://" in name or name.startswith("/"):
        return plain
    whole, last = glob.escape(name), glob.escape(Path(name).name)
    for above in (folder, folder.parent):
        # What a name with folders calls is that picture, not one of the same last name elsewhere.
        for pattern in (f"*/{whole}", f"*/*/{whole}") if whole != last else (f"*/{last}", f"*/*/{last}"):
            found = list(islice(above.glob(pattern), 2))
            if len(found) > 1:
                return f"{found[0]} and {found[1]} are there: file_name has to say which, with its folder"
            for near in found:
                home = Path(str(near)[: -len(name)]) if str(near).endswith(f"/{name}") else near.parent
                return f"{near} is there: {option} {home}"
    return plain


def _one_for_two(split: Split, pictures: Pictures) -> list[Finding]:
    times = Counter(p for p in pictures.path if p)
    again = [f"{p} ({n} times)" for p, n in times.items() if n > 1]
    if not again:
        return []
    text = f"{len(again)} pictures belong to more than one image of the file: {first(again)}"
    remedy = "one image per picture, with all its annotations: objects of the others count as missed in each"
    examples, details = tuple(again[:EXAMPLES]), {"pictures": len(again)}
    return [Finding("pictures-twice", "warning", split.where, text, remedy, examples, details)]


def _damaged(split: Split, pictures: Pictures) -> list[Finding]:
    faults = [one.fault for one in pictures.seen.values() if one.fault]
    if not faults:
        return []
    text = f"{share(len(faults), len(pictures.seen))} pictures that were opened cannot be read: {faults[0]}"
    details = {"pictures": len(faults), "opened": len(pictures.seen)}
    remedy = "restore these files, or leave their images out of the json"
    return [Finding("pictures-unreadable", "error", split.where, text, remedy, tuple(faults[:EXAMPLES]), details)]


def _sizes(split: Split, pictures: Pictures) -> list[Finding]:
    """Pictures of another size than the json says, by their common cause."""
    listed = split.read.images.size
    sized = {i: s.size for i, s in pictures.seen.items() if not s.fault}
    lacking = int((listed == 0).any(axis=1).sum())
    found = []
    if lacking:
        text = f"{share(lacking, len(listed))} images have no width and height: they are taken from the pictures"
        found.append(Finding("sizes-missing", "note", split.where, text, details={"images": lacking}))
    own = np.asarray(list(sized.values()), np.float64).reshape(-1, 2)
    json = listed[list(sized)].astype(np.float64)
    other = np.flatnonzero((json > 0).all(axis=1) & (own != json).any(axis=1))
    if not len(other):
        return found
    own, json, ids = own[other], json[other], split.read.images.id[np.asarray(list(sized))[other]]
    examples = tuple(
        f"image {i}: the json says {w:.0f} x {h:.0f}, the file is {wide:.0f} x {high:.0f}"
        for i, (h, w), (high, wide) in zip(ids[:EXAMPLES].tolist(), json.tolist(), own.tolist(), strict=False)
    )
    code, what, remedy, details = _cause(own, json)
    text = f"{share(len(other), len(sized))} pictures are of another size than the json says{what}: {first(examples)}"
    details |= {"pictures": len(other), "of": len(sized)}
    return [*found, Finding(code, "error", split.where, text, remedy, examples, details)]


def _cause(own: NDArray[np.float64], json: NDArray[np.float64]) -> tuple[str, str, str, dict[str, Any]]:
    """Code, what it is, remedy, details; sizes [M, 2] are height and width, of the file and of the json."""
    if (own == json[:, ::-1]).mean() >= ALIKE:
        return "sizes-swapped", " with sides exchanged", "exchange width and height in the images of the json", {}
    ratio = own / json
    rounding = (1.5 / json).max(axis=1) * ratio.max(axis=1)
    if (np.abs(ratio[:, 0] - ratio[:, 1]) <= rounding).mean() < ALIKE:
        remedy = "--images names the folder of another split, or other pictures: give those that were annotated"
        return "picture-sizes", "", remedy, {}
    middle = float(np.median(ratio))
    is_one = float(np.quantile(np.abs(ratio / middle - 1), ALIKE)) < 0.02
    scale = f", {middle:.3g} times" if is_one else f", {ratio.min():.3g} to {ratio.max():.3g} times"
    what = f"{scale} in both sides: a json in other units"
    remedy = "give the pictures that were annotated, or multiply in the json "
    factor = f"by {middle:.6g}" if is_one else "by each picture's own factor"
    remedy += f"width and height of images, bbox, segmentation, and area (twice) {factor}"
    return "json-scale", what, remedy, {"ratio": middle, "is_constant": is_one}


def _turned(split: Split, pictures: Pictures) -> list[Finding]:
    seen = pictures.seen.values()
    turned, unturned = sum(s.is_turned for s in seen), sum(s.as_stored for s in seen)
    if not turned:
        return []
    text = f"{share(turned, len(seen))} pictures have an EXIF tag that turns them on their side; calib turns them, but "
    text += f"for the {unturned} of which the json has the size of the unturned picture"
    mixed = 0 < unturned < turned
    remedy = "were boxes drawn on turned or unturned pictures? write the sizes of the images so, alike for all"
    details = {"turned": turned, "as_stored": unturned, "opened": len(seen)}
    severity = "warning" if mixed else "note"
    return [Finding("pictures-turned", severity, split.where, text, remedy if mixed else "", (), details)]
