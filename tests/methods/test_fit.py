"""What each head is at the limits of its parameters, and numbers worked by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.aligned import AlignedHead, align
from calib.heads.combine import AverageHead, DualHead, SelectHead, select_rows
from calib.heads.detector import detector_head
from calib.heads.group import GroupHead
from calib.heads.linear import LinearClassifier, LinearHead
from calib.methods.bags import Bags
from calib.methods.crt import CRT
from calib.methods.disalign import DisAlign
from calib.methods.natural import Natural
from calib.methods.simcal import SimCal
from calib.methods.softmax import Softmax
from calib.methods.tau_norm import TauNorm, tau_normalised
from calib.settings import Loop, with_overrides
from calib.training.context import FitContext
from calib.training.optimizer import learning_rate
from calib.training.stages import fit_alone

from ..toy import Toy
from .conftest import still


def test_softmax_is_the_softmax_of_the_detectors_logits(cache: Cache, features: Tensor) -> None:
    head = fit_alone(Softmax(), cache, FitContext())
    wanted = torch.from_numpy(cache.classifier.logits(features.numpy())).softmax(dim=1)[:, :-1]
    torch.testing.assert_close(head.scores(features), wanted)
    logits = torch.randn(40, 8)
    assert torch.equal(head.scores(features, logits), logits.softmax(dim=1)[:, :-1])


@pytest.mark.parametrize("method", [TauNorm(tau=0.0), TauNorm(tau=0.0, select="foreground"), still(Natural())])
def test_the_limit_is_the_detector(method: Natural, cache: Cache, features: Tensor) -> None:
    ours = fit_alone(method, cache, FitContext()).eval().scores(features)
    torch.testing.assert_close(ours, detector_head(cache).scores(features))


def test_disalign_starts_as_the_detector(cache: Cache, features: Tensor) -> None:
    for form in ("eq5", "eq6"):
        head = AlignedHead(LinearClassifier.of(cache.classifier), form, detector_logits=True)
        head.reset(torch.Generator().manual_seed(0))
        torch.testing.assert_close(head.scores(features), detector_head(cache).scores(features))


def test_disalign_by_hand() -> None:
    # s = 1/4, z = 2, alpha = 3, beta = 1. Eq. 5: 1/4 (6 + 1) + 3/4 2 = 3.25. Eq. 6: (1 + 3/4) 2 + 1/4 = 3.75.
    z, s, alpha, beta = torch.tensor([[2.0]]), torch.tensor([[0.25]]), torch.tensor([3.0]), torch.tensor([1.0])
    assert align(z, s, alpha, beta, "eq5").item() == 3.25
    assert align(z, s, alpha, beta, "eq6").item() == 3.75


def test_disalign_leaves_background_and_classifier_alone(cache: Cache, features: Tensor) -> None:
    head = fit_alone(
        with_overrides(DisAlign(), {"loop.steps": 5, "loop.lr": 0.5, "loop.warmup_steps": 0}), cache, FitContext()
    )
    assert isinstance(head, AlignedHead)
    assert np.array_equal(head.classifier.weight.numpy(force=True), cache.classifier.weight)
    z = head.classifier(features)
    assert torch.equal(head.aligned(features)[:, -1], z[:, -1])
    assert not torch.equal(head.aligned(features)[:, 0], z[:, 0])


def test_tau_one_gives_every_class_weights_of_norm_one_and_keeps_background_and_bias(cache: Cache) -> None:
    head = fit_alone(TauNorm(tau=1.0), cache, FitContext())
    assert isinstance(head, LinearHead) and head.classifier.bias is not None
    norms = head.classifier.weight.norm(dim=1)
    torch.testing.assert_close(norms[:-1], torch.ones(7))
    assert np.array_equal(head.classifier.weight[-1].numpy(force=True), cache.classifier.weight[-1])
    assert np.array_equal(head.classifier.bias.numpy(force=True), cache.classifier.bias)


def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    # |(3, 4)| = 5, 5^0.5: divided by 2.236...
    torch.testing.assert_close(tau_normalised(weight, 0.5), torch.tensor([[0.0, 0.0], [3.0, 4.0]]) / 5**0.5)


def test_select_takes_whole_rows() -> None:
    original = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.5, 0.4, 0.1]])
    normalised = torch.tensor([[0.1, 0.8, 0.1], [0.8, 0.1, 0.1], [0.9, 0.05, 0.05]])
    # Row 1 is background for the detector; row 2's normalised arg-max is not eligible.
    foreground = select_rows(original, normalised, None)
    assert torch.equal(foreground, torch.stack([normalised[0], original[1], normalised[2]]))
    tail = select_rows(original, normalised, torch.tensor([False, True]))
    assert torch.equal(tail, torch.stack([normalised[0], original[1], original[2]]))


@pytest.mark.parametrize(("below", "eligible"), [(0, []), (12, [4, 5, 6]), (13, [3, 4, 5, 6]), (10_000, range(7))])
def test_select_tail_means_strictly_fewer_instances(below: int, eligible: range, cache: Cache) -> None:
    head = fit_alone(TauNorm(select="tail", tail_below=below), cache, FitContext())
    assert isinstance(head, SelectHead) and head.eligible is not None
    assert torch.nonzero(head.eligible).flatten().tolist() == list(eligible)


@pytest.mark.parametrize(("threshold", "tail"), [(0, [6]), (5, [4, 5, 6]), (12, [3, 4, 5, 6]), (10_000, range(7))])
def test_simcal_uses_the_calibrated_head_up_to_the_threshold(
    threshold: int, tail: range, cache: Cache, features: Tensor
) -> None:
    method = with_overrides(SimCal(threshold=threshold, classes_per_step=3), {"loop.steps": 20, "loop.lr": 0.5})
    head = fit_alone(method, cache, FitContext())
    assert isinstance(head, DualHead)
    full, calibrated = head.full_scores(features), head.tail.full_scores(features)
    original = detector_head(cache).full_scores(features)
    rest = [k for k in range(7) if k not in tail]
    torch.testing.assert_close(full[:, list(tail)], calibrated[:, list(tail)])
    torch.testing.assert_close(full[:, [*rest, 7]], original[:, [*rest, 7]])
    assert not torch.allclose(calibrated, original)


def test_simcal_average_is_the_mean_of_both(cache: Cache, features: Tensor) -> None:
    head = fit_alone(
        with_overrides(SimCal(inference="average"), {"loop.steps": 5, "loop.lr": 0.5}), cache, FitContext()
    )
    assert isinstance(head, AverageHead)
    both = [h.full_scores(features) for h in (head.one, head.other)]
    torch.testing.assert_close(head.full_scores(features), (both[0] + both[1]) / 2)


def test_bags_with_one_group_and_all_others_learns_the_data(cache: Cache) -> None:
    """One group of all classes and every other row sampled is a softmax with `others`: it fits what it is shown."""
    loop = {"loop.steps": 300, "loop.lr": 0.5, "loop.warmup_steps": 0}
    head = fit_alone(with_overrides(Bags(edges=(), beta=1e6), loop), cache, FitContext())
    assert isinstance(head, GroupHead) and len(head.slices) == 2
    rows = np.flatnonzero((cache.labels >= 0) & (cache.labels < cache.background))
    scores = head.scores(torch.from_numpy(cache.features.take(rows)))
    right = (scores.argmax(dim=1).numpy() == cache.labels[rows]).mean()
    detector = detector_head(cache).scores(torch.from_numpy(cache.features.take(rows))).argmax(dim=1).numpy()
    assert right > max(0.9, (detector == cache.labels[rows]).mean())


@pytest.mark.parametrize("method", [Natural(), CRT(rows_per_step=60), SimCal(threshold=10_000), DisAlign(), Bags()])
def test_training_lowers_its_own_loss(method: Natural, cache: Cache) -> None:
    run = FitContext()
    fit_alone(with_overrides(method, {"loop.steps": 200, "loop.lr": 0.2, "loop.warmup_steps": 0}), cache, run)
    assert run.losses[-1][1] < run.losses[0][1]


def test_balanced_heads_find_rare_classes_that_the_control_misses(tmp_path: Path) -> None:
    """The point of the product, on data where it is decided: overlapping classes, 200 to 1."""
    cache = Toy(counts=(3000, 3), feature_size=2, images=40, most=600, seed=5).write(tmp_path / "cache")
    loop = {"loop.steps": 300, "loop.lr": 0.2, "loop.warmup_steps": 0}
    balanced = fit_alone(with_overrides(CRT(rows_per_step=60), loop), cache, FitContext())
    natural = fit_alone(with_overrides(Natural(), loop), cache, FitContext())
    x = torch.from_numpy(cache.features.take(np.flatnonzero(cache.labels == 1)))
    assert balanced.scores(x)[:, 1].mean() > natural.scores(x)[:, 1].mean()


def test_the_rate_by_hand() -> None:
    loop = Loop(steps=100, lr=1.0, milestones=(0.6, 0.9), warmup_steps=10, warmup_factor=0.1)
    # Warm-up: step 0 at the factor, step 5 half way between 0.1 and 1; then 1, 0.1 from step 60, 0.01 from step 90.
    rates = [learning_rate(loop, s) for s in (0, 5, 10, 59, 60, 90, 99)]
    assert rates == pytest.approx([0.1, 0.55, 1, 1, 0.1, 0.01, 0.01])
    cosine = replace(loop, schedule="cosine", warmup_steps=0)
    assert [learning_rate(cosine, s) for s in (0, 50, 100)] == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: TauNorm(tau=-1),
        lambda: TauNorm(select="some"),
        lambda: SimCal(form="conv"),
        lambda: Bags(edges=(100, 10)),
        lambda: Bags(beta=-1),
        lambda: DisAlign(parametrisation="eq7"),
        lambda: CRT(background_share=1.0),
        lambda: Loop(steps=0),
        lambda: Loop(lr=float("nan")),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(SettingError):
        make()
