"""Rows for ``raw.py`` from files: .npz, Parquet, Arrow (IPC file or stream), Feather. One row per proposal.

==================================  ==========================================================================
``image_id``                        whole number (a float that is whole, too)
``boxes``                           [4] x1, y1, x2, y2 (or columns ``x1``, ``y1``, ``x2``, ``y2``)
``features``                        [D] float16, float32 or float64
``logits``, ``refined``             optional: [C+1] ([C] of a sigmoid detector); [4]
``objectness``, ``label``,          optional, see ``raw.RawImage``
``is_gt``
``net_height``, ``net_width``       optional: the size of the image that the boxes are of
``stage``                           of a cascade, from 0; the k-th row of an image in each stage is the same RoI
==================================  ==========================================================================

In .npz these are arrays [N] or [N, width], rows in any order; in Parquet and Arrow columns of numbers, of lists of one
length or of tensors, the rows of an image together. .npz is read whole, the others in batches: many rows go into
several files.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
from numpy.typing import NDArray

from calib.arrow import numbers, reading, record_batches, whole
from calib.cache import Classifier
from calib.errors import FormatError, InputError, MissingFileError, ShapeError
from calib.extract.raw import RawImage
from calib.files import hash_file, require

MATRICES = ("boxes", "features", "logits", "refined")
NUMBERS = ("image_id", "objectness", "label", "is_gt", "net_height", "net_width", "stage")
CORNERS = ("x1", "y1", "x2", "y2")
_ENDINGS = (".npz", ".parquet", ".arrow", ".feather", ".arrows")
Columns = dict[str, NDArray[Any]]


def row_files(paths: list[Path]) -> list[Path]:
    """The files of ``paths``: a folder stands for the files of rows in it, by name.

    Raises:
        MissingFileError: not there, or a folder without such files. FormatError: a file of another kind.
    """
    files: list[Path] = []
    for path in paths:
        inside = sorted(p for p in require(path, "rows").iterdir() if p.suffix in _ENDINGS) if path.is_dir() else [path]
        if not inside:
            raise MissingFileError(f"no file of rows in {path}", hint=f"expected {', '.join(_ENDINGS)}")
        files += inside
    if strange := [str(p) for p in files if p.suffix not in _ENDINGS]:
        raise FormatError(f"no file of rows: {strange[0]}", hint=f"endings are {', '.join(_ENDINGS)}")
    return files


def identity(files: list[Path]) -> dict[str, Any]:
    """What identifies the content of ``files``, for ``raw.write_cache``."""
    return {"rows": [{"name": p.name, "bytes": p.stat().st_size, "xxh3": hash_file(p)} for p in files]}


def read_rows(files: list[Path]) -> Iterator[RawImage]:
    """The images of all files, one after the other.

    Raises:
        FormatError, ShapeError, InputError: a file that is damaged or has other columns; name it.
    """
    for path in files:
        # Rows of an image may go on in the next batch: the last image waits for it.
        waiting: Columns = {}
        for columns in _batches(path):
            joined = {k: np.concatenate([waiting[k], v]) for k, v in columns.items()} if waiting else columns
            starts = _starts(joined["image_id"])
            last = int(starts[-1]) if len(starts) else 0
            yield from _images({k: v[:last] for k, v in joined.items()}, path)
            waiting = {k: v[last:] for k, v in joined.items()}
        if waiting:
            yield from _images(waiting, path)


def _starts(image_id: NDArray[Any]) -> NDArray[np.int64]:
    return np.flatnonzero(np.r_[True, image_id[1:] != image_id[:-1]]) if len(image_id) else np.empty(0, np.int64)


def _images(columns: Columns, path: Path) -> Iterator[RawImage]:
    ids = columns["image_id"]
    starts = _starts(ids)
    if not len(starts):
        return
    for start, stop in zip(starts, np.append(starts[1:], len(ids)), strict=True):
        own = {k: v[start:stop] for k, v in columns.items() if k != "image_id"}
        size = [np.unique(own.pop(k)) for k in ("net_height", "net_width") if k in own]
        if any(len(s) > 1 or s[0] < 1 for s in size):
            raise InputError(f"{path}: image {ids[start]} has several net_height or net_width, or one below 1")
        net_size = (int(size[0][0]), int(size[1][0])) if size else None
        stage = own.pop("stage", np.zeros(stop - start))
        parts = [{k: v[stage == s] for k, v in own.items()} for s in range(int(max(stage.max(), 0)) + 1)]
        if sum(len(p["boxes"]) for p in parts) < len(stage):
            raise InputError(f"{path}: image {ids[start]} has stages {np.unique(stage).tolist()}: expected 0, 1, ...")
        first, *later = (RawImage(int(ids[start]), **part, net_size=net_size) for part in parts)
        yield replace(first, next=tuple(later))


def _batches(path: Path) -> Iterator[Columns]:
    if path.suffix == ".npz":
        yield _checked(_read_npz(path), path, 0)
        return
    first = 0
    with reading(path):
        for batch in record_batches(path):
            if batch.num_rows:
                yield _checked({n: numbers(batch.column(n), n, path) for n in batch.schema.names}, path, first)
                first += batch.num_rows


def _read_npz(path: Path) -> Columns:
    columns = _read_npz_arrays(path)
    lengths = {name: len(a) if a.ndim else None for name, a in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ShapeError(f"{path}: arrays differ in their number of rows: {lengths}")
    ids = columns.get("image_id")
    if ids is None or ids.ndim != 1 or not len(ids):
        return columns
    order = np.argsort(ids, kind="stable")
    return columns if (order[1:] > order[:-1]).all() else {k: v[order] for k, v in columns.items()}


def _checked(columns: Columns, path: Path, first: int) -> Columns:
    """``first``: the row that they begin with, for errors."""
    if all(c in columns for c in CORNERS) and "boxes" not in columns:
        columns["boxes"] = np.stack([columns.pop(c) for c in CORNERS], axis=1)
    missing = [n for n in ("image_id", "boxes", "features") if n not in columns]
    strange = [n for n in columns if n not in (*MATRICES, *NUMBERS)]
    if missing or strange:
        said = f"has no {', '.join(missing)}" if missing else f"has {', '.join(strange)}, which is no column of rows"
        raise FormatError(f"{path} {said}", hint=f"columns are {', '.join(('image_id', *MATRICES, *NUMBERS[1:]))}")
    if ("net_height" in columns) != ("net_width" in columns):
        raise FormatError(f"{path} has one of net_height and net_width: give both or none")
    for name, column in columns.items():
        if column.ndim != (2 if name in MATRICES else 1):
            raise ShapeError(f"{path}: {name} has shape {list(column.shape)}")
    columns["image_id"] = whole(columns["image_id"], "image_id", path, first)
    return columns


def read_classifier(path: Path) -> Classifier:
    """``.safetensors`` or ``.npz``: ``weight`` [C+1, D] and, where there are, ``bias`` [C+1], ``scale`` [1] (cosine),
    ``box_weight`` and ``box_bias``.

    Raises:
        MissingFileError, FormatError, ShapeError: not there, damaged, or tensors that do not fit together. InputError:
            a scale that is not one number above 0.
    """
    if require(path, "classifier").is_dir():
        raise FormatError(f"classifier {path} is a folder", hint="name a .safetensors or .npz file")
    if path.suffix == ".safetensors":
        return Classifier.read(path)
    if path.suffix != ".npz":
        raise FormatError(f"no classifier: {path}", hint="endings are .safetensors, .npz")
    tensors = _read_npz_arrays(path)
    known = ("weight", "bias", "scale", "box_weight", "box_bias")
    strange = [n for n in tensors if n.rpartition(".")[2] not in known]
    if "weight" not in tensors or strange:
        said = f"has {', '.join(strange)}" if strange else "has no weight"
        raise FormatError(
            f"classifier {path} {said}", hint=f"its arrays are {', '.join(known)}; of next stages stage1.weight, ..."
        )
    try:
        return Classifier.of({n: np.asarray(t, np.float32) for n, t in tensors.items()})
    except TypeError as e:
        raise FormatError(f"classifier {path}: {e}", hint="stages after the first: stage1.weight, stage2.weight") from e


def _read_npz_arrays(path: Path) -> Columns:
    if path.is_file() and not is_zipfile(path):
        with open(path, "rb") as f:
            said = "is damaged: its end is missing" if f.read(2) == b"PK" else "is no .npz, but a file of another kind"
        raise FormatError(f"{path} {said}", hint="numpy.savez(path, name=array, ...)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (BadZipFile, ValueError, OSError, EOFError) as e:
        raise FormatError(f"{path} is no .npz of plain arrays: {e}", hint="numpy.savez, without objects") from e
