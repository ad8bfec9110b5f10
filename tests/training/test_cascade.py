"""Heads of cascades: every method, fitted stage by stage, averaged as the detector averages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from calib.artifact import load
from calib.cache import Cache
from calib.decide.assess import Assessment
from calib.errors import UnsupportedError
from calib.heads.base import Head
from calib.heads.cascade import CascadeHead
from calib.heads.detector import detector_head
from calib.registry import METHODS
from calib.registry import load as load_target
from calib.score import detector_nms, score
from calib.settings import known_keys, with_overrides
from calib.training import train
from calib.training.context import FitContext
from calib.training.loop import Trainings
from calib.training.stages import fit_alone
from tests.toy import Toy

STAGES, D = 3, 8
WITHOUT_LOGITS = {"ncm"}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cache]:
    folder = tmp_path_factory.mktemp("cascades")
    return {a: Toy(stages=STAGES, average=a).write(folder / a) for a in ("probabilities", "logits")}


def quick(method: str) -> dict[str, Any]:
    keys = known_keys(load_target(METHODS[method].target)())
    short = {"steps": 4, "hidden": 5, "warmup_steps": 0, "lr": 0.1, "rows_per_step": 40}
    return {k: short[k.rpartition(".")[2]] for k in keys if k.rpartition(".")[2] in short}


def parts(features: Tensor) -> tuple[Tensor, ...]:
    return features.chunk(STAGES, dim=1)


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_are_averaged_over_heads_fitted_stage_by_stage(
    method: str, caches: dict[str, Cache], tmp_path: Path
) -> None:
    cache = caches["probabilities"]
    features = torch.randn(9, STAGES * D, generator=torch.Generator().manual_seed(1))
    artifact = train(method, cache, tmp_path / method / "1", quick(method))
    own = with_overrides(load_target(METHODS[method].target)(), quick(method))
    alone = [fit_alone(own, stage, FitContext()).eval() for stage in cache.stages]
    expected = torch.stack([h.full_scores(x) for h, x in zip(alone, parts(features), strict=True)]).mean(dim=0)
    if artifact.head.kind != "select":  # chooses whole rows by the averages
        torch.testing.assert_close(artifact.head.full_scores(features), expected, atol=1e-6, rtol=1e-5)
    again = load(tmp_path / method / "1").head
    assert torch.equal(again.full_scores(features), artifact.head.full_scores(features))
    assert again.scores(features[:0]).shape == (0, 7)
    logits = torch.randn(9, STAGES * 8)
    assert again.scores(features, logits).shape == (9, 7) and again.feature_size == STAGES * D


@pytest.mark.parametrize("method", METHODS)
def test_logits_are_averaged_or_the_reason_is_given(method: str, caches: dict[str, Cache], tmp_path: Path) -> None:
    if method in WITHOUT_LOGITS:
        with pytest.raises(UnsupportedError, match="averages the logits of its 3 stages"):
            train(method, caches["logits"], tmp_path / "1", quick(method))
        return
    head = train(method, caches["logits"], tmp_path / "1", quick(method)).head
    features = torch.randn(9, STAGES * D, generator=torch.Generator().manual_seed(1))
    for one in [m for m in head.modules() if isinstance(m, CascadeHead)]:
        stages = [h for h in one.heads if isinstance(h, Head)]
        if method == "tde":
            expected = sum(h.full_scores(x) for h, x in zip(stages, parts(features), strict=True)) / 3
        else:
            expected = stages[0].activate(
                torch.stack([h.raw(x) for h, x in zip(stages, parts(features), strict=True)]).mean(dim=0)
            )
        torch.testing.assert_close(one.full_scores(features), expected, atol=1e-6, rtol=1e-5)
    assert torch.isfinite(head.full_scores(features)).all()


def test_by_hand() -> None:
    """Two stages, one class: logits (0, 0) and (log 3, 0): probabilities 1/2 and 3/4; mean logit log(3)/2."""
    from calib.heads.linear import LinearClassifier, LinearHead

    heads = [LinearHead(LinearClassifier(torch.tensor([[w], [0.0]]))) for w in (0.0, float(np.log(3)))]
    x = torch.ones(1, 2)
    assert CascadeHead(heads, "probabilities").scores(x).item() == pytest.approx(5 / 8)
    assert CascadeHead(heads, "logits").scores(x).item() == pytest.approx(3**0.5 / (1 + 3**0.5))


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_scoring_reads_every_stage_and_boxes_of_the_last(average: str, tmp_path: Path) -> None:
    cache = Toy(stages=STAGES, average=average, mode="test").write(tmp_path / "c")
    head, nms = detector_head(cache), detector_nms(cache)
    results = list(score(cache, head, nms))
    z = np.stack([s.logits.read(0, s.n_rows) for s in cache.stages if s.logits is not None]).astype(np.float64)

    def softmax(logits: Any) -> Any:
        e = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    expected = softmax(z).mean(axis=0) if average == "probabilities" else softmax(z.mean(axis=0))
    boxes = np.stack(cache.stages[-1].meta("refined_x1", "refined_y1", "refined_x2", "refined_y2"), axis=1)
    for i, result in enumerate(results):
        start, d = cache.image_start[i], result.detections
        assert np.allclose(d.score, expected[start + d.row, d.category], atol=1e-6)
        assert np.allclose(d.box, boxes[start + d.row], atol=1e-4)
    assessment = Assessment(cache)
    assert np.array_equal(assessment.predicted(head), expected.argmax(axis=1))
    metrics = assessment.proposal_metrics(head, nms)
    assert metrics["nACC"] == int((cache.stages[0].labels >= 0).sum())
    assessment.evaluator.evaluate(assessment.found(head, nms), max_detections=nms.max_detections)


def test_one_pass_trains_what_the_methods_alone_would(caches: dict[str, Cache], tmp_path: Path) -> None:
    cache, settings = caches["probabilities"], {"steps": 4, "lr": 0.1}
    notes: list[str] = []
    together = train(["natural", "disalign"], cache, tmp_path / "m", settings, note=notes.append)
    assert [n for n in notes if "one pass for" in n] == [notes[0]] * STAGES
    for method, artifact in together.items():
        alone = train(method, cache, tmp_path / "alone" / method, settings)
        for name, tensor in alone.head.state_dict().items():
            assert torch.equal(tensor, artifact.head.state_dict()[name]), name


def test_an_interrupted_fit_goes_on_with_the_stage_it_was_in(caches: dict[str, Cache], tmp_path: Path) -> None:
    cache, stopped = caches["logits"], 1
    settings = with_overrides(load_target(METHODS["natural"].target)(), {"steps": 4})

    class Stopping:
        """Natural, interrupted when it comes to stage ``stopped``."""

        fitted: ClassVar[list[str]] = []
        stops = True

        def fit(self, own: Cache, context: FitContext) -> Trainings[Head]:
            if self.stops and own is cache.stages[stopped]:
                raise KeyboardInterrupt
            self.fitted.append(own.digest)
            return (yield from settings.fit(own, context))

    method, run = Stopping(), FitContext(checkpoint=tmp_path / "training")
    with pytest.raises(KeyboardInterrupt):
        fit_alone(method, cache, run)
    method.stops = False
    again = FitContext(checkpoint=tmp_path / "training")
    head = fit_alone(method, cache, again)
    assert method.fitted == [s.digest for s in cache.stages]
    whole = FitContext()
    expected = fit_alone(settings, cache, whole)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, head.state_dict()[name]), name
    assert again.losses == whole.losses and [s for s, _ in whole.losses].count(0) == STAGES


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stage_learns_with_the_weight_of_its_loss(precision: str, tmp_path: Path) -> None:
    """Without decay a loss of half the weight is half the rate."""
    changes = {"steps": 3, "warmup_steps": 0, "weight_decay": 0, "clip_norm": 0, "precision": precision}
    plain = Toy(stages=2).write(tmp_path / "c")
    manifest = json.loads((plain.path / "manifest.json").read_text())
    manifest["detector"]["settings"] = {"stage_loss_weights": [1.0, 0.5]}
    (plain.path / "manifest.json").write_text(json.dumps(manifest))

    def trained(cache: Cache, lr: float) -> list[Tensor]:
        head = fit_alone(
            with_overrides(load_target(METHODS["natural"].target)(), changes | {"lr": lr}), cache, FitContext()
        )
        return [head.state_dict()[f"heads.{k}.classifier.weight"] for k in range(2)]

    weighted, same, half = trained(Cache(plain.path), 0.1), trained(plain, 0.1), trained(plain, 0.05)
    assert torch.equal(weighted[0], same[0]) and not torch.equal(weighted[1], same[1])
    torch.testing.assert_close(weighted[1], half[1])


def test_heads_of_one_stage_and_of_another_detector_are_refused(
    caches: dict[str, Cache], tmp_path: Path, fails: Callable[..., str]
) -> None:
    test = Toy(stages=STAGES, mode="test").write(tmp_path / "c")
    with pytest.raises(UnsupportedError, match="3 stages of 8 features"):
        list(score(test, detector_head(test.stages[0]), detector_nms(test)))
    train("softmax", Toy().write(tmp_path / "one"), tmp_path / "head" / "1")
    said = fails("evaluate", "--cache", test.path, "--head", tmp_path / "head" / "1", "--out", tmp_path / "r")
    assert "was fitted for detector" in said


@pytest.mark.parametrize(("average", "to"), [("probabilities", "torch"), ("logits", "onnx")])
def test_graphs_take_the_features_of_all_stages_and_a_module_is_refused(
    average: str,
    to: str,
    caches: dict[str, Cache],
    tmp_path: Path,
    calib: Callable[..., Any],
    fails: Callable[..., str],
) -> None:
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    cache = caches[average]
    train("softmax", cache, tmp_path / "head" / "1")
    done = calib(
        *("export", tmp_path / "head" / "1", "--cache", cache.path, "--to", to, "--out", tmp_path / f"h.{to}"),
        "--json",
    )
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads(done.stdout)["largest_difference"] < 1e-6
    said = fails(
        "export", tmp_path / "head" / "1", "--cache", cache.path, "--to", "module", "--out", tmp_path / "m.pt2"
    )
    assert "has one per stage" in said


@pytest.mark.parametrize(
    ("average", "framework", "group"),
    [
        ("probabilities", "detectron2", "roi_heads.box_predictor.{}.cls_score"),
        ("logits", "mmdet", "roi_head.bbox_head.{}.fc_cls"),
    ],
)
def test_linear_heads_are_folded_into_every_stage(
    average: str,
    framework: str,
    group: str,
    caches: dict[str, Cache],
    tmp_path: Path,
    calib: Callable[..., Any],
    fails: Callable[..., str],
) -> None:
    cache = caches[average]
    state = {}
    for k, c in enumerate(cache.classifier.stages):
        assert c.bias is not None
        state |= {
            f"{group.format(k)}.weight": torch.from_numpy(c.weight),
            f"{group.format(k)}.bias": torch.from_numpy(c.bias),
        }
    torch.save({"state_dict": state}, tmp_path / "d.pth")
    head = train("crt", cache, tmp_path / "crt" / "1", quick("crt")).head
    given = (
        "--cache",
        cache.path,
        "--to",
        framework,
        "--checkpoint",
        tmp_path / "d.pth",
        "--out",
        tmp_path / "new.pth",
    )
    done = calib("export", tmp_path / "crt" / "1", *given, "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    told = json.loads(done.stdout)
    assert told["largest_difference"] < 1e-6 and told["layer"].split(", ") == [group.format(k) for k in range(STAGES)]
    again = torch.load(tmp_path / "new.pth", weights_only=True)["state_dict"]
    for k in range(STAGES):
        assert torch.equal(again[f"{group.format(k)}.weight"], head.state_dict()[f"heads.{k}.classifier.weight"])
    train("simcal", cache, tmp_path / "simcal" / "1", quick("simcal"))
    assert "columns come from two heads" in fails("export", tmp_path / "simcal" / "1", *given)
    done = calib("export", tmp_path / "simcal" / "1", *given, "--part", "tail")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "leave --layer out" in fails("export", tmp_path / "crt" / "1", *given, "--layer", group.format(0))
