"""Rows and detections as pandas, polars, pyarrow and datasets write them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather
from safetensors.torch import save_file

from calib.arrow import numbers
from calib.errors import CalibError, FormatError, ShapeError
from calib.evaluate.results import Detections
from calib.extract.raw_files import read_classifier, read_rows

N = 4
IDS = [1, 2, 3, 4]
BOXES, FEATURES = np.arange(16.0).reshape(N, 4), np.arange(8.0).reshape(N, 2)


def lists(a: np.ndarray, kind: Any = None) -> pa.Array:
    return pa.array(a.tolist(), kind or pa.list_(pa.float64()))


def tensors(a: np.ndarray) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(a.astype(np.float32))


FORMS: dict[str, dict[str, pa.Array]] = {
    "lists": {},
    "large lists": {"boxes": lists(BOXES, pa.large_list(pa.float32()))},
    "arrays": {
        "boxes": lists(BOXES, pa.list_(pa.float32(), 4)), "features": lists(FEATURES, pa.list_(pa.float16(), 2)),
    },
    "views": {"boxes": lists(BOXES, pa.list_view(pa.float32()))},
    "tensors": {"boxes": tensors(BOXES), "features": tensors(FEATURES.reshape(N, 1, 2))},
    "lists of lists": {"features": pa.array(FEATURES.reshape(N, 1, 2).tolist())},
    "dictionary": {"image_id": pa.array(IDS).dictionary_encode()},
    "run-end": {"image_id": pa.RunEndEncodedArray.from_arrays([1, 2, 3, 4], IDS)},
    "whole floats": {"image_id": pa.array(IDS, pa.float64())},
    "decimals": {"image_id": pa.array(IDS, pa.decimal128(12, 2))},
    "unsigned": {"image_id": pa.array(IDS, pa.uint64())},
}  # fmt: skip


def table(form: str) -> pa.Table:
    plain = {"image_id": pa.array(IDS), "boxes": lists(BOXES), "features": lists(FEATURES)}
    return pa.table(plain | FORMS[form] | {"__index_level_0__": pa.array([7, 5, 6, 8])})


def write_stream(t: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, t.schema) as writer:
        writer.write_table(t)


WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    "r.parquet": pq.write_table,
    "r.feather": feather.write_feather,
    "r.arrow": write_stream,  # as Hugging Face's datasets name theirs
}


def file_of(t: pa.Table, ending: str, folder: Path) -> Path:
    try:
        WRITERS[ending](t, folder / ending)
    except (pa.ArrowException, pa.ArrowNotImplementedError) as e:
        pytest.skip(f"pyarrow does not write this: {e}")
    return folder / ending


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_every_form_are_the_same(form: str, ending: str, tmp_path: Path) -> None:
    found = list(read_rows([file_of(table(form), ending, tmp_path)]))
    assert [r.image_id for r in found] == IDS
    assert np.array_equal(np.concatenate([r.boxes for r in found]), BOXES)
    assert np.array_equal(np.concatenate([r.features for r in found]), FEATURES)


def test_a_tensor_stored_in_another_order_has_its_own(tmp_path: Path) -> None:
    a = np.arange(24.0).reshape(2, 3, 4)
    stored = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(a.transpose(0, 2, 1)).transpose(0, 2, 1))
    assert np.array_equal(numbers(stored, "x", tmp_path), a.reshape(2, 12))


@pytest.mark.parametrize(
    ("column", "error", "said"),
    [
        ({"image_id": pa.array([1.0, 2.0, 2.5, 4.0])}, FormatError, "image_id of row 2 is 2.5"),
        ({"image_id": pa.array([1.0, 2.0, float("nan"), 4.0])}, FormatError, "image_id of row 2 is nan"),
        ({"image_id": pa.array([1.0, 2.0, 1e300, 4.0])}, FormatError, "image_id of row 2"),
        ({"image_id": pa.array([1, None, 3, 4])}, FormatError, "image_id has 1 nulls, the first in row 1"),
        ({"image_id": pa.array(["a", "b", "c", "d"])}, FormatError, "expected whole numbers"),
        ({"boxes": pa.array([[1.0]] * 3 + [[1.0, 2.0]])}, ShapeError, "1 to 2 numbers"),
        ({"weight": pa.array(IDS)}, FormatError, "has weight, which is no column"),
    ],
)
def test_what_is_no_row_is_named(
    column: dict[str, pa.Array], error: type[CalibError], said: str, tmp_path: Path
) -> None:
    plain = {n: table("lists")[n] for n in ("image_id", "boxes", "features")}
    pq.write_table(pa.table(plain | column), tmp_path / "r.parquet")
    with pytest.raises(error, match=said):
        list(read_rows([tmp_path / "r.parquet"]))


DETECTIONS = {
    "image_id": pa.array([1.0, 2.0]),
    "category_id": pa.array([3, 3]).dictionary_encode(),
    "score": pa.array([0.5, 0.25], pa.float16()),
    **{n: pa.array([v, v], pa.float32()) for n, v in zip(("x1", "y1", "x2", "y2"), (1, 2, 11, 22), strict=True)},
}


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("corners", [True, False])
def test_detections_of_every_kind_of_table(ending: str, corners: bool, tmp_path: Path) -> None:
    columns = DETECTIONS
    if not corners:
        columns = {n: DETECTIONS[n] for n in ("image_id", "category_id", "score")}
        columns["bbox"] = tensors(np.array([[1, 2, 10, 20]] * 2))
    found = Detections.read(file_of(pa.table(columns), ending, tmp_path))
    assert found.image_id.tolist() == [1, 2] and found.category_id.tolist() == [3, 3]
    assert found.score.tolist() == [0.5, 0.25] and found.box.tolist() == [[1, 2, 10, 20]] * 2


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32", "float64"])
def test_a_classifier_of_any_precision(kind: str, tmp_path: Path) -> None:
    import torch

    weight = torch.tensor([[1.5, -2.0], [0.25, 3.0]])
    save_file({"weight": weight.to(getattr(torch, kind))}, tmp_path / "w.safetensors")
    found = read_classifier(tmp_path / "w.safetensors")
    assert found.weight.dtype == np.float32 and np.array_equal(found.weight, weight.numpy())
