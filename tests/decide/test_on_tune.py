"""What is decided on a tune split: comparison, the head of a class, thresholds, confidence maps; and the notebook."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

import calib
from calib.artifact import load
from calib.cache import Cache
from calib.cli.main import app
from calib.decide.assess import Assessment
from calib.decide.compare import compare, names_of
from calib.decide.confidence import Before, Confidence, _isotonic, _logistic, calibrate
from calib.decide.per_class import _choice, _Curve, _threshold, select, set_thresholds
from calib.errors import ExistsError, InputError, SettingError, UnsupportedError
from calib.evaluate import GroundTruth
from calib.heads.calibrated import apply
from calib.score import detector_nms, score
from calib.score.detect import detect
from calib.server.compute import Compute
from calib.training import train

from ..toy import Toy


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of one detector and two heads."""
    folder = tmp_path_factory.mktemp("home")
    cache = Toy().write(folder / "train")
    Toy(mode="test", most=40, images=20).write(folder / "tune")
    train("softmax", cache, folder / "softmax" / "1")
    train("crt", cache, folder / "crt" / "1", {"steps": 100, "rows_per_step": 32})
    return folder


@pytest.fixture(scope="module")
def heads(home: Path) -> list[Path]:
    return [home / "softmax" / "1", home / "crt" / "1"]


@pytest.fixture(scope="module")
def tune(home: Path) -> Cache:
    return Cache(home / "tune")


def per_category(head: Path, cache: Cache) -> Any:
    assessment, nms = Assessment(cache), detector_nms(cache)
    found = assessment.found(load(head).head, nms)
    return assessment.evaluator.evaluate(found, max_detections=nms.max_detections).AP


def test_a_comparison_has_the_metrics_of_the_evaluation(heads: list[Path], tune: Cache) -> None:
    found = compare([*heads, heads[0]][:2], tune, replicates=30)
    first, other = (per_category(h, tune) for h in heads)
    present = first > -1
    assert found.metrics[0]["AP"].difference == pytest.approx(first[present].mean())
    gain = found.differences[0]["AP"]
    assert gain.difference == pytest.approx(other[present].mean() - first[present].mean())
    assert gain.low <= gain.difference <= gain.high
    assert [c.gain for c in found.changes[0]] == sorted((other - first)[present], reverse=True)
    a = found.agreement[0]
    assert a.both + a.only_first + a.only_other + a.neither == pytest.approx(1) and 0 < a.same_class <= 1
    assert "softmax" in found._repr_html_() and set(found.record()) == {"softmax", "crt"}


def test_a_head_agrees_with_itself(heads: list[Path], tune: Cache, home: Path) -> None:
    train("softmax", Cache(home / "train"), home / "softmax" / "2", overwrite=True)
    found = compare([heads[0], home / "softmax" / "2"], tune, replicates=10)
    assert found.names == ("softmax/1", "softmax/2")
    assert found.agreement[0].same_class == 1 and found.agreement[0].only_first == 0
    assert found.differences[0]["AP"].low == found.differences[0]["AP"].high == 0
    with pytest.raises(SettingError, match="twice"):
        names_of([heads[0], heads[0]])
    with pytest.raises(SettingError, match=">= 10, got -1"):
        compare(heads, home, replicates=-1)  # before the cache is even looked for
    with pytest.raises(SettingError, match="at least two"):
        compare(heads[:1], tune)


def test_functions_do_not_take_a_url_for_a_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedError, match="s3://bucket/models/1: functions write to local paths"):
        calib.fit_head("natural", home / "train", "s3://bucket/models/1", steps=3)
    with pytest.raises(UnsupportedError, match="http:// is not supported"):
        calib.open_cache("http://host/cache")
    assert not list(tmp_path.iterdir())


def test_three_objects_do_not_choose_a_head() -> None:
    """Bin 0: ten classes of 3 objects. The other head wins class 0 by far and loses the rest by a little."""
    gain = np.array([[0.0] * 10, [0.5] + [-0.1] * 9])
    of_bin = np.zeros(10, np.int64)
    few, many = np.full(10, 3.0), np.full(10, 300.0)
    # Mean gain of the bin -0.04; class 0: (3 * 0.5 - 20 * 0.04) / 23 > 0, a class of one object: (0.5 - 0.8) / 21 < 0.
    assert _choice(gain, few, of_bin, 20.0, 0).tolist() == [1] + [0] * 9
    assert _choice(gain, few / 3, of_bin, 20.0, 0).tolist() == [0] * 10
    assert _choice(-gain, many, of_bin, 20.0, 0).tolist() == [0] + [1] * 9
    unseen = np.where(np.arange(10) == 9, 0.0, many)  # a class without objects goes with its bin
    assert _choice(-gain, unseen, of_bin, 20.0, 0)[9] == _choice(-gain, unseen, of_bin, 20.0, 0)[8]


def test_every_class_is_scored_by_its_head(heads: list[Path], tune: Cache, tmp_path: Path) -> None:
    artifact, found = select(heads, tune, tmp_path / "s" / "1", strength=0.5)
    choice = artifact.info.settings["choice"]
    assert len(set(choice)) == 2 and sum(map(sum, found.classes)) == 7
    x = torch.from_numpy(tune.features.read(0, 40))
    whole = load(tmp_path / "s" / "1").head.full_scores(x)
    own = [load(h).head.full_scores(x) for h in heads]
    order = [heads.index(Path(found.default)), 1 - heads.index(Path(found.default))]
    for c, k in enumerate(artifact.head.choice.tolist()):  # type: ignore[union-attr, operator]
        assert torch.equal(whole[:, c], own[order[k]][:, c])
    assert torch.equal(whole[:, -1], own[order[0]][:, -1])
    with pytest.raises(SettingError):
        select(heads[:1], tune, tmp_path / "t")


def test_a_threshold_reaches_its_target() -> None:
    """By hand: scores .9 true, .8 false, .7 true, .6 false, .5 false; 3 objects; no bin behind it."""
    own = _Curve(np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([1, 0, 1, 0, 0], np.bool_), 3)
    t, reached = _threshold(own, own, 0.0, 0.6, by_precision=True)
    assert reached and 0.6 <= t < 0.7  # 2 of 3
    t, reached = _threshold(own, own, 0.0, 2 / 3, by_precision=False)
    assert reached and 0.69 < t < 0.7
    assert _threshold(own, own, 0.0, 0.9, by_precision=False) == (0.0, False)
    few = _Curve(np.array([0.3]), np.array([1], np.bool_), 1)
    alone, leaning = (_threshold(few, own, s, 0.6, by_precision=True)[0] for s in (0.0, 20.0))
    assert alone < 0.3 < 0.6 <= leaning  # one lucky detection does not set a threshold


def test_thresholds_are_honoured_offline_and_by_the_service(heads: list[Path], tune: Cache, tmp_path: Path) -> None:
    _, found = set_thresholds(heads[1], tune, tmp_path / "t" / "1", precision=0.6)
    assert found.kept < found.detections and found.precision > 0
    loaded, nms = load(tmp_path / "t" / "1").head, detector_nms(tune)
    threshold = np.array(found.threshold, np.float32)
    images = list(score(tune, loaded, nms))
    for one in images:
        assert (one.detections.score > threshold[one.detections.category]).all()
    # Detections of categories that an image is not labelled for count neither way, but are made.
    assert found.kept <= sum(len(i.detections.score) for i in images) < found.detections
    compute = Compute()
    served = compute.scores(compute.prepare(loaded), torch.from_numpy(tune.features.read(0, 30)))
    plain = load(heads[1]).head.scores(torch.from_numpy(tune.features.read(0, 30))).numpy()
    assert np.array_equal(served, np.where(plain > threshold, plain, 0))
    boxes = np.tile(np.array([0, 0, 9, 9], np.float32), (30, 1))
    assert (detect(served, boxes, nms).score > 0).all()
    for wrong in ({}, {"precision": 0.5, "recall": 0.5}, {"recall": 1.5}):
        with pytest.raises(SettingError):
            set_thresholds(heads[1], tune, tmp_path / "u", **wrong)


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
@pytest.mark.parametrize("by", ["pooled", "bin", "class"])
def test_maps_mend_errors_and_keep_the_order(
    heads: list[Path], tune: Cache, tmp_path: Path, method: str, by: str
) -> None:
    artifact, (change,) = calibrate(heads[0], tune, tmp_path / "c" / "1", Confidence(method, by))
    assert change.after["D-ECE"] < change.before["D-ECE"]
    if by == "pooled":  # one increasing map moves nothing, the cap included
        assert change.after["AP"] == pytest.approx(change.before["AP"], abs=1e-12)
    loaded = load(tmp_path / "c" / "1").head
    x = torch.from_numpy(tune.features.read(0, tune.n_rows))
    before, after = load(heads[0]).head.scores(x), loaded.scores(x)
    assert torch.equal(after, artifact.head.scores(x)) and 0 <= after.min() <= after.max() <= 1
    order = before.argsort(dim=0)
    assert (after.gather(0, order).diff(dim=0) >= 0).all()
    assert len(change.reliability_after) == 10


def test_maps_find_what_made_the_scores() -> None:
    """Detections are true with probability sigmoid(2 z - 1) of their score's logit z."""
    rng = np.random.default_rng(0)
    z = rng.normal(-1, 2, 40_000)
    s, p = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(-(2 * z - 1)))
    y = (rng.random(len(z)) < p).astype(float)
    group = np.zeros(len(z), np.int64)
    slope, shift = _logistic(s, y, group, 1, Confidence("platt"))
    assert slope[0, 0] == pytest.approx(2, abs=0.06) and shift[0, 0] == pytest.approx(-1, abs=0.06)
    tensors = [torch.from_numpy(k) for k in _isotonic(s, y, group, 1, Confidence("isotonic"))]
    at = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)[None]
    expected = torch.sigmoid(2 * torch.logit(at) - 1)
    assert (apply("knots", at, *tensors) - expected).abs().max() < 0.06


@pytest.mark.parametrize("detections", [4, 40, 4000])
@pytest.mark.parametrize("truth", ["separable", "drawn", "all true", "none true"])
def test_maps_are_those_of_logistic_regression(detections: int, truth: str) -> None:
    """On Platt's targets, which are soft: every detection counts as true and as false, with weights."""
    rng = np.random.default_rng(detections)
    z = rng.normal(-1, 2, detections)
    s = 1 / (1 + np.exp(-z))
    y = {"separable": z > 0, "drawn": rng.random(detections) < s, "all true": z == z, "none true": z != z}[truth]
    slope, shift = _logistic(s, y.astype(float), np.zeros(detections, np.int64), 1, Confidence("platt"))
    high, low = (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2)
    weight = np.where(y, high, low)
    twice, both = np.concatenate([z, z])[:, None], np.repeat([1, 0], detections)
    peer = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000)
    peer.fit(twice, both, sample_weight=np.concatenate([weight, 1 - weight]))
    assert slope[0, 0] == pytest.approx(max(peer.coef_[0, 0], 1e-2), rel=1e-3, abs=1e-4)
    assert shift[0, 0] == pytest.approx(peer.intercept_[0], rel=1e-3, abs=1e-3)


def test_groups_without_a_bond_have_maps_of_their_own() -> None:
    """A strength of 0 draws nothing towards the map of all, also where a group's scores separate right from wrong."""
    z = np.tile([-3.0, -1.0, 1.0, 3.0], 2)
    y, group = (z > 0).astype(float), np.repeat([0, 2], 4)
    slope, shift = _logistic(1 / (1 + np.exp(-z)), y, group, 3, Confidence("platt", "class", strength=0.0))
    one, other = _logistic(1 / (1 + np.exp(-z[:4])), y[:4], np.zeros(4, np.int64), 1, Confidence("platt"))
    np.testing.assert_allclose(slope[[0, 2], 0], one[0, 0], rtol=1e-4)
    np.testing.assert_allclose(shift[[0, 2], 0], other[0, 0], atol=1e-4)


@pytest.mark.parametrize("strength", [float("inf"), float("nan"), -1.0, 1e300])
def test_a_strength_is_a_number(strength: float) -> None:
    with pytest.raises(SettingError, match="strength"):
        Confidence("platt", "class", strength=strength)


def test_a_metric_that_does_not_exist_is_no_percentage() -> None:
    metrics = {"AP": 0.5, "AP4": -1.0}
    (_, rows), *_ = Before("c", metrics, metrics, [], []).tables()
    assert [(row["AP"], row["AP4"]) for row in rows] == [("50.00", "-")] * 2


def test_a_split_without_an_object_judges_no_head(tune: Cache) -> None:
    ids = tune.categories.category_id.tolist()
    document = {"images": [{"id": 1}], "categories": [{"id": k} for k in ids], "annotations": []}
    with pytest.raises(InputError, match="no object"):
        Assessment(tune, GroundTruth.from_document(document, style="coco"))


def test_a_class_with_few_detections_has_nearly_the_map_of_all() -> None:
    rng = np.random.default_rng(1)
    s = rng.random(5003)
    y = (rng.random(5003) < s).astype(float)
    group = np.where(np.arange(5003) < 5000, 0, 1)
    y[group == 1] = 1 - y[group == 1].round()
    for method in ("platt", "isotonic"):
        maps = (_logistic if method == "platt" else _isotonic)(s, y, group, 3, Confidence(method, "class"))
        at = torch.linspace(0.1, 0.9, 9, dtype=torch.float64).repeat(3, 1)
        form = "logistic" if method == "platt" else "knots"
        curve = apply(form, at, *(torch.from_numpy(m) for m in maps))
        assert (curve[1] - curve[0]).abs().max() < 0.12  # three detections
        assert (curve[2] - curve[0]).abs().max() < 0.05  # none


def test_what_cannot_be_is_refused(heads: list[Path], tune: Cache, tmp_path: Path) -> None:
    for wrong in ({"method": "beta"}, {"by": "image"}, {"target": "recall"}, {"strength": -1.0}):
        with pytest.raises(SettingError):
            Confidence(**wrong)
    with pytest.raises(ExistsError):
        calibrate(heads[0], tune, heads[1], Confidence())
    other = Toy(mode="test", seed=3).write(tmp_path / "other")
    with pytest.raises(InputError, match="fitted for detector"):
        calibrate(heads[0], other, tmp_path / "c", Confidence())


def test_the_commands_print_tables_and_json(home: Path, heads: list[Path], tmp_path: Path) -> None:
    both, cache = [str(h) for h in heads], ["--cache", str(home / "tune")]
    commands = [
        (["compare", *both, *cache, "--bootstrap", "10"], "agreement"),
        (["select", *both, *cache, "--out", str(tmp_path / "a")], "selected"),
        (["calibrate", "--head", both[0], *cache, "--out", str(tmp_path / "b"), "--judge", cache[1]], "D-ECE"),
        (["threshold", "--head", both[0], *cache, "--recall", "0.5", "--out", str(tmp_path / "c")], "missed by"),
    ]
    for command, word in commands:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0 and word in done.stdout, done.output
        more = [] if command[0] == "compare" else ["--overwrite"]
        again = CliRunner().invoke(app, [*command, *more, "--json"])
        assert again.exit_code == 0 and json.loads(again.stdout), again.output


def test_a_notebook_needs_ten_lines(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_cache, tune_cache = (calib.open_cache(home / s) for s in ("train", "tune"))
    head = calib.fit_head("natural", train_cache, tmp_path / "natural" / "1", steps=4, loop__warmup_steps=0)
    judged = calib.judge_head(head, tune_cache, max_detections=50)
    plan = {"methods": ("crt", "tau-norm"), "steps": 4, "seeds": 1, "finalists": 1}
    study = calib.tune_heads(home / "train", home / "tune", tmp_path / "s", "2", device="cpu", **plan)
    changes = calib.calibrate_head(study.head, tune_cache, tmp_path / "calibrated" / "1", method="platt")
    found = calib.compare_heads([tmp_path / "natural" / "1", study.head], tune_cache, replicates=10)
    for shown in (train_cache, head, judged, study, found, changes[0]):
        assert shown._repr_html_().startswith("<table>")
    assert judged.metrics["AP"] == judged.evaluation.summary()["AP"]
    assert "train natural: 100%" in capsys.readouterr().err
    assert calib.load_head(study.head).info.category_ids == head.info.category_ids
    with pytest.raises(AttributeError):
        _ = calib.nothing


def test_importing_calib_imports_no_torch() -> None:
    code = "import calib, sys; assert 'open_cache' in dir(calib); print({'torch', 'optuna'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
