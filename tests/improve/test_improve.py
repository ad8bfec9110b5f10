"""calib improve on a few rendered images: what it leaves, what it does again, an honest gain, that it goes on."""

import html
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest

from calib.artifact import load
from calib.cache import Cache
from calib.errors import ExistsError, FormatError, InputError, MissingFileError, SettingError
from calib.improve.caches import image_ids
from calib.improve.ceiling import ceiling, few
from calib.improve.entries import Entry, read_entries
from calib.improve.estimate import estimate
from calib.improve.improve import improve
from calib.improve.request import NAMES, Data, HeadTable, Request, Search
from calib.improve.summary import BETTER, UNDECIDED, WORSE, Summary, verdict
from calib.training import train

from ..toy import Toy

ROOT = Path(__file__).parents[2]
Make = Callable[..., Request]
ALL = [
    "doctor", "extract-train", "extract-tune", "extract-val", "detector", "ceiling", "control", "search", "choose",
    "calibrate", "judge", "export", "report",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(request_for: Make, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return counted(request_for(tmp_path_factory.mktemp("runs") / "run", doctor=True))


@pytest.fixture(scope="module")
def crossed(request_for: Make, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return counted(request_for(tmp_path_factory.mktemp("runs") / "crossed", val_alone=True, budget="6"))


def counted(made: Request) -> Summary:
    """The run, whose last step has the number of all."""
    lines: list[str] = []
    summary = improve(made, note=lines.append)
    numbers = [line.partition("]")[0][1:].split("/") for line in lines if line.startswith("[")]
    assert numbers[-1][0] == numbers[-1][1] == str(len(summary.done))
    return summary


def test_a_run_leaves_heads_to_serve_an_export_a_report_and_all_metrics(run: Summary) -> None:
    assert list(run.done) == ALL
    assert sorted(p.name for p in (run.out / "models").iterdir()) == sorted(NAMES)
    assert all(load(run.out / "models" / name / "1").info.category_ids for name in NAMES)
    summary = json.loads((run.out / "summary.json").read_text())
    assert summary == run.record
    assert (run.out / summary["export"]["export"]).is_file()
    assert (run.out / "report.html").is_file()
    assert set(summary["results"]) == {*NAMES, "style", "cap"}
    assert summary["results"]["chosen"]["difference_to_control"]["AP"].keys() == {"difference", "low", "high"}
    assert summary["results"]["control"]["difference_to_control"] == {}
    assert summary["judged"] == "chosen" and summary["verdict"] in (BETTER, WORSE, UNDECIDED)
    assert 0 <= summary["ceiling"]["detector"]["AP"] <= summary["ceiling"]["right_labels"]["AP"] <= 1
    assert all(isinstance(warning, str) for warning in summary["warnings"])
    assert summary["serve"] == (summary["judged"] if summary["verdict"] == BETTER else "detector")
    assert len(summary["conclusions"]) >= 2 and f"serve {summary['serve']}" in summary["conclusions"][1]
    page = (run.out / "report.html").read_text()
    assert html.escape(summary["conclusions"][0]) in page
    of_bins = [summary["results"]["chosen"][key] for key in ("AP1", "AP2", "AP3", "AP4")]
    assert all(metric is None or 0 <= metric <= 1 for metric in of_bins)  # null where a bin has no category
    assert summary["doctor"]["errors"] == 0 and summary["table"] is None


def test_the_chosen_head_is_the_best_on_tune_and_calibration_costs_no_ap(run: Summary) -> None:
    chosen, results = run.record["chosen"], run.record["results"]
    assert chosen["values"][chosen["from"]] == max(chosen["values"].values())
    assert set(chosen["values"]) == {"detector", "control", "search"}
    assert run.record["confidence"]["maps"] is None or (
        run.record["confidence"]["after"]["AP"] == pytest.approx(run.record["confidence"]["before"]["AP"])
    )
    assert results["chosen-calibrated"]["AP"] == pytest.approx(results["chosen"]["AP"], abs=1e-6)


def test_what_is_done_is_done_again_only_where_its_inputs_change(run: Summary, request_for: Make) -> None:
    assert improve(request_for(run.out, doctor=True)).done == ()
    assert improve(request_for(run.out, replicates=11)).done == ("judge", "report")
    more = improve(request_for(run.out, replicates=11, budget="3"))
    assert more.done[0] == "search" and not {"control", "detector", "extract-train"} & set(more.done)
    (run.out / "report.html").unlink()
    assert improve(request_for(run.out, replicates=11, budget="3")).done == ("report",)
    other = improve(request_for(run.out, objective="AR", replicates=11, budget="3"))
    assert other.done[:3] == ("control", "search", "choose") and other.record["metric"] == "AP"


def test_with_val_alone_every_image_is_judged_by_a_head_that_was_chosen_without_it(crossed: Summary) -> None:
    folds = crossed.out / "folds"
    parts = {name: image_ids(folds / f"{name}.json") for name in ("fold0", "fold1")}
    val = Cache(crossed.out / "caches" / "val").images["image_id"].to_numpy()
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.sort(val))
    pooled = pq.read_table(crossed.out / "detections" / "chosen.parquet")
    for name, ids in parts.items():
        seen = Cache(folds / name / "cache").images["image_id"].to_numpy()
        assert not np.intersect1d(ids, seen).size and len(ids) + len(seen) == len(val)
        own = pq.read_table(crossed.out / "detections" / name / "chosen.parquet").to_pylist()
        wanted = [row for row in own if row["image_id"] in set(ids.tolist())]
        assert [row for row in pooled.to_pylist() if row["image_id"] in set(ids.tolist())] == wanted
    assert crossed.record["judged"] == "chosen-calibrated" and crossed.record["judged_on"]["folds"] == 2


def test_a_crossed_run_is_skipped_when_done(crossed: Summary, request_for: Make) -> None:
    assert improve(request_for(crossed.out, val_alone=True, budget="6")).done == ()


def test_the_plan_is_told_and_nothing_is_written(request_for: Make, tmp_path: Path) -> None:
    found = estimate(request_for(tmp_path / "run", val_alone=True))
    steps = {part.step: part for part in found.parts}
    assert steps["extract-train"].images == 12 and steps["fold1-cache"].images == 6
    assert steps["extract-val"].seconds and found.total("bytes") > 0
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_is_refused_before_anything_is_written(
    request_for: Make, files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match="twice"):
        Data(files["train"], files["images"], files["train"]).check()
    with pytest.raises(MissingFileError):
        Data(files["train"], files["images"], tmp_path / "none.json").check()
    with pytest.raises(SettingError):
        Search("soon")
    with pytest.raises(SettingError):
        request_for(tmp_path / "run", group_by="video_id")
    for refused in (improve, estimate):
        with pytest.raises(ExistsError):
            refused(request_for(files["images"]))
    assert not (files["images"] / "lock").exists()
    assert not (tmp_path / "run").exists()


def test_a_split_with_few_rare_objects_is_warned_of_before_the_search(tmp_path: Path) -> None:
    cache = Toy(mode="test").write(tmp_path / "cache").path
    assert any("AP1" in warning for warning in few(cache, "test"))
    train("softmax", Toy().write(tmp_path / "train"), tmp_path / "softmax" / "1")
    found = ceiling(cache, tmp_path / "softmax" / "1")
    assert 0 <= found["recall"]["recall1"] <= 1 and set(found["right_labels"]) == set(found["detector"])


def test_the_verdict_is_of_the_interval() -> None:
    assert verdict({"difference": 0.02, "low": 0.01, "high": 0.03}) == BETTER
    assert verdict({"difference": 0.02, "low": -0.01, "high": 0.05}) == UNDECIDED
    assert verdict({"difference": -0.02, "low": -0.03, "high": -0.01}) == WORSE
    assert verdict(None) == UNDECIDED


def arguments(made: Request) -> list[str]:
    """The command of a request, for its budget and methods."""
    data, search = made.data, made.search
    splits = ["--tune", data.tune, "--test", data.val] if data.tune else ["--val", data.val]
    splits += [] if made.doctor else ["--no-doctor"]
    return [str(word) for word in (
        "improve", "--detector", made.detector.spec, "--train", data.train, *splits, "--images", data.images, "--out",
        made.out, "--budget", search.budget, "--methods", ",".join(search.methods), "--steps", search.steps,
        "--bootstrap", made.replicates, "--device", "cpu", "--processes", 1,
    )]  # fmt: skip


def test_the_command_prints_steps_and_sizes(request_for: Make, tmp_path: Path, calib: Callable[..., object]) -> None:
    done = calib(*arguments(request_for(tmp_path / "run")), "--plan", "--json")
    assert done.exit_code == 0, done.output  # type: ignore[attr-defined]
    assert json.loads(done.stdout)["bytes"] > 0  # type: ignore[attr-defined]


def test_the_command_goes_on_with_a_run_that_was_moved(
    run: Summary, request_for: Make, tmp_path: Path, calib: Callable[..., object]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run.out, moved)
    before = (moved / "steps" / "extract-train.json").read_bytes()
    done = calib(*arguments(request_for(moved, methods=("tau-norm",), budget="1")), "--json")
    assert done.exit_code == 0, done.output  # type: ignore[attr-defined]
    assert json.loads(done.stdout) == json.loads((moved / "summary.json").read_text())  # type: ignore[attr-defined]
    assert (moved / "steps" / "extract-train.json").read_bytes() == before


def test_the_command_refuses_what_cannot_be(request_for: Make, tmp_path: Path, fails: Callable[..., str]) -> None:
    words = arguments(request_for(tmp_path / "run"))
    at = words.index("--test")
    assert "--val" in fails(*words[:at], *words[at + 2 :])
    assert "--val" in fails(*words, "--val", words[at + 1])
    assert "--val" in fails(*words[: at - 2], *words[at:])
    (tmp_path / "heads.toml").write_text('[mine]\nmethod = "none"\n')
    assert "mine" in fails(*words, "--table", tmp_path / "heads.toml")
    assert "--table" in fails(*words, "--caps", "300")
    assert "--budget" in fails(*words, "--budget", "0")
    assert not (tmp_path / "run").exists()


ROWS = (
    Entry("natural-converged", "natural", "the control", {"steps": 2}),
    Entry("adjusted", "logit-adjustment", "on it", {"tau": 0.5}, "natural-converged"),
    Entry("norcal", "norcal"),
)


def test_heads_of_a_table_are_judged_beside(run: Summary, request_for: Make, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(run.out, out)
    made = request_for(out, table=HeadTable(ROWS[:2], seeds=2, caps=(300, 20)))
    done = improve(made)
    assert {"heads", "table"} <= set(done.done) and "extract-train" not in done.done
    assert done.record["baseline"] == "natural-converged"
    table = done.table
    assert table.caps == [20, 300]
    assert [(r.head, r.seeds) for r in table.of_cap(20)] == [("natural-converged", 2), ("adjusted", 2), ("chosen", 1)]
    assert (out / "table.md").read_text() == table.markdown()
    for name in ("natural-converged-seed1", "adjusted", "chosen"):
        assert json.loads((out / "results-20" / name / "summary.json").read_text())["max_detections"] == 20
    assert load(out / "models" / "adjusted" / "2").info.base[0]["seed"] == 1
    assert done.record["results"]["adjusted"]["difference_to_control"]["AP"]
    kept = (out / "models" / "adjusted" / "1" / "head.json").stat().st_mtime_ns
    changed = replace(ROWS[0], settings={"steps": 3}), ROWS[1], ROWS[2]
    assert {"heads", "table"} <= set(improve(replace(made, table=HeadTable(ROWS, 2, (300, 20)))).done)
    assert (out / "models" / "adjusted" / "1" / "head.json").stat().st_mtime_ns == kept
    improve(replace(made, table=HeadTable(changed, 1, (300, 20))))
    assert load(out / "models" / "natural-converged" / "1").info.settings["loop"]["steps"] == 3
    assert (out / "models" / "adjusted" / "1" / "head.json").stat().st_mtime_ns != kept


def test_rows_are_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "heads.toml"
    path.write_text('[a]\nmethod = "crt"\nset = { steps = 4 }\n[b]\nmethod = "tau-norm"\nbase = "a"\n')
    assert read_entries(path) == [Entry("a", "crt", "", {"steps": 4}), Entry("b", "tau-norm", base="a")]
    for wrong in (
        "[a]\nmethod = 3\n", '[a]\nmethod = "crt"\nrate = 3\n', '[a]\nmethod = "crt"\nset = { x = 3 }\n',
        '[a]\nmethod = "crt"\nset = 3\n', '[a]\nmethod = "tau-norm"\nbase = "b"\n', 'a = "crt"\n', "", "[a",
        '["../a"]\nmethod = "crt"\n',
    ):  # fmt: skip
        path.write_text(wrong)
        with pytest.raises((SettingError, FormatError)):
            read_entries(path)
    path.write_text('[a]\nmethod = "crt"\nrate = 3\n')
    with pytest.raises(SettingError, match="'rate'"):
        read_entries(path)
    with pytest.raises(SettingError):
        HeadTable((Entry("chosen", "crt"),))


def test_what_the_doctor_finds_ends_the_run_before_anything_is_extracted(
    request_for: Make, files: dict[str, Path], shapes_set: Path, tmp_path: Path
) -> None:
    made = request_for(tmp_path / "run", doctor=True)
    other = {}
    for split in ("train", "val"):
        document = json.loads((shapes_set / f"{split}.json").read_text())
        last = len(document["categories"]) + 1
        for record in document["annotations"]:
            record["category_id"] = last - record["category_id"]
        for category in document["categories"]:
            category["id"] = last - category["id"]
        for image in document["images"]:
            for key in ("neg_category_ids", "not_exhaustive_category_ids"):
                image[key] = [last - k for k in image[key]]
        other[split] = tmp_path / f"{split}.json"
        other[split].write_text(json.dumps(document))
    with pytest.raises(InputError, match="classes-"):
        improve(replace(made, data=Data(other["train"], files["images"], other["val"])))
    assert not (tmp_path / "run" / "caches").exists()


@pytest.mark.slow
@pytest.mark.parametrize("val_alone", [False, True])
def test_runs_killed_at_twenty_random_moments_go_on_to_the_same_head(
    request_for: Make, tmp_path: Path, val_alone: bool
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(made: Request) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "calib.cli", *arguments(made)], env=environment)

    def ends(process: subprocess.Popen[bytes], after_s: float) -> bool:
        """Whether it ends by itself before it is killed."""
        with suppress(subprocess.TimeoutExpired):
            assert process.wait(after_s) == 0
            return True
        process.kill()
        return process.wait() == 0

    whole = request_for(tmp_path / "whole", val_alone=val_alone, budget="6")
    began = time.monotonic()
    assert start(whole).wait() == 0
    longest, moments, kills = time.monotonic() - began, Random(0), 0
    runs: list[Killed] = []
    while kills < 20 or not runs[-1].done:
        if not runs or runs[-1].done:
            runs.append(Killed(request_for(tmp_path / f"run-{len(runs)}", val_alone=val_alone, budget="6")))
        after_s = moments.uniform(0, longest / 2) if kills < 20 else 600
        runs[-1].done = ends(start(runs[-1].made), after_s)
        kills += not runs[-1].done
    for made in (run.made for run in runs):
        for name in NAMES:
            assert load(made.out / "models" / name / "1").digest() == load(whole.out / "models" / name / "1").digest()
        one, other = (json.loads((each.out / "summary.json").read_text()) for each in (whole, made))
        assert one["results"] == other["results"] and one["chosen"] == other["chosen"]


@dataclass
class Killed:
    made: Request
    done: bool = False


@pytest.mark.slow
@pytest.mark.parametrize("val_alone", [False, True])
def test_the_single_commands_lead_to_the_same_metrics(request_for: Make, tmp_path: Path, val_alone: bool) -> None:
    done = improve(request_for(tmp_path / "run", val_alone=val_alone, budget="6"))
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, words in (("calib", '-m calib.cli "$@"'), ("python", '"$@"')):
        (bin_ / name).write_text(f"#!/bin/sh\nexec {sys.executable} {words}\n")
        (bin_ / name).chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{bin_}:{os.environ['PATH']}"}
    subprocess.run(["sh", done.out / "commands.sh", tmp_path / "hand"], check=True, env=environment, cwd=tmp_path)
    for name in NAMES:
        mine, theirs = (json.loads((out / "results" / name / "summary.json").read_text())
                        for out in (done.out, tmp_path / "hand"))  # fmt: skip
        assert mine["AP"] == theirs["AP"] and mine["n"] == theirs["n"]
