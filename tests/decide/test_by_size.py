"""Confidence maps by box size: how they are fitted, where they act, and what they cannot do."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from calib.artifact import load
from calib.boxes import area
from calib.cache import Cache
from calib.cli.main import app
from calib.decide.assess import Assessment
from calib.decide.compose import combine
from calib.decide.confidence import Confidence, _logistic, calibrate, fitted, sizes_of
from calib.decide.per_class import set_thresholds
from calib.errors import SettingError, UnsupportedError
from calib.export.export import Export, export
from calib.heads.by_size import BySizeHead
from calib.heads.calibrated import CalibratedHead, apply
from calib.score import detector_nms
from calib.score.by_size import by_size
from calib.score.scorer import Scorer
from calib.server.formats.outputs import Wanted, detections
from calib.training import train

from ..toy import Toy


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    cache = Toy().write(folder / "train")
    Toy(mode="test", most=40, images=20).write(folder / "tune")
    train("softmax", cache, folder / "softmax" / "1")
    train("natural", cache, folder / "natural" / "1", {"steps": 30, "warmup_steps": 0, "lr": 0.1})
    return folder


@pytest.fixture(scope="module")
def tune(home: Path) -> Cache:
    return Cache(home / "tune")


@pytest.fixture(scope="module")
def mapped(home: Path, tune: Cache) -> BySizeHead:
    head, _ = calibrate(home / "softmax" / "1", tune, home / "mapped" / "1", Confidence(by="size", strength=10.0))
    assert isinstance(head.head, BySizeHead)
    return head.head


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic", "histogram"])
def test_every_map_mends_the_errors(method: str, home: Path, tune: Cache, tmp_path: Path) -> None:
    how = Confidence(method, "size", strength=1.0)
    artifact, (change,) = calibrate(home / "softmax" / "1", tune, tmp_path / "1", how)
    assert change.after["D-ECE"] < change.before["D-ECE"]
    head, again = artifact.head, load(tmp_path / "1").head
    assert isinstance(head, BySizeHead) and isinstance(again, BySizeHead) and len(head.edges) == 3
    scores, areas = torch.rand(99), 10 ** (4 * torch.rand(99))
    found = head.mapped(scores, areas)
    assert torch.equal(again.mapped(scores, areas), found) and 0 <= found.min() <= found.max() <= 1
    assert artifact.info.settings["confidence"]["by"] == "size"


@pytest.mark.parametrize(
    "how", [Confidence(by="size", sizes=1), Confidence(by="size", strength=1e9)], ids=["one", "far"]
)
def test_maps_of_one_size_and_those_drawn_to_it_are_that_of_all(how: Confidence, home: Path, tune: Cache) -> None:
    assessment, nms, inner = Assessment(tune), detector_nms(tune), load(home / "softmax" / "1").head
    pooled = fitted(inner, assessment, nms, Confidence())
    sized = fitted(inner, assessment, nms, how)
    assert isinstance(pooled, CalibratedHead) and isinstance(sized, BySizeHead)
    s = torch.linspace(0, 1, 50)
    expected = apply("logistic", s[None], pooled.one, pooled.two)[0]
    for side in (5.0, 20.0, 30.0, 90.0):
        torch.testing.assert_close(sized.mapped(s, torch.full_like(s, side**2)), expected, atol=1e-4, rtol=1e-3)


def test_sizes_are_equal_numbers_of_boxes() -> None:
    rng = np.random.default_rng(0)
    areas = np.exp(rng.normal(6, 2, 1000))
    edges, size = sizes_of(areas, 5)
    assert np.bincount(size).tolist() == [200] * 5 and (np.diff(edges) > 0).all()
    assert sizes_of(np.full(9, 100.0), 5)[1].tolist() == [1] * 9  # one area: nothing to divide


def test_maps_find_what_small_boxes_score_too_high() -> None:
    """Detections are true with probability sigmoid(z) where they are large, sigmoid(z - 2) where they are small."""
    rng = np.random.default_rng(0)
    z, small = rng.normal(-1, 2, 40_000), rng.integers(0, 2, 40_000)
    true = (rng.random(len(z)) < 1 / (1 + np.exp(2 * small - z))).astype(float)
    slope, shift = _logistic(1 / (1 + np.exp(-z)), true, small, 2, Confidence("platt", "size"))
    np.testing.assert_allclose(slope[:, 0], 1, atol=0.05)
    np.testing.assert_allclose(shift[:, 0], [0, -2], atol=0.1)


def test_detections_are_mapped_behind_suppression_and_put_in_order(mapped: BySizeHead, tune: Cache) -> None:
    scorer, nms = Scorer(tune), detector_nms(tune)
    turned = 0
    for i in range(len(scorer)):
        plain, sized = scorer.image(i, [(mapped.inner, nms), (mapped, nms)])
        a, b = plain.detections, sized.detections
        expected = mapped.mapped(torch.from_numpy(a.score), torch.from_numpy(area(a.box))).numpy()
        order = np.argsort(-expected, kind="stable")
        assert np.array_equal(b.score, expected[order]) and np.array_equal(b.box, a.box[order])
        assert np.array_equal(b.row, a.row[order]) and np.array_equal(b.category, a.category[order])
        assert np.array_equal(sized.roi_id, plain.roi_id[order])
        assert np.array_equal(scorer.scores(i, mapped), scorer.scores(i, mapped.inner))
        turned += int((order != np.arange(len(order))).any())
    assert turned > 0
    nothing = replace(a, row=a.row[:0], category=a.category[:0], score=a.score[:0], box=a.box[:0])
    assert by_size(mapped, nothing) is nothing and by_size(mapped.inner, a) is a


def test_the_service_maps_as_scoring_does(mapped: BySizeHead, tune: Cache) -> None:
    scorer, nms = Scorer(tune), detector_nms(tune)
    (offline,) = scorer.image(0, [(mapped, nms)])
    asked = Wanted(nms=nms, topk=1, score_dtype="FP32")
    scores, boxes = scorer.scores(0, mapped), scorer.boxes(0)
    found = detections(mapped, scores, boxes, np.array([0, len(scores)]), asked, 0.0, lambda: None)
    arrays = list(found.values())
    assert np.array_equal(arrays[1], offline.detections.score) and np.array_equal(arrays[0], offline.detections.box)


def test_what_cannot_be_is_refused(home: Path, tune: Cache, mapped: BySizeHead, tmp_path: Path) -> None:
    head = home / "mapped" / "1"
    with pytest.raises(UnsupportedError, match="maps detections"):
        combine("average", head, home / "natural" / "1", tmp_path / "a")
    with pytest.raises(UnsupportedError, match="maps detections"):
        set_thresholds(head, tune, tmp_path / "b", recall=0.5)
    with pytest.raises(UnsupportedError, match="maps detections"):
        calibrate(head, tune, tmp_path / "c", Confidence())
    with pytest.raises(UnsupportedError, match="act on detections"):
        export(head, home / "train", tmp_path / "d.pt2", Export("torch"))
    for wrong in ({"method": "histogram"}, {"sizes": 0}, {"score_bins": 0}, {"by": "area"}):
        with pytest.raises(SettingError):
            Confidence(**wrong)
    assert not list(tmp_path.iterdir())


def test_the_command(home: Path, tmp_path: Path) -> None:
    options = ["--head", str(home / "softmax" / "1"), "--cache", str(home / "tune"), "--out", str(tmp_path / "1")]
    sizes = ["--method", "histogram", "--by", "size", "--sizes", "3", "--score-bins", "5", "--json"]
    done = CliRunner().invoke(app, ["calibrate", *options, *sizes])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["caches"][0]["after"]["AP"] > 0
    head = load(tmp_path / "1").head
    assert isinstance(head, BySizeHead) and len(head.one) == 3
    assert CliRunner().invoke(app, ["calibrate", *options, "--method", "histogram", "--overwrite"]).exit_code == 2
