"""Whether splits that should have no picture in common have some: by files, or by names, and by what files hold."""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from calib.doctor.findings import EXAMPLES, Finding, first
from calib.doctor.pictures import Pictures, spread
from calib.doctor.reading import Split
from calib.progress import Progress, silent

NEARLY_ALL = 0.9
COMPARED = 1000  # pictures whose contents are looked for in the other split
PAIRS = (("val", "train"), ("tune", "train"), ("val", "tune"))
_WHY = {
    "train": "metrics on {} would be those of pictures that were trained on: give a split of other pictures",
    "tune": "what is chosen on tune would be judged on the same pictures as {}: take a part of TRAIN for tune",
}


@dataclass(frozen=True)
class Place:
    """Which picture an image has: the file, or as much as its record tells; ``bytes``: its length."""

    key: Hashable
    path: Path | None = None
    bytes: int = -1


def check_pair(
    one: Split, other: Split, pictures: dict[str, Pictures], progress: Progress = silent
) -> tuple[list[Finding], dict[str, float]]:
    """Findings about pictures of ``one`` (val) that are in ``other`` (train), and details."""
    own, theirs = (_places(split, pictures.get(split.name)) for split in (one, other))
    known = {p.key for p in theirs}
    same = [i for i, p in enumerate(own) if p.key in known]
    left = spread([i for i, p in enumerate(own) if p.key not in known and p.path], COMPARED)
    equal = _equal(own, left, theirs, progress, f"{one.name} against {other.name}") if left else []
    more = len(equal) / len(left) * (len(own) - len(same)) if left else 0.0
    total = len(same) + more
    details = {
        "same": len(same),
        "compared": len(left),
        "same_content": len(equal),
        "share": total / max(len(own), 1),
        "share_of_other": min(1.0, total / max(len(theirs), 1)),
        "same_ids": len(set(one.read.images.id.tolist()) & set(other.read.images.id.tolist())),
    }
    if not total:
        return [], details
    return [_finding(one, other, [*same, *equal], details, by_file=any(p.path for p in own))], details


def _places(split: Split, pictures: Pictures | None) -> list[Place]:
    names = split.read.images.names
    known = [next(filter(None, of), None) for of in zip(*names.values(), strict=True)]
    places = [Place(name or ("id", i)) for name, i in zip(known, split.read.images.id.tolist(), strict=True)]
    for i, path in enumerate(pictures.path if pictures else ()):
        if path:
            at = path.stat()
            places[i] = Place((at.st_dev, at.st_ino), path, at.st_size)
    return places


def _equal(own: list[Place], left: list[int], theirs: list[Place], progress: Progress, label: str) -> list[int]:
    """Those of ``left`` whose file holds what a file of the other split holds."""
    contents, found = _Contents(theirs), []
    with progress(label, total=len(left), unit="pictures") as bar:
        for i in left:
            if contents.has(own[i]):
                found.append(i)
            bar.advance()
    return found


class _Contents:
    """Whether some file holds the same bytes: only files of the same length are read."""

    def __init__(self, places: list[Place]) -> None:
        self._of_length: dict[int, list[Path]] = {}
        self._digests: dict[int, set[str]] = {}
        for p in places:
            if p.path:
                self._of_length.setdefault(p.bytes, []).append(p.path)

    def has(self, place: Place) -> bool:
        if place.path is None or place.bytes not in self._of_length:
            return False
        if place.bytes not in self._digests:
            self._digests[place.bytes] = {_digest(path) for path in self._of_length[place.bytes]}
        return _digest(place.path) in self._digests[place.bytes]


def _digest(path: Path) -> str:
    return xxhash.xxh3_128(path.read_bytes()).hexdigest()


def _finding(one: Split, other: Split, images: list[int], details: dict[str, float], *, by_file: bool) -> Finding:
    part = max(details["share"], details["share_of_other"])
    is_same = part >= NEARLY_ALL
    names = [one.read.images.names["file_name"][i] or f"image {one.read.images.id[i]}" for i in images]
    how = "the same files" if by_file else "the same names"
    text = (
        f"{details['same']:.0f} of {len(one.read.images.id):,} pictures of {one.name} are in {other.name} too, by {how}"
    )
    if details["compared"]:
        text += f"; of {details['compared']:.0f} others compared {details['same_content']:.0f} have equal contents"
    text += f": {100 * details['share']:.1f} % of {one.name}, {100 * details['share_of_other']:.1f} % of {other.name} "
    text += f"({first(names)})"
    remedy = _WHY[other.name].format(one.name)
    if not by_file:
        remedy += "; --images (and --val-images, where they lie apart) compares the files themselves"
    return Finding(
        f"{one.name}-is-{other.name}" if is_same else f"{one.name}-overlaps-{other.name}",
        "error" if is_same else "warning",
        one.where,
        text,
        remedy,
        tuple(names[:EXAMPLES]),
        dict(details),
    )
