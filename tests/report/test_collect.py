"""What the report says is what the files hold."""

import base64
import io
import json
import re
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from calib.cli.main import app
from calib.errors import CalibError, FormatError, InputError, MissingFileError, SettingError, UnknownNameError
from calib.evaluate.evaluate_files import Options, evaluate_files
from calib.files import read_json
from calib.layout import TENSORS
from calib.report import write_report
from calib.report.page import collect, html

from .conftest import CAP, COUNTS, EVIL, N_IMAGES, PER_IMAGE, SIDE, Split


def test_metrics_are_those_of_the_summaries(split: Split) -> None:
    data = collect(split.report())
    assert [head["name"] for head in data["heads"]] == ["good", "base", "noisy"]
    for head in data["heads"]:
        summary = read_json(split.folder / "results" / head["name"] / "summary.json", "summary")
        assert head["metrics"] == {key: pytest.approx(summary[key], abs=1e-6) for key in head["metrics"]}
        table = pq.read_table(split.folder / "results" / head["name"] / "per_category.parquet")
        ap = data["categories"]["ap"][data["heads"].index(head)]
        np.testing.assert_allclose(ap, table["AP"].to_numpy(), atol=1e-4)
    keys = [group["key"] for group in data["groups"]]
    assert keys == ["AP1", "AP2", "AP3", "AP4", "APr", "APc", "APf"]
    assert [group["label"] for group in data["groups"]][:4] == ["below 10", "10 to 99", "100 to 999", "1,000 or more"]
    assert data["categories"]["bin"] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_the_baseline_is_that_of_the_intervals_unless_another_is_wanted(split: Split) -> None:
    data = collect(split.report())
    assert [data["heads"][data[key]]["name"] for key in ("baseline", "best")] == ["base", "good"]
    assert data["heads"][0]["difference"]["to"] == "base" and data["heads"][1]["difference"] is None
    asked = collect(split.report(baseline="noisy"))
    assert asked["heads"][asked["baseline"]]["name"] == "noisy"
    plain = collect(split.report(results=split.results("noisy", "good", of="plain")))
    assert plain["heads"][plain["baseline"]]["name"] == "noisy"
    with pytest.raises(UnknownNameError, match="Did you mean 'good'"):
        collect(split.report(baseline="god"))


def test_confusion_kinds_and_cut_are_those_that_the_heads_were_made_with(split: Split) -> None:
    data = collect(split.report())
    good, base, noisy = range(3)
    of = {(row["head"], row["bin"]): row for row in data["confusion"]["outcomes"]}
    n_rare = N_IMAGES  # one on each picture
    assert of[base, 0] == {"head": base, "bin": 0, "right": 0, "same": 0, "rarer": 0, "frequent": n_rare, "nothing": 0}
    assert of[good, 0]["right"] == n_rare
    for head in range(3):
        total = sum(
            sum(v for k, v in row.items() if k not in ("head", "bin")) for (h, _), row in of.items() if h == head
        )
        assert total == N_IMAGES * PER_IMAGE
    missed = sum(of[good, b]["nothing"] for b in range(4))
    assert missed == sum(i % 2 == 0 and n == 8 for i in range(1, N_IMAGES + 1) for n in (8 + i % 5, 8 + (i + 2) % 5))
    pairs = data["confusion"]["pairs"]
    assert {pair["category"] for pair in pairs} == {EVIL, "kind 2", "kind 3"}
    assert {pair["taken"] for pair in pairs} == {"kind 12"} and all(p["n"] == [0, 8, 0] for p in pairs)
    cut = {(row["head"], row["bin"]): row["share_cut"] for row in data["cut"]}
    assert all(cut[noisy, b] == 1 for b in range(4)) and all(cut[good, b] == 0 for b in range(4))
    false = {(row["head"], row["bin"]): row for row in data["falseKinds"]}
    assert false[base, 3]["wrong_class"] == n_rare and false[good, 3]["wrong_class"] == 0
    assert false[noisy, 0]["n_true"] == 0 and false[noisy, 0]["n_false"] == 3 * N_IMAGES


def test_norms_and_losses_come_from_the_heads(split: Split) -> None:
    good, base, _ = (head["fitted"] for head in collect(split.report())["heads"])
    assert good["norms"] == [1.0] * 12
    np.testing.assert_allclose(base["norms"], np.arange(1, 13) / 6.5, atol=1e-4)
    assert [len(stage) for stage in good["stages"]] == [10, 5] and len(base["stages"]) == 1
    assert good["stages"][1][0] == [0, 4.0]


def test_a_run_finds_its_head_by_name_and_version(split: Split, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for version in ("1", "2", "10"):
        shutil.copytree(split.models / ("base" if version == "10" else "good") / "1", models / "good" / version)
    results = split.results("good")
    assert collect(split.report(results=results, models=models))["heads"][0]["fitted"]["norms"][0] < 1  # version 10
    named = tmp_path / "good-2"
    shutil.copytree(results[0], named)
    assert collect(split.report(results=[named], models=models))["heads"][0]["fitted"]["norms"][0] == 1
    by_name = collect(split.report(results=results, models={"good": models / "good" / "10"}))
    assert by_name["heads"][0]["fitted"]["norms"][0] < 1
    (models / "good" / "10" / TENSORS).write_bytes(b"")
    with pytest.raises(FormatError, match="damaged"):
        collect(split.report(results=results, models=models))


def test_pictures_show_the_best_detections_where_heads_differ(split: Split) -> None:
    data = collect(split.report(n_examples=5))
    assert len(data["examples"]) == 5  # the best head loses on none: all are of the other kind
    for example in data["examples"]:
        kind, _, coded = example["uri"].partition(",")
        with Image.open(io.BytesIO(base64.b64decode(coded))) as picture:
            assert kind == "data:image/webp;base64" and picture.format == "WEBP" and picture.size == (SIDE, SIDE)
        good, base, _noisy = example["found"]
        assert len(base) == PER_IMAGE == len(example["objects"])
        assert sum(d["kind"] == "true" for d in good) > sum(d["kind"] == "true" for d in base)
        assert {d["object"] for d in good if d["object"]} <= {o["id"] for o in example["objects"]}
        boxes = np.array([d["box"] for d in good + base])
        assert boxes.min() >= 0 and (boxes[:, :2] + boxes[:, 2:]).max() <= 1


def test_what_is_missing_is_said_and_the_rest_is_shown(split: Split) -> None:
    assert collect(split.report())["missing"] == {}
    bare = collect(
        split.report(results=split.results("good", "base", of="plain"), models=None, images=None, annotations=None)
    )
    assert set(bare["missing"]) == {
        *("intervals", "reliability", "norms", "training", "confusion", "kinds", "cut", "examples"),
    }
    assert all("calib " in line for line in bare["missing"].values())
    assert collect(split.report(results=split.results("good")))["missing"].keys() == set()


def test_a_cap_that_no_file_reaches_cuts_nothing_that_could_be_seen(split: Split, tmp_path: Path) -> None:
    evaluate_files(split.annotations, [split.folder / "good.json"], [tmp_path / "good"], Options(matches=True))
    data = collect(split.report(results=[tmp_path / "good"]))
    assert data["cut"] == [] and "--max-detections" in data["missing"]["cut"]


def test_the_cap_of_coco_is_not_one_of_images(split: Split, tmp_path: Path) -> None:
    options = Options(style="coco", matches=True, max_detections=2)
    evaluate_files(split.annotations, [split.folder / "noisy.json"], [tmp_path / "noisy"], options)
    data = collect(split.report(results=[tmp_path / "noisy"]))
    assert data["cut"] == [] and "no cap" in data["missing"]["cut"]
    assert sum(row["n_true"] for row in data["falseKinds"]) == N_IMAGES * PER_IMAGE  # all at ranks below ten others


def test_without_training_counts_there_are_no_bins(split: Split, tmp_path: Path) -> None:
    document = json.loads(split.annotations.read_text())
    for category in document["categories"]:
        del category["instance_count"]
    (tmp_path / "val.json").write_text(json.dumps(document))
    files = [split.folder / "good.json", split.folder / "base.json"]
    outs = [tmp_path / "good", tmp_path / "base"]
    evaluate_files(tmp_path / "val.json", files, outs, Options(matches=True, max_detections=CAP))
    data = collect(split.report(results=outs, baseline="base"))
    assert [group["key"] for group in data["groups"]] == ["APr", "APc", "APf"] and "--counts" in data["missing"]["bins"]
    assert data["categories"]["count"] == [None] * len(COUNTS) and data["examples"]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"results": []}, InputError, "no result folder"),
        ({"results": ["results/none"]}, MissingFileError, "not found"),
        ({"results": ["images"]}, FormatError, "neither"),
        ({"results": ["results/good", "results/../results/good"]}, InputError, "given twice"),
        ({"results": ["results/good", "plain/good"]}, InputError, "are called 'good'"),
        ({"results": ["results/good", "other/base"]}, InputError, "max_detections 6 and 300"),
        ({"results": ["results/good", "small/base"]}, InputError, "different splits"),
        ({"images": "elsewhere"}, MissingFileError, "--images"),
        ({"annotations": "none.json"}, MissingFileError, "none.json"),
        ({"annotations": None}, SettingError, "--annotations"),
        ({"n_examples": -1}, SettingError, "-1"),
    ],
)
def test_what_does_not_fit_is_refused(
    split: Split, change: dict[str, object], error: type[CalibError], text: str
) -> None:
    files = [split.folder / "base.json"]
    if not (split.folder / "small").exists():
        evaluate_files(split.annotations, files, split.results("base", of="other"), Options())
        document = json.loads(split.annotations.read_text())
        document["annotations"] = document["annotations"][1:]
        (split.folder / "small.json").write_text(json.dumps(document))
        small = split.results("base", of="small")
        evaluate_files(split.folder / "small.json", files, small, Options(max_detections=CAP))
    located = {
        key: [split.folder / str(v) for v in value]
        if isinstance(value, list)
        else split.folder / value
        if isinstance(value, str)
        else value
        for key, value in change.items()
    }
    with pytest.raises(error) as e:
        collect(split.report(**located))
    assert text in f"{e.value} {e.value.hint}"


def test_the_page_is_one_file_that_asks_for_nothing(split: Split, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.html"
    written = write_report(out, split.report(title="<b>Heads & tails</b>"))
    text = out.read_text()
    assert written["bytes"] == out.stat().st_size < 2_000_000 and not list(out.parent.glob(".*"))
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)
    assert policy and policy[1].startswith("default-src 'none'") and "unsafe-eval" not in policy[1]
    for script in scripts:
        assert f"'sha256-{base64.b64encode(sha256(script.encode()).digest()).decode()}'" in policy[1]
    own = text.replace(scripts[0], "")  # without d3 and Plot
    assert not re.search(r"<(link|img|iframe)[^>]+https?:", own) and "@import" not in own and "url(" not in own
    assert EVIL not in text and "<b>Heads" not in text and "&lt;b&gt;Heads &amp; tails" in text
    plain = re.search(r"<noscript>(.*?)</noscript>", text, re.S)  # what is seen where scripts are switched off
    shown = [f"{100 * head['metrics']['AP']:.1f}" for head in collect(split.report())["heads"]]
    assert plain and re.findall(r"<tr><td>(\w+)</td><td>([\d.]+)</td>", plain[1]) == [
        ("good", shown[0]), ("base", shown[1]), ("noisy", shown[2]),
    ]  # fmt: skip
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert data and json.loads(data[1])["categories"]["name"][0] == EVIL


def test_notes_and_the_head_that_is_looked_at_first(split: Split) -> None:
    data = collect(split.report(notes=("chosen: <noisy>",), focus="noisy"))
    assert data["notes"] == ["chosen: <noisy>"] and data["heads"][data["best"]]["name"] == "noisy"
    plain = re.search(r"<noscript>(.*?)</noscript>", html(data), re.S)
    assert plain and "<p>chosen: &lt;noisy&gt;</p>" in plain[1]
    with pytest.raises(UnknownNameError):
        collect(split.report(focus="nosy"))


def test_the_same_metrics_give_the_same_page(split: Split) -> None:
    data = collect(split.report())
    assert html(data) == html(json.loads(json.dumps(data)))


def test_the_command_tells_what_it_wrote(split: Split, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    plain = [str(path) for path in split.results("good", "base", of="plain")]
    done = CliRunner().invoke(app, ["report", *plain, "--out", str(out), "--baseline", "base", "--json"])
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["heads"], told["baseline"], told["best"]) == (["good", "base"], "base", "good")
    assert told["path"] == str(out) and told["bytes"] == out.stat().st_size and "training" in told["missing"]
    done = CliRunner().invoke(app, ["report", *plain, "--out", str(out)])
    assert done.exit_code == 0 and "note: " in done.stderr and "best" in done.stdout
    done = CliRunner().invoke(app, ["report", *plain, "--out", str(out), "--images", str(split.images)])
    assert done.exit_code == 2 and "--annotations" in done.stderr
