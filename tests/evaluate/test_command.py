"""``calib evaluate``: files in, a result folder and metrics out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from calib.cli.console import CalibGroup, with_optional_values
from calib.cli.evaluate import OPTIONAL_VALUES, evaluate
from calib.errors import FormatError, NonFiniteError
from calib.evaluate import Detections

Document = dict[str, Any]
Run = Callable[..., Any]
RESULTS = [{"image_id": 5, "category_id": 3, "bbox": [10.0, 10.0, 40.0, 40.0], "score": 0.5}]


@pytest.fixture
def run(one_object: Document, tmp_path: Path, write_json_file: Callable[[str, Any], Path]) -> Run:
    """``run(*options)``: the command on the one object and a perfect detection of it."""
    app = typer.Typer(cls=CalibGroup)
    app.command(cls=with_optional_values(OPTIONAL_VALUES))(evaluate)
    app.command("other")(lambda: None)
    gt, results = write_json_file("gt.json", one_object), write_json_file("r.json", RESULTS)

    def invoke(*options: str) -> Any:
        given = [
            "evaluate",
            "--annotations",
            str(gt),
            "--results",
            str(results),
            "--out",
            str(tmp_path / "out"),
        ]
        return CliRunner().invoke(app, [*given, *options])

    return invoke


def test_json_is_one_object_with_all_metrics(run: Run, tmp_path: Path) -> None:
    outcome = run("--json")
    assert outcome.exit_code == 0
    metrics = json.loads(outcome.stdout)
    keys = "AP AP50 AP75 APs APm APl APr APc APf AR ARs ARm ARl AP1 AP2 AP3 AP4 bAP n nr nc nf n1 n2 n3 n4"
    assert set(keys.split()) <= set(metrics)
    assert metrics["AP"] == pytest.approx(1.0) and metrics["AP2"] == -1
    assert metrics == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert metrics["max_detections"] == 300 and metrics["bins"] == [10, 100, 1000]


def test_per_category_holds_every_category(run: Run, tmp_path: Path) -> None:
    assert run().exit_code == 0
    table = pq.read_table(tmp_path / "out" / "per_category.parquet").to_pydict()
    assert list(table) == [
        *("index", "category_id", "name", "frequency", "instance_count", "image_count", "n_gt", "n_det"),
        *("AP", "AP50", "AP75", "APs", "APm", "APl", "AR", "ARs", "ARm", "ARl"),
    ]
    assert table["index"] == [0, 1, 2] and table["category_id"] == [3, 8, 9] and table["name"] == ["a", "b", "c"]
    assert table["n_gt"] == [1, 0, 0] and table["instance_count"] == [5, 50, 5000]
    assert table["AP"] == pytest.approx([1, -1, -1])
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "per_category.parquet",
        "summary.json",
    ]


def test_the_table_names_the_categories_behind_each_metric(run: Run) -> None:
    lines = [line.split() for line in run("--bins", "10,20").stdout.splitlines()]
    assert ["AP", "100.00", "1"] in [line[:3] for line in lines]
    assert ["APc", "-", "0", "common"] in lines
    assert ["AP2", "-", "0", "10", "to", "19", "training", "instances"] in lines
    assert ["AP3", "-", "0", "20", "or", "more", "training", "instances"] in lines


def test_counts_come_from_a_cache_if_asked(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "categories.parquet"
    pq.write_table(pa.table({"category_id": [9, 3, 8], "instance_count": [1, 200, 1]}), path)
    metrics = json.loads(run("--counts", str(path), "--json").stdout)
    assert (metrics["n1"], metrics["n3"]) == (0, 1)
    pq.write_table(pa.table({"category_id": [9, 8], "instance_count": [1, 1]}), path)
    outcome = run("--counts", str(path))
    assert outcome.exit_code == 2 and "has no counts for category 3 (1 of 3" in outcome.stderr
    path.write_text("not parquet")
    outcome = run("--counts", str(path))
    assert outcome.exit_code == 2 and "categories.parquet of a training cache" in outcome.stderr


def test_what_was_mended_is_said_on_stderr(run: Run, one_object: Document, tmp_path: Path) -> None:
    one_object["annotations"][0]["id"] = 0
    (tmp_path / "gt.json").write_text(json.dumps(one_object))
    outcome = run("--json")
    assert "annotation id 0 was renumbered" in outcome.stderr
    assert json.loads(outcome.stdout)["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bins", "10,x"), "--bins must be whole numbers"),
        (("--bins", "100,10"), "ascending positive counts"),
        (("--max-detections", "0"), "max_detections must be at least 1"),
        (("--results", "absent.json"), "results not found: absent.json"),
    ],
)
def test_user_errors_exit_with_2_and_write_nothing(
    run: Run, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    outcome = run(*options)
    assert outcome.exit_code == 2
    assert message in outcome.stderr and outcome.stdout == ""
    assert not (tmp_path / "out").exists()


def test_out_must_not_be_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    outcome = run()
    assert outcome.exit_code == 2 and "is a file, expected a folder" in outcome.stderr
    assert (tmp_path / "out").read_text() == "mine"


def test_more_metrics_when_asked(run: Run, tmp_path: Path) -> None:
    metrics = json.loads(run("--fixed-ap", "--pooled-ap", "7", "--calibration", "--json").stdout)
    assert metrics["fixed"]["per_category"] == 10_000 and metrics["fixed"]["AP"] == pytest.approx(1)
    assert {"AP", "APs", "AR", "AP1", "bAP", "n1"} <= set(metrics["fixed"])
    assert metrics["pooled"] == pytest.approx({"per_category": 7, "all": 1, "r": 1, "c": -1, "f": -1})
    assert {"D-ECE", "LaECE", "LaECE_0", "LaACE_0", "LRP", "LRP_loc", "oLRP", "oLRPr"} <= set(metrics["calibration"])
    full = [row for row in metrics["reliability"] if row["n"]]
    assert full == [{"low": 0.4, "high": 0.5, "n": 1, "mean_score": 0.5, "precision": 1, "mean_iou": pytest.approx(1)}]
    assert len(metrics["reliability"]) == 10 and metrics["reliability"][9]["precision"] is None
    assert metrics["calibration"]["D-ECE"] == pytest.approx(0.5) and metrics["calibration"]["LRP"] == 0
    text = run("--fixed-ap", "3", "--pooled-ap", "--calibration").stdout
    assert "AP-fixed, 3 per category: AP 100.00, APr 100.00" in text
    assert "AP-pool, 10000 per category: all 100.00" in text and "calibration: D-ECE 50.00" in text


def test_matches_are_written_when_asked(run: Run, tmp_path: Path) -> None:
    assert run("--matches").exit_code == 0
    assert pq.read_table(tmp_path / "out" / "matches.parquet")["kind"].to_pylist() == ["true"]
    refused = run("--matches", "--iou-type", "segm")
    assert refused.exit_code == 2 and "matches are those of boxes" in refused.stderr


def test_several_results_lie_side_by_side(
    run: Run, tmp_path: Path, write_json_file: Callable[[str, Any], Path]
) -> None:
    other = write_json_file("other.json", [RESULTS[0] | {"bbox": [90.0, 90.0, 9.0, 9.0]}])
    metrics = json.loads(run("--results", str(other), "--bootstrap", "10", "--json").stdout)
    assert list(metrics) == ["r", "other"] and metrics["other"]["AP"] == 0 and "difference" not in metrics["r"]
    assert metrics["other"]["difference"]["to"] == "r"
    assert metrics["other"]["difference"]["AP"] == pytest.approx({"difference": -1, "low": -1, "high": -1})
    assert json.loads((tmp_path / "out" / "other" / "summary.json").read_text()) == metrics["other"]
    text = run("--results", str(other), "--bootstrap").stdout
    assert "other: AP -100.00 against r (95 %: -100.00 to -100.00)" in text
    twice = run("--results", str(tmp_path / "r.json"))
    assert twice.exit_code == 2 and "two results files have one name" in twice.stderr


def test_the_official_packages_may_be_run_beside(
    run: Run, tmp_path: Path, write_json_file: Callable[[str, Any], Path]
) -> None:
    for engine in ("lvis", "coco"):
        metrics = json.loads(run("--engine", engine, "--style", engine, "--json").stdout)
        assert metrics["reference"]["engine"] == engine and metrics["reference"]["largest_difference"] == 0
        assert metrics["reference"]["metrics"]["AP"] == pytest.approx(1)
    assert (
        "lvis package: AP 100.00; largest difference of a precision or recall value 0,"
        in run("--engine", "lvis").stdout
    )
    refused = run("--engine", "coco")
    assert refused.exit_code == 2 and "does not evaluate in lvis style" in refused.stderr
    empty = write_json_file("r.json", [])
    assert empty.exists()
    refused = run("--engine", "lvis")
    assert refused.exit_code == 2 and "the lvis engine refuses this input" in refused.stderr


def test_categories_never_detected_are_named(run: Run, write_json_file: Callable[[str, Any], Path]) -> None:
    write_json_file("r.json", [RESULTS[0] | {"category_id": 8}])
    assert "1 categories with objects were never detected: a" in run().stdout
    assert json.loads(run("--json").stdout)["never_detected"] == [3]


def test_what_is_odd_about_results_is_told(run: Run, write_json_file: Callable[[str, Any], Path]) -> None:
    odd = [{"category_id": 77}, {"score": 7.5}, {"bbox": [1.0, 1.0, -4.0, 5.0]}]
    write_json_file("r.json", [RESULTS[0] | change for change in odd])
    told = run("--json").stderr
    assert "1 of 3 results have a category that the ground truth does not list (id 77, for one)" in told
    assert "1 of 3 boxes have no area" in told and "1 of 3 scores lie outside [0, 1]" in told
    refused = run("--calibration")
    assert refused.exit_code == 2 and "calibration needs scores in [0, 1], got 0.5 to 7.5" in refused.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--style", "voc"], "--style must be lvis or coco, got 'voc'"),
        (["--iou-type", "keypoints"], "--iou-type must be bbox or segm"),
        (["--engine", "voc"], "--engine must be calib or lvis or coco"),
        (["--fixed-ap", "0"], "fixed_ap must be at least 1"),
        (["--bootstrap", "2", "--results", "{r2}"], "expected replicates >= 10"),
        (["--cache", "c"], "nothing to evaluate, or two kinds of it"),
        (["--head", "h"], "nothing to evaluate, or two kinds of it"),
        (["--proposals"], "--proposals needs --cache and --head"),
        (["--iou-type", "segm"], "has no height and width"),
    ],
)
def test_options_that_do_not_go_together(
    run: Run, options: list[str], message: str, write_json_file: Callable[[str, Any], Path]
) -> None:
    second = write_json_file("r2.json", RESULTS)
    outcome = run(*(option.format(r2=second) for option in options))
    assert outcome.exit_code == 2 and message in outcome.stderr


@pytest.mark.parametrize(
    "columns",
    [
        {"category_id": [3, 8, 9], "instance_count": [1, None, 2]},
        {"category_id": [3, 8, 9], "instance_count": [1, -2, 2]},
        {"category_id": [3, 8, 9], "instance_count": ["1", "2", "3"]},
        {"category_id": [3, 3, 8, 9], "instance_count": [1, 2, 3, 4]},
        {"category_id": [3, 8, 9], "instance_count": [1.0, 2.0, 3.0]},
    ],
)
def test_counts_that_are_none_are_refused(run: Run, tmp_path: Path, columns: Document) -> None:
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    refused = run("--counts", str(tmp_path / "c.parquet"))
    assert refused.exit_code == 2 and "does not hold whole numbers" in refused.stderr


def test_nothing_is_written_where_a_file_of_the_folder_is_a_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out" / "summary.json").mkdir(parents=True)
    refused = run()
    assert refused.exit_code == 2 and "summary.json is a folder" in refused.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["summary.json"]


def test_parquet_with_a_column_twice_or_ids_too_large(run: Run, tmp_path: Path) -> None:
    names = ["image_id", "category_id", "score", "x1", "y1", "x2", "y2"]
    arrays = [pa.array([5]), pa.array([3]), *(pa.array([v]) for v in (0.5, 10.0, 10.0, 50.0, 50.0))]
    pq.write_table(pa.Table.from_arrays([*arrays, arrays[2]], [*names, "score"]), tmp_path / "r.json")
    assert "has column score twice" in run().stderr
    arrays[0] = pa.array([2**63 + 5], pa.uint64())
    pq.write_table(pa.Table.from_arrays(arrays, names), tmp_path / "r.json")
    refused = run()
    assert refused.exit_code == 2 and "9223372036854775813" in refused.stderr


def test_one_result_has_nothing_to_be_compared_with(run: Run) -> None:
    refused = run("--bootstrap")
    assert refused.exit_code == 2 and "give at least two" in refused.stderr


def test_a_large_results_list_is_read_as_columns(
    write_json_file: Callable[[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"image_id": 5, "category_id": 3, "bbox": rng.random(4).tolist(), "score": rng.random(), "segmentation": [[1]]}
        for _ in range(3000)
    ]
    path = write_json_file("large.json", rows)
    slow = Detections.read(path)
    monkeypatch.setattr("calib.evaluate.results.LARGE_JSON", 1)
    monkeypatch.setattr("calib.evaluate.results.read_json", None)  # the slow way is not taken
    fast = Detections.read(path)
    for name in ("image_id", "category_id", "score", "box"):
        np.testing.assert_array_equal(getattr(fast, name), getattr(slow, name), strict=True)


@pytest.mark.parametrize(
    "change",
    [
        {"score": None},
        {"bbox": [1, 2, 3]},
        {"bbox": [1, None, 3, 4]},
        {"bbox": None},
        {"image_id": "x"},
        {"score": float("nan")},
        {"image_id": 5.5},
        {"image_id": "5"},
        {"category_id": True},
        {"score": "0.5"},
        {"score": True},
        {"bbox": [1, 2, "3", 4]},
        {"bbox": [1, 2, True, 4]},
    ],
)
def test_what_is_wrong_in_a_large_list_is_named(
    change: Document, write_json_file: Callable[[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_json_file("large.json", [RESULTS[0], RESULTS[0] | change])
    monkeypatch.setattr("calib.evaluate.results.LARGE_JSON", 1)
    with pytest.raises((FormatError, NonFiniteError), match=r"large\.json\[1\]"):
        Detections.read(path)
