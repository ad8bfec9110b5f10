"""A result folder: ``per_category.parquet``, ``summary.json`` and, beside them, ``matches.parquet`` if asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.errors import FormatError
from calib.files import is_calib_folder, replacing, require, write_json
from calib.layout import PER_CATEGORY, SUMMARY
from calib.lookup import positions

from .bins import DEFAULT_BINS, check_bins
from .evaluation import Evaluation
from .ground_truth import GroundTruth

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR", "ARs", "ARm", "ARl")


def write_evaluation(
    out: Path,
    evaluation: Evaluation,
    *,
    bins: Sequence[int] = DEFAULT_BINS,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``per_category.parquet`` and ``summary.json`` into the folder ``out``; return the summary.

    Each file is replaced in one step, the summary last. Besides ``Evaluation.summary`` it holds
    ``max_detections``, ``bins``, ``never_detected`` (ids of categories with objects and without detections) and
    ``more``.

    Raises:
        SettingError: ``bins`` are not ascending positive counts.
        FormatError: ``out`` is a file, a head or a cache.
    """
    edges = check_bins(bins)
    check_folder(out)
    summary = evaluation.summary(edges) | {
        "max_detections": evaluation.max_detections,
        "bins": list(edges),
        "never_detected": evaluation.never_detected.tolist(),
        **(more or {}),
    }
    _write_per_category(out / PER_CATEGORY, evaluation)
    write_json(out / SUMMARY, summary)
    return summary


def check_folder(out: Path) -> None:
    """Whether a result folder may be written to ``out``.

    Raises:
        FormatError: it is a file, a head or a cache.
    """
    if out.exists() and not out.is_dir():
        raise FormatError(f"{out} is a file, expected a folder for the results", hint="choose another --out")
    for name in (PER_CATEGORY, SUMMARY):
        if (out / name).is_dir():  # before anything is written
            raise FormatError(f"{out / name} is a folder, expected the name of a file", hint="choose another --out")
    if is_calib_folder(out):
        raise FormatError(f"{out} is a head or a cache, expected a folder for the results", hint="choose another --out")


def _write_per_category(path: Path, evaluation: Evaluation) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    e, n = evaluation, len(evaluation.category_ids)
    table = pa.table(
        {
            "index": pa.array(np.arange(n, dtype=np.int32)),
            "category_id": pa.array(e.category_ids),
            "name": pa.array(e.names, pa.string()),
            "frequency": pa.nulls(n, pa.string()) if e.frequency is None else pa.array(e.frequency, pa.string()),
            "instance_count": _counts(e.instance_count, n),
            "image_count": _counts(e.image_count, n),
            "n_gt": pa.array(e.n_gt),
            "n_det": pa.array(e.n_det),
            **{name: pa.array(getattr(e, name)) for name in COLUMNS},
        }
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def _counts(counts: NDArray[np.int64] | None, n: int) -> Any:
    import pyarrow as pa

    return pa.nulls(n, pa.int64()) if counts is None else pa.array(counts, pa.int64())


def read_counts(path: Path, truth: GroundTruth) -> NDArray[np.int64]:
    """TRAIN instances of ``truth``'s categories, [C], from a Parquet file (category_id, instance_count).

    Raises:
        MissingFileError: no such file.
        FormatError: not Parquet, without these columns, or without one of the categories.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    require(path, "file of counts")
    try:
        table = pq.read_table(path, columns=["category_id", "instance_count"])
        if not all(pa.types.is_integer(column.type) and not column.null_count for column in table.columns):
            raise FormatError("another type, or nulls")
        ids, counts = (table.column(i).cast(pa.int64()).to_numpy() for i in (0, 1))
        if len(np.unique(ids)) < len(ids) or (counts < 0).any():
            raise FormatError("a category twice, or a negative count")
    except (pa.ArrowException, OSError, KeyError, IndexError, FormatError) as e:
        raise FormatError(
            f"{path} does not hold whole numbers in columns category_id and instance_count: {e}",
            hint="give the categories.parquet of a training cache",
        ) from e
    order = np.argsort(ids)
    at = positions(ids[order], truth.category_ids)
    if (at < 0).any():
        raise FormatError(
            f"{path} has no counts for category {truth.category_ids[at < 0][0]} "
            f"({int((at < 0).sum())} of {len(at)} categories are missing)",
            hint="counts of another data set?",
        )
    return np.asarray(counts[order][at], np.int64)
