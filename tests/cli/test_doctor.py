"""``calib doctor``: findings on stdout, progress on stderr, and exit codes that scripts can go by."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Calib = Callable[..., Any]
Fails = Callable[..., str]


@pytest.fixture
def looking(shapes_set: Path) -> Callable[..., list[Any]]:
    """``looking(*more)``: the healthy set, all of it."""

    def arguments(*more: object, **changed: object) -> list[Any]:
        options: dict[str, object] = {f: shapes_set / f"{f}.json" for f in ("val", "tune")}
        options |= {"annotations": shapes_set / "train.json", "images": shapes_set / "images", "sample": 10} | changed
        flat = [x for k, v in options.items() for x in ("--" + k.replace("_", "-"), v)]
        return ["doctor", *flat, *more]

    return arguments


def test_a_healthy_set_ends_with_0(calib: Calib, looking: Callable[..., list[Any]]) -> None:
    outcome = calib(*looking())
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout.rstrip().endswith("notes") and "0 errors, 0 warnings" in outcome.stdout
    assert "train 72 images" in outcome.stdout and "pictures of train" in outcome.stderr


def test_json_is_one_object_with_everything(
    calib: Calib, looking: Callable[..., list[Any]], detector_file: Path
) -> None:
    pytest.importorskip("torchvision")
    more = ["--detector", f"torchvision:{detector_file}", "--device", "cpu", "--check-images", "1", "--json"]
    outcome = calib(*looking(*more))
    assert outcome.exit_code == 0, outcome.output
    record = json.loads(outcome.stdout)
    assert set(record) == {"errors", "warnings", "notes", "findings", "data", "detector"}
    assert record["errors"] == 0 and record["notes"] == len(record["findings"]) - record["warnings"]
    keys = {"code", "severity", "where", "message", "remedy", "examples", "details"}
    assert all(set(f) == keys for f in record["findings"])
    assert {"proof", "proposals"} <= {f["code"] for f in record["findings"]}
    assert record["detector"]["classes"] == 192 and record["detector"]["train"]["images"] == 10
    assert "detector on train" in outcome.stderr


def test_an_error_ends_with_1_and_its_remedy(calib: Calib, looking: Callable[..., list[Any]], shapes_set: Path) -> None:
    outcome = calib(*looking(val=shapes_set / "train.json"))
    assert outcome.exit_code == 1 and "error val-is-train" in outcome.stdout and "->" in outcome.stdout
    outcome = calib(*looking("--json", val=shapes_set / "train.json"))
    assert outcome.exit_code == 1 and json.loads(outcome.stdout)["findings"][0]["code"] == "val-is-train"


def test_what_cannot_be_looked_at_ends_with_2(
    fails: Fails, looking: Callable[..., list[Any]], tmp_path: Path, shapes_set: Path
) -> None:
    assert "annotation file not found" in fails(*looking(annotations=tmp_path / "none.json"))
    assert "folder of pictures not found" in fails(*looking(images=tmp_path / "none"))
    assert "--detector" in fails(*looking("--weights", "w.pth"))
    assert "whole numbers" in fails(*looking("--bins", "a,b"))
    assert "ascending" in fails(*looking("--bins", "10,5"))
    assert "unknown detector framework" in fails(*looking("--detector", "keras:x"))
