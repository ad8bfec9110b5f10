"""Division of an annotation file into parts: by image, each category spread over all parts.

A tune split for a detector that was trained on all of train, and never on val, is a part of val: choose on it, and
judge on the other part. Parts are files like the source, of which nothing is lost: records of images and of all that
names an image (``annotations``, and other lists with an ``image_id`` in each entry) go to their part as they are,
everything else into every part. ``info`` says in ``calib_split`` what the part is of.

Categories keep the source's ``instance_count`` and ``image_count``: calib takes these for counts of TRAIN, which a
part's own would not be. Where the source has none, the parts have none, unless a TRAIN json brings them.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib import __version__
from calib.annotations import Annotations
from calib.cache.categories import Categories, counting_file
from calib.data.groups import read_groups
from calib.data.parts import Parts, is_object
from calib.data.shares import Shares, check_shares, weights
from calib.data.stratify import Labelled, stratify
from calib.documents import encoded
from calib.errors import ExistsError, InputError, SettingError, ShapeError
from calib.evaluate.bins import DEFAULT_BINS, check_bins
from calib.files import hash_file, read_json, replacing
from calib.progress import Progress, silent

Integers = NDArray[np.int64]
Document = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Division:
    """How a file is divided.

    ``shares``: the parts by name. ``group_by``: as ``read_groups`` takes it, "" for none. ``counts_from``: the TRAIN
    json, whose counts the parts get. ``bins``: of the summary. ``rest``: write for every part what is not in it, too.
    """

    shares: Shares
    seed: int = 0
    group_by: str = ""
    counts_from: Path | None = None
    bins: tuple[int, ...] = DEFAULT_BINS
    rest: bool = False

    def __post_init__(self) -> None:
        check_shares(self.shares)
        check_bins(self.bins)
        if self.seed < 0:
            raise SettingError(f"seed is {self.seed}: expected at least 0")

    def names(self) -> list[str]:
        """Of the files, without ``.json``.

        Raises:
            SettingError: a part is named as the rest of another.
        """
        names = [*self.shares, *(f"{name}-rest" for name in self.shares if self.rest)]
        if len(set(names)) < len(names):
            raise SettingError("a part is named as the rest of another", hint="choose other names than ...-rest")
        return names


def split_images(
    read: Annotations, shares: Shares, *, groups: Integers | None = None, seed: int = 0, progress: Progress = silent
) -> dict[str, Integers]:
    """Image ids by part, ascending: every image of ``read`` in one part, images of a group in the same.

    The same for any order of the records. ``groups`` [I] numbers the groups, in the order of ``read.images``.

    Raises:
        SettingError: as ``check_shares``. InputError: fewer images or groups than parts.
    """
    check_shares(shares)
    part = _divided(read, shares, _numbered(groups, len(read.images.id)), seed, progress)
    return {name: read.images.id[part == j] for j, name in enumerate(shares)}


def split_file(
    annotations: Path, out: Path, division: Division, *, overwrite: bool = False, progress: Progress = silent
) -> Parts:
    """Write ``out/NAME.json`` for every part of ``annotations``, and ``out/NAME-rest.json`` where that is asked for.

    Returns:
        What the parts hold.

    Raises:
        ExistsError: a file is there, or the folds of another division. MissingFileError, FormatError, NonFiniteError,
            InputError: not there, no annotation file, other categories than in ``counts_from``, or as ``split_images``
            and ``read_groups``.
    """
    files = {name: out / f"{name}.json" for name in division.names()}
    _check_outputs(files, annotations, division, overwrite=overwrite)
    document = read_json(annotations, "annotation file")
    read = Annotations.from_document(document, annotations)
    counting = counting_file(read, division.counts_from)
    groups = _groups(document, read, division.group_by)
    part = _divided(read, division.shares, groups, division.seed, progress)
    counts = Categories.of(counting).instance_count
    notices = (*read.notices, *_too_large(part, groups, division.shares), *_without_counts(read, counting))
    parts = Parts(read, division.shares, part, groups, counts, _counted(read, counting), division.bins, notices)
    if counting is not read:
        document = document | {"categories": _with_counts(document["categories"], counting)}
    _write(document, files, parts, _origin(document, division, annotations), progress)
    return parts


def _check_outputs(files: dict[str, Path], annotations: Path, division: Division, *, overwrite: bool) -> None:
    inputs = {path.resolve() for path in (annotations, division.counts_from) if path}
    for path in files.values():
        if path.resolve() in inputs:
            raise SettingError(f"{path} is to be read and to be written", hint="choose another --out")
        if path.exists() and not overwrite:
            raise ExistsError(f"{path} exists", hint="choose another --out, or add --overwrite")
    out = next(iter(files.values())).parent
    if "fold0" in files and (older := set(out.glob("fold*.json")) - set(files.values())):
        raise ExistsError(
            f"{min(older)} is of another division: its images are in other folds now",
            hint="remove it, or choose another --out",
        )


def _divided(read: Annotations, shares: Shares, groups: Integers, seed: int, progress: Progress) -> Integers:
    """The part of every image, [I]."""
    n_groups = int(groups.max(initial=-1)) + 1
    if n_groups < len(shares):
        what = "images" if n_groups == len(groups) else "groups of images"
        raise InputError(f"{read.path} has {n_groups} {what}, which cannot fill {len(shares)} parts")
    return stratify(_labelled(read, groups), weights(shares), seed, progress=progress)[groups]


def _labelled(read: Annotations, groups: Integers) -> Labelled:
    """Groups with the categories of their objects; one label more is having images without any."""
    n_images, background = len(groups), len(read.categories.id)
    found = is_object(read)
    pair = np.unique(read.image[found] * (background + 1) + read.category[found])
    image, label = pair // (background + 1), pair % (background + 1)
    empty = np.setdiff1d(np.arange(n_images), image)
    image, label = np.concatenate([image, empty]), np.concatenate([label, np.full(len(empty), background)])
    cell, images = np.unique(groups[image] * (background + 1) + label, return_counts=True)
    return Labelled(np.bincount(groups), cell // (background + 1), cell % (background + 1), images)


def _groups(document: Document, read: Annotations, group_by: str) -> Integers:
    """The group of every image of ``read``, [I]."""
    rows = document["images"]
    if not group_by:
        return np.arange(len(rows))
    groups = read_groups(rows, group_by, f"{read.path}: images")
    return _numbered(groups[np.argsort([int(row["id"]) for row in rows])], len(rows))


def _numbered(groups: Integers | None, n: int) -> Integers:
    """Groups numbered from 0 as they first appear, [n]; without groups every image is one."""
    if groups is None:
        return np.arange(n)
    if np.shape(groups) != (n,):
        raise ShapeError(f"groups has shape {np.shape(groups)}, expected ({n},): a number per image")
    _, first, number = np.unique(groups, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first))[number])


def _too_large(part: Integers, groups: Integers, shares: Shares) -> Iterator[str]:
    """Notices of groups that are larger than what their part was to have."""
    size, of = np.bincount(groups), np.zeros(int(groups.max()) + 1, np.int64)
    of[groups] = part
    for j, (name, share) in enumerate(shares.items()):
        largest = int(size[of == j].max())
        if largest > np.ceil(float(share) * len(part)):
            yield f"a group of {largest:,} of {len(part):,} images is larger than '{name}' was to be: it is not divided"


def _has_counts(counting: Annotations) -> bool:
    return counting.categories.instance_count is not None and counting.categories.image_count is not None


def _without_counts(read: Annotations, counting: Annotations) -> Iterator[str]:
    if counting is read and read.style != "none" and not _has_counts(read):
        yield (
            f"{read.path} has no TRAIN counts, and so its parts have none: give --counts-from TRAIN_JSON here, or later"
            " to calib extract, which would count the objects of the part instead"
        )


def _counted(read: Annotations, counting: Annotations) -> str:
    if counting is not read:
        return f"from {counting.path.name}"
    return "counts in the file" if _has_counts(read) else "annotations of the file"


def _with_counts(rows: list[Record], counting: Annotations) -> list[Record]:
    """Category records with the counts of ``counting``, and its frequencies where it has them."""
    counts = Categories.of(counting)
    columns: dict[str, list[Any]] = {
        "image_count": counts.image_count.tolist(),
        "instance_count": counts.instance_count.tolist(),
    }
    if counting.categories.frequency:
        columns["frequency"] = list(counting.categories.frequency)
    position = {category_id: k for k, category_id in enumerate(counts.category_id.tolist())}
    return [row | {key: column[position[row["id"]]] for key, column in columns.items()} for row in rows]


def _origin(document: Document, division: Division, annotations: Path) -> Document:
    """What ``info`` of a part says of where it is from."""
    info = document.get("info") or {}
    earlier = info.get("calib_split") if isinstance(info, dict) else None
    return {
        "source": annotations.name,
        "source_xxh3_64": hash_file(annotations),
        "shares": {name: float(share) for name, share in division.shares.items()},
        "seed": division.seed,
        "group_by": division.group_by,
        "counts_from": division.counts_from and division.counts_from.name,
        "calib": __version__,
        **({"earlier": earlier} if earlier else {}),  # the source is itself a part
    }


def _write(source: Document, files: dict[str, Path], parts: Parts, origin: Document, progress: Progress) -> None:
    """All files, or none."""
    ids, names = parts.read.images.id, list(parts.shares)
    others = {key: value for key, value in source.items() if key not in ("images", "annotations")}
    divided = [key for key, value in others.items() if _is_of_images(value, set(ids.tolist()))]
    divided += ["annotations"] if parts.read.style != "none" else []
    with ExitStack() as stack, progress("writing", total=len(files), unit="files") as bar:
        for name, path in files.items():
            is_rest = name not in parts.shares
            of = name.removesuffix("-rest") if is_rest else name
            kept = ids[(parts.part == names.index(of)) ^ is_rest]
            about = {"part": of, "is_rest": is_rest, "images": len(kept)} | origin
            written = _part(source, divided, set(kept.tolist())) | {"info": _info(source.get("info"), about)}
            stack.enter_context(replacing(path)).write_bytes(encoded(written, parts.read.path))
            bar.advance()


def _part(source: Document, divided: list[str], ids: set[int]) -> Document:
    images = [row for row in source["images"] if row["id"] in ids]
    lists = {key: [row for row in source[key] if row["image_id"] in ids] for key in divided}
    return source | {"images": images} | lists


def _is_of_images(value: Any, ids: set[int]) -> bool:
    """Whether ``value`` is a list of records each of which names an image of the file."""
    return isinstance(value, list) and all(isinstance(row, dict) and _named_image(row) in ids for row in value)


def _named_image(row: Record) -> float | None:
    value = row.get("image_id")
    return value if isinstance(value, int | float) else None


def _info(info: Any, about: Document) -> Document:
    """The source's ``info``, which is an object but for odd files, and what the part is."""
    kept = info if isinstance(info, dict) else {} if info is None else {"info": info}
    return kept | {"calib_split": about}
