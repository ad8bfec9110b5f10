"""What became of each detection, worked by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from calib.evaluate import Detections, Evaluator, GroundTruth
from calib.evaluate.matches_table import KINDS, write_matches

Document = dict[str, Any]
OBJECT = [10.0, 10.0, 40.0, 40.0]
POOR = [10.0, 10.0, 40.0, 10.0]  # a quarter of it
ELSEWHERE = [200.0, 200.0, 40.0, 40.0]


@pytest.fixture
def table(one_object: Document, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """``table((category, box, score), ...)``: the rows written for these results in image 5."""

    def make(*results: tuple[int, list[float], float]) -> list[dict[str, Any]]:
        rows = [{"image_id": 5, "category_id": c, "bbox": box, "score": s} for c, box, s in results]
        evaluator = Evaluator(GroundTruth.from_document(one_object))
        n = write_matches(tmp_path / "m.parquet", evaluator, Detections.from_document(rows))
        written: list[dict[str, Any]] = pq.read_table(tmp_path / "m.parquet").to_pylist()
        assert len(written) == n
        return written

    return make


def test_every_kind(table: Callable[..., list[dict[str, Any]]], one_object: Document) -> None:
    one_object["annotations"] += [
        one_object["annotations"][0] | {"id": 2, "bbox": [300.0, 300.0, 40.0, 40.0], "ignore": 1},
    ]
    rows = table(
        (3, OBJECT, 0.9),
        (3, OBJECT, 0.8),
        (3, POOR, 0.7),
        (8, OBJECT, 0.6),
        (3, ELSEWHERE, 0.5),
        (8, POOR, 0.4),
        (3, [300.0, 300.0, 40.0, 40.0], 0.3),
        (9, OBJECT, 0.2),  # 9 is not labelled here, but the box shows what the object may be taken for
        (9, ELSEWHERE, 0.1),  # and this one shows nothing
    )
    assert [row["kind"] for row in rows] == list(KINDS)
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rows[0]["annotation_id"] == 1 and rows[0]["iou"] == 1 and rows[0]["other_annotation_id"] is None
    assert rows[2]["annotation_id"] == 1 and rows[2]["iou"] == pytest.approx(0.25)
    assert (rows[3]["other_annotation_id"], rows[3]["other_category_id"], rows[3]["other_iou"]) == (1, 3, 1)
    assert rows[3]["annotation_id"] is None and rows[4]["other_annotation_id"] is None
    assert [rows[0][k] for k in ("x", "y", "width", "height")] == OBJECT


def test_detections_beyond_the_cap_are_ranked_not_dropped(table: Callable[..., list[dict[str, Any]]]) -> None:
    rows = table(*[(8, ELSEWHERE, 0.9)] * 320, (3, OBJECT, 0.1))
    assert len(rows) == 321 and rows[-1]["rank"] == 321 and rows[-1]["kind"] == "true"


def test_true_detections_are_those_behind_ap50(random_case: Callable[..., Any], tmp_path: Path) -> None:
    for seed in range(30):
        gt, results = random_case(seed)
        evaluator = Evaluator(GroundTruth.from_document(gt))
        detections = Detections.from_document(results)
        write_matches(tmp_path / "m.parquet", evaluator, detections)
        rows = pq.read_table(tmp_path / "m.parquet").to_pylist()
        evaluation = evaluator.evaluate(detections, full=True)
        assert evaluation.recall is not None
        for c, n, recall in zip(evaluation.category_ids, evaluation.n_gt, evaluation.recall[0, :, 0], strict=True):
            n_true = sum(row["kind"] == "true" and row["category_id"] == c for row in rows)
            assert n_true == (round(recall * n) if n else 0)
            judged = [row for row in rows if row["category_id"] == c and row["kind"] != "unjudged"]
            assert len(judged) == evaluation.n_det[np.flatnonzero(evaluation.category_ids == c)[0]]


def test_nothing_at_all(table: Callable[..., list[dict[str, Any]]]) -> None:
    assert table() == []
