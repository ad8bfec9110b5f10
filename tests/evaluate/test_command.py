"""``calib evaluate``: files in, a result folder and figures out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from calib.cli.console import CalibGroup
from calib.cli.evaluate import evaluate

Document = dict[str, Any]
Run = Callable[..., Any]
RESULTS = [{"image_id": 5, "category_id": 3, "bbox": [10.0, 10.0, 40.0, 40.0], "score": 0.5}]


@pytest.fixture
def run(one_object: Document, tmp_path: Path, write_json_file: Callable[[str, Any], Path]) -> Run:
    """``run(*options)``: the command on the one object and a perfect detection of it."""
    app = typer.Typer(cls=CalibGroup)
    app.command()(evaluate)
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


def test_json_is_one_object_with_all_figures(run: Run, tmp_path: Path) -> None:
    outcome = run("--json")
    assert outcome.exit_code == 0
    figures = json.loads(outcome.stdout)
    keys = "AP AP50 AP75 APs APm APl APr APc APf AR ARs ARm ARl AP1 AP2 AP3 AP4 bAP n nr nc nf n1 n2 n3 n4"
    assert set(keys.split()) <= set(figures)
    assert figures["AP"] == pytest.approx(1.0) and figures["AP2"] == -1
    assert figures == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert figures["max_detections"] == 300 and figures["bins"] == [10, 100, 1000]


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


def test_the_table_names_the_categories_behind_each_figure(run: Run) -> None:
    lines = [line.split() for line in run("--bins", "10,20").stdout.splitlines()]
    assert ["AP", "100.00", "1"] in [line[:3] for line in lines]
    assert ["APc", "-", "0", "common"] in lines
    assert ["AP2", "-", "0", "10", "to", "19", "training", "instances"] in lines
    assert ["AP3", "-", "0", "20", "or", "more", "training", "instances"] in lines


def test_counts_come_from_a_cache_if_asked(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "categories.parquet"
    pq.write_table(pa.table({"category_id": [9, 3, 8], "instance_count": [1, 200, 1]}), path)
    figures = json.loads(run("--counts", str(path), "--json").stdout)
    assert (figures["n1"], figures["n3"]) == (0, 1)
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
