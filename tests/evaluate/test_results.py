"""Reading results: JSON and Parquet mean the same, and what is wrong is named with its row."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calib.errors import CalibError, FormatError, InputError, NonFiniteError, SettingError, ShapeError
from calib.evaluate import Detections, GroundTruth, evaluate

Document = dict[str, Any]
ROW = {"image_id": 5, "category_id": 3, "bbox": [10.0, 10.0, 40.0, 40.0], "score": 0.5}


def parquet_columns(n: int, seed: int = 0) -> dict[str, Any]:
    """Detections as ``calib score`` writes them, around the object of ``one_object``."""
    rng = np.random.default_rng(seed)
    low = (10 + rng.normal(0, 3, (n, 2))).astype(np.float32)
    high = (50 + rng.normal(0, 3, (n, 2))).astype(np.float32)
    return {
        "image_id": np.full(n, 5, np.int64),
        "category_id": rng.choice(np.array([3, 8, 9, 77]), n),
        "score": rng.random(n).astype(np.float32),
        "x1": low[:, 0],
        "y1": low[:, 1],
        "x2": high[:, 0],
        "y2": high[:, 1],
        "roi_id": np.arange(n, dtype=np.int32),
    }


def test_parquet_and_its_twin_in_json_give_identical_metrics(
    one_object: Document, tmp_path: Path, write_json_file: Callable[[str, Any], Path]
) -> None:
    columns = parquet_columns(40)
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    rows = [
        {
            "image_id": int(image),
            "category_id": int(category),
            "bbox": [float(x1), float(y1), float(x2) - float(x1), float(y2) - float(y1)],
            "score": float(score),
        }
        for image, category, score, x1, y1, x2, y2, _ in zip(*columns.values(), strict=True)
    ]
    a = Detections.read(tmp_path / "d.parquet")
    b = Detections.read(write_json_file("d.json", rows))
    for name in ("image_id", "category_id", "score", "box"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)
    truth = GroundTruth.from_document(one_object)
    first, second = evaluate(truth, a, full=True), evaluate(truth, b, full=True)
    np.testing.assert_array_equal(first.precision, second.precision)
    assert 0 < first.AP[0] < 1


def test_the_given_rows_and_corners_are_left_as_they_are(one_object: Document) -> None:
    rows, corners = [dict(ROW)], np.array([[10, 10, 50, 50]], np.float64)
    before = copy.deepcopy(rows)
    evaluate(GroundTruth.from_document(one_object), Detections.from_document(rows))
    made = Detections.from_arrays(np.array([5]), np.array([3]), np.array([0.5]), corners)
    assert rows == before and corners.tolist() == [[10, 10, 50, 50]]
    np.testing.assert_array_equal(made.box, [[10, 10, 40, 40]])


def test_no_results_give_ap_zero(one_object: Document) -> None:
    evaluation = evaluate(GroundTruth.from_document(one_object), Detections.from_document([]))
    assert evaluation.AP.tolist() == [0, -1, -1]
    assert evaluation.AR.tolist() == [0, -1, -1]
    assert evaluation.n_det.tolist() == [0, 0, 0]


def test_an_empty_parquet_file_is_no_results(tmp_path: Path) -> None:
    pq.write_table(pa.table(parquet_columns(0)), tmp_path / "d.parquet")
    assert len(Detections.read(tmp_path / "d.parquet")) == 0


def test_results_of_unknown_images_are_refused(one_object: Document) -> None:
    rows = [ROW, ROW | {"image_id": 6}]
    with pytest.raises(InputError, match=r"results\[1\]: image id 6 is not in the ground truth \(1 of 2") as e:
        evaluate(GroundTruth.from_document(one_object), Detections.from_document(rows))
    assert e.value.hint == "results of another split?"


def test_a_cap_of_zero_is_refused(one_object: Document) -> None:
    with pytest.raises(SettingError, match="at least 1, or -1"):
        evaluate(GroundTruth.from_document(one_object), Detections.from_document([ROW]), max_detections=0)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"score": float("nan")}, NonFiniteError, r"\[1\]: 'score' must be finite, got nan"),
        ({"score": float("inf")}, NonFiniteError, r"\[1\]: 'score' must be finite"),
        ({"bbox": [1.0, 2.0, float("nan"), 4.0]}, NonFiniteError, r"\[1\]: 'bbox' must be finite"),
        ({"bbox": [1.0, 2.0, 3.0]}, FormatError, r"\[1\]: 'bbox' must be a list of 4 numbers"),
        ({"bbox": None}, FormatError, r"\[1\]: 'bbox' must be a list of 4 numbers"),
        ({"score": None}, FormatError, r"\[1\]: 'score' must be a number, got None"),
        ({"score": "0.5"}, FormatError, r"\[1\]: 'score' must be a number, got '0.5'"),
        ({"score": [0.5]}, FormatError, r"\[1\]: 'score' must be a number"),
        ({"image_id": "5"}, FormatError, r"\[1\]: 'image_id' must be a whole number"),
        ({"image_id": 2**64}, FormatError, r"\[1\]: 'image_id' must be a whole number below 2\^63"),
        ({"category_id": 3.5}, FormatError, r"\[1\]: 'category_id' must be a whole number"),
    ],
)
def test_a_bad_row_is_named(
    change: Document, kind: type[CalibError], message: str, write_json_file: Callable[[str, Any], Path]
) -> None:
    path = write_json_file("bad.json", [ROW, ROW | change])
    with pytest.raises(kind, match="bad.json" + message):
        Detections.read(path)


def test_a_row_without_a_key_is_named(write_json_file: Callable[[str, Any], Path]) -> None:
    path = write_json_file("bad.json", [ROW, {k: v for k, v in ROW.items() if k != "bbox"}])
    with pytest.raises(FormatError, match=r"bad.json\[1\] has no 'bbox'"):
        Detections.read(path)


def test_whole_floats_are_ids() -> None:
    assert Detections.from_document([ROW | {"image_id": 5.0}]).image_id.tolist() == [5]


def test_an_object_is_not_a_list_of_results(write_json_file: Callable[[str, Any], Path]) -> None:
    with pytest.raises(FormatError, match="expected a list of results, got dict"):
        Detections.read(write_json_file("gt.json", {"annotations": []}))


def test_parquet_with_nan_names_the_row(tmp_path: Path) -> None:
    for name in ("score", "x2"):
        columns = parquet_columns(5)
        columns[name][3] = np.nan
        pq.write_table(pa.table(columns), tmp_path / "d.parquet")
        with pytest.raises(NonFiniteError, match=r"d.parquet\[3\]"):
            Detections.read(tmp_path / "d.parquet")


def test_parquet_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    columns = parquet_columns(5)
    pq.write_table(pa.table({k: v for k, v in columns.items() if k not in ("x1", "score")}), path)
    with pytest.raises(FormatError, match="has no column score, x1"):
        Detections.read(path)
    pq.write_table(pa.table(columns | {"score": pa.array([0.1, None, 0.2, 0.3, 0.4])}), path)
    with pytest.raises(FormatError, match="column score has 1 nulls, the first in row 1"):
        Detections.read(path)
    pq.write_table(pa.table(columns | {"image_id": columns["score"]}), path)
    with pytest.raises(FormatError, match=r"image_id of row 0 is 0\.\d+, expected a whole number"):
        Detections.read(path)


def test_truncated_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table(parquet_columns(50)), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FormatError, match=r"d\.parquet cannot be read"):
        Detections.read(path)


def test_arrays_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"got \(1,\), \(2,\), \(1,\) and \(1, 4\)"):
        Detections.from_arrays(np.array([5]), np.array([3, 3]), np.array([0.5]), np.zeros((1, 4)))
