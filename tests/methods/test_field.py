"""Methods of the field beside those of test_fit.py: what they are at the limits of their settings, and their pieces."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from calib.artifact import load
from calib.cache import Cache
from calib.errors import FormatError, MissingFileError, NonFiniteError, SettingError, ShapeError
from calib.heads.affine import AffineHead
from calib.heads.detector import detector_head
from calib.heads.text import TextHead
from calib.losses.gumbel import drop_weights, tail_ratio
from calib.losses.pairwise import error_probability, pairwise_margins
from calib.losses.sigmoid import ecm_shift, equalized_focal, one_hot, sigmoid_focal_values
from calib.losses.softmax import chunk_mean, chunk_weights
from calib.methods.bacl import BACL
from calib.methods.ecm import ECM
from calib.methods.efl import EFL
from calib.methods.gol import GOL
from calib.methods.iif import IIF
from calib.methods.loce import LOCE, MeanScores
from calib.methods.natural import Natural
from calib.methods.text import Text, hashed_names
from calib.parallel.distributed import ALONE, World
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, with_overrides
from calib.training import train
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.gaussians import RunningGaussians
from calib.training.memory import FeatureMemory
from calib.training.stages import fit_alone

from ..toy import Toy
from .conftest import still


@pytest.mark.parametrize("method", [IIF(strength=0.0), still(IIF(strength=0.0, when="loss"))], ids=["posthoc", "loss"])
def test_iif_without_strength_is_the_detector(method: IIF, cache: Cache, features: Tensor) -> None:
    ours = fit_alone(method, cache, FitContext()).scores(features)
    torch.testing.assert_close(ours, detector_head(cache).scores(features))


def test_iif_multiplies_by_the_logarithm_of_inverse_frequency(tmp_path: Path, features: Tensor) -> None:
    cache = Toy(counts=(7, 3, 1), images=9).write(tmp_path / "cache")
    head = fit_alone(IIF(), cache, FitContext())
    assert isinstance(head, AffineHead)
    # Nine images, of which as many have the class as it has objects.
    expected = torch.tensor([*np.log(9 / np.array([7, 3, 1])), 1.0], dtype=torch.float32)
    torch.testing.assert_close(head.scale, expected)
    z = torch.from_numpy(cache.classifier.logits(features.numpy()))
    torch.testing.assert_close(head.full_scores(features), (expected * z).softmax(dim=1))


def first_loss(method: object, cache: Cache) -> float:
    """The loss of the first step."""
    run = FitContext()
    fit_alone(still(method), cache, run)
    return run.losses[0][1]


def first_rows(cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels and chunks of the first step of natural sampling."""
    step = InstanceSampler(cache, ImageBatches(), seed=0).step(0)
    labels = torch.from_numpy(cache.labels[step.rows].astype(np.int64))
    return torch.from_numpy(cache.features.take(step.rows)), labels, torch.from_numpy(step.chunk)


def test_ecm_without_margins_and_weights_is_binary_cross_entropy_of_twice_the_logits(cache: Cache) -> None:
    method = with_overrides(ECM(power=0.0, weighted=False, tau=0.0), {"sampling": "natural"})
    head = fit_alone(still(method), cache, FitContext())
    x, y, chunk = first_rows(cache)
    z = 2 * head.classifier(x)
    values = functional.binary_cross_entropy_with_logits(z, one_hot(y, 8), reduction="none").sum(dim=1)
    assert first_loss(method, cache) == pytest.approx(float(chunk_mean(values, chunk, 8)), rel=1e-5)


def test_ecm_moves_the_threshold_to_the_share_of_a_class(cache: Cache) -> None:
    """At power 1 what is learned is the log odds over those of the counts: a constant logit means any class alike."""
    counts = ECM().counts(cache)
    assert counts[-1] == pytest.approx(6.3313 * float(counts[:-1].sum()))
    torch.testing.assert_close(ecm_shift(counts, 1.0), (counts / counts.sum()).logit().float())
    rows = ECM(background_ratio=None).counts(cache)
    foreground = float(((cache.labels >= 0) & (cache.labels < cache.background)).sum())
    assert rows[-1] / rows[:-1].sum() == pytest.approx(float((cache.labels == cache.background).sum()) / foreground)


def test_efl_without_scale_is_the_sigmoid_focal_loss_over_foreground_rows(cache: Cache) -> None:
    head = fit_alone(still(EFL(scale=0.0)), cache, FitContext())
    x, y, chunk = first_rows(cache)
    values = sigmoid_focal_values(head.classifier(x), y, 2.0, 0.25)
    total = chunk_weights((y < 7).float(), chunk, 8)
    expected = float(chunk_mean(values, chunk, 8, total=total))
    assert first_loss(EFL(scale=0.0), cache) == pytest.approx(expected, rel=1e-5)
    assert first_loss(EFL(), cache) == pytest.approx(expected, rel=1e-5)  # balanced before the first step


def test_efl_knows_its_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    z, target = torch.randn(9, 4, generator=g, dtype=torch.double), (torch.rand(9, 4, generator=g) < 0.4).double()
    z.requires_grad_()
    values, gradient = equalized_focal(z, target, torch.tensor([2.0, 3.0, 5.5, 10.0]), 2.0, 0.25)
    values.sum().backward()
    torch.testing.assert_close(gradient, z.grad.abs() if z.grad is not None else None)


def test_gol_leaves_out_what_it_says() -> None:
    labels, tail = torch.tensor([0, 2, 3, 3]), torch.tensor([True, False, True])
    ratio = tail_ratio(labels, tail, torch.tensor([0, 0, 0, 1]), 2)
    assert ratio.tolist() == [1.0, 1.0, 1.0, 1.0]  # both foreground rows of chunk 0 are tail; chunk 1 has none
    half = torch.full((4,), 0.5)
    uniform = torch.tensor([[0.9, 0.9, 0.9], [0.0, 0.0, 0.0], [0.4, 0.9, 0.6], [0.5, 0.5, 0.5]])
    kept = drop_weights(labels, tail, half, uniform)
    assert kept.tolist() == [[1, 1, 0], [0, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert torch.equal(drop_weights(labels, torch.zeros(3, dtype=torch.bool), half, uniform), torch.ones(4, 3))


def test_gol_without_tail_is_binary_cross_entropy_of_the_gumbel_activation(cache: Cache) -> None:
    x, y, chunk = first_rows(cache)
    losses = []
    for method in (GOL(tail_share=0.0), GOL(tail_share=1.0, masking="none")):
        natural = with_overrides(method, {"sampling": "natural"})
        head = fit_alone(still(natural), cache, FitContext())
        p = head.scores(x).double()
        values = functional.binary_cross_entropy(p, one_hot(y, 7).double(), reduction="none").sum(dim=1)
        losses.append(first_loss(natural, cache))
        assert losses[-1] == pytest.approx(float(chunk_mean(values, chunk, 8)), rel=1e-5)
    assert first_loss(with_overrides(GOL(tail_share=1.0), {"sampling": "natural"}), cache) < losses[0]


def test_a_gumbel_head_is_a_base(cache: Cache, features: Tensor, tmp_path: Path) -> None:
    short = {"steps": 30, "warmup_steps": 0, "lr": 1.0}
    base = train("gol", cache, tmp_path / "base", short)
    head = train("fracal", cache, tmp_path / "1", {"strength": 0.0, "shift": "none"}, base=base).head
    p = base.head.scores(features)
    spread = torch.tensor(1 / 7).log10() - torch.tensor(1 / 7).log10()  # equal dimensions: q = 1 / C
    torch.testing.assert_close(head.scores(features), p * (p.logit() + spread).sigmoid(), atol=1e-6, rtol=1e-4)


def test_loce_whose_scores_do_not_move_is_the_control(cache: Cache, features: Tensor) -> None:
    loop = {"steps": 5, "lr": 0.1, "warmup_steps": 0, "sampling": "natural"}
    method = with_overrides(LOCE(momentum=1.0, draw_classes=0), loop | {"milestones": (2 / 3, 11 / 12)})
    head = fit_alone(method, cache, FitContext())
    natural = fit_alone(with_overrides(Natural(), loop), cache, FitContext())
    torch.testing.assert_close(head.scores(features), natural.scores(features))


def test_mean_scores_count_objects_and_drawn_classes_once() -> None:
    """Two objects of class 0 (scores 0.2, 0.4 and 0.6), one of class 1 (0.5), class 1 drawn in both chunks (0.1, 0.3
    and 0.9); the last row is background."""
    p = torch.tensor([0.2, 0.4, 0.6, 0.5, 0.7, 0.1, 0.3, 0.9])
    y = torch.tensor([0, 0, 0, 1, 2, 1, 1, 1])
    z = torch.where(torch.arange(3) == y[:, None], p[:, None], (1 - p[:, None]) / 2).log()
    chunk = torch.tensor([0, 0, 0, 1, 1, 0, 0, 1])
    batch = Batch(0, torch.zeros(8, 1), y, chunk, 2, rows=np.arange(5), added=(3,))
    scores = MeanScores(2, 0.5, 0.01, 0.1)
    scores.observe(z, batch, np.array([7, 7, 8, 9, -1]))
    first, second = (0.3 + 0.6) / 2, (0.5 + 0.2 + 0.9) / 3
    expected = [0.25 * 0.01 + 0.75 * first, 0.125 * 0.01 + 0.875 * second, 0.1]
    assert scores.mean.tolist() == pytest.approx(expected)


def test_a_memory_holds_rows_of_the_class_and_draws_all_of_them(cache: Cache) -> None:
    memory = FeatureMemory(cache, 3, 0, torch.device("cpu"))
    labels = torch.arange(7).repeat_interleave(40)[: 40 * 6]  # the last class has no row
    assert memory.count.tolist() == [*np.minimum(np.bincount(cache.labels[cache.labels >= 0], minlength=8)[:6], 3), 0]
    drawn = memory.draw(labels, torch.Generator().manual_seed(0), ALONE).numpy()
    for c in range(6):
        own = {x.tobytes() for x in cache.features.take(np.flatnonzero(cache.labels == c))}
        found = {x.tobytes() for x in drawn[labels.numpy() == c]}
        assert found <= own and len(found) == int(memory.count[c])


def test_bacl_without_margins_weights_and_features_is_binary_cross_entropy(cache: Cache) -> None:
    x, y, chunk = first_rows(cache)
    plain = BACL(alpha=0.0, threshold=0.0, begin=0.0, draw_classes=0)
    head = fit_alone(still(plain), cache, FitContext())
    z = head.classifier(x)
    values = functional.binary_cross_entropy_with_logits(z, one_hot(y, 8), reduction="none").sum(dim=1)
    expected = float(chunk_mean(values, chunk, 8))
    assert first_loss(plain, cache) == pytest.approx(expected, rel=1e-5)
    assert first_loss(BACL(begin=1.0), cache) == pytest.approx(expected, rel=1e-5)


def test_bacl_moves_a_class_away_from_what_it_is_taken_for() -> None:
    """Class 0 is taken for class 1 in 0.4 of its rows, class 1 for class 0 in 0.1: of class 0's rows z_1 is raised."""
    matrix = torch.tensor([[0.6, 0.4], [0.1, 0.9]])
    margins = pairwise_margins(matrix, torch.tensor([0, 1, 2]), 1.0)
    log4 = float(np.log(4.0))
    torch.testing.assert_close(margins, torch.tensor([[0.0, log4, 0.0], [-log4, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(error_probability(matrix), torch.tensor([0.8, 0.2]))


def test_hallucinated_features_have_the_mean_and_the_variance_of_their_class(cache: Cache) -> None:
    gaussians = RunningGaussians(7, 8, 0.1)
    rows = np.flatnonzero(cache.labels >= 0)
    x, y = torch.from_numpy(cache.features.take(rows)), torch.from_numpy(cache.labels[rows].astype(np.int64))
    gaussians.update(x, y, y, ALONE)
    assert gaussians.seen.tolist() == [True] * 6 + [False]
    drawn = gaussians.draw(torch.zeros(20_000, dtype=torch.long), torch.Generator().manual_seed(0), ALONE)
    own = x[y == 0]
    torch.testing.assert_close(drawn.mean(dim=0), own.mean(dim=0), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.var(dim=0), own.var(dim=0), atol=0.05, rtol=0.05)


def test_batches_are_extended_for_every_process() -> None:
    features, labels, chunk = torch.arange(7.0)[:, None], torch.arange(7), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    more, of_more, chunks = torch.tensor([[10.0], [11.0], [12.0]]), torch.tensor([10, 11, 12]), torch.tensor([0, 1, 1])
    total = 0.0
    for rank in range(2):
        world = World(rank, 2)
        batch = Batch(0, world.shard(features), labels, chunk, 2, world)
        extended = batch.extended(world.shard(more), of_more, chunks)
        assert torch.equal(extended.features[:, 0].long(), extended.labels)
        assert extended.own(torch.arange(10)).tolist() == [*range(rank, 7, 2), *range(7 + rank, 10, 2)]
        total += float(extended.chunk_mean(extended.features[:, 0]))
    assert total == pytest.approx(((0 + 1 + 2 + 3 + 10) / 5 + (4 + 5 + 6 + 11 + 12) / 5) / 2)


def embeddings(path: Path, vectors: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Settings with a file of ``vectors``."""
    np.save(path, vectors)
    return {"embeddings": str(path), "steps": 200, "lr": 0.01, "warmup_steps": 0, "weight_decay": 0.0}


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_a_category_without_training_rows_scores_by_its_name(form: str, tmp_path: Path) -> None:
    """The vectors are the centres of the classes: the projection that maps known features to their names maps those of
    the unknown class near its own."""
    cache = Toy(counts=(60, 60, 60, 60, 60, 60, 0), most=60, images=30).write(tmp_path / "cache")
    centre = np.stack([cache.features.take(np.flatnonzero(cache.labels == c)).mean(axis=0) for c in range(6)])
    unseen = (centre[0] + centre[1]) / 2
    settings = embeddings(tmp_path / "names.npy", np.concatenate([centre, unseen[None]]))
    head = train("text", cache, tmp_path / "1", settings | {"form": form, "temperature": 10.0}).head
    rng = np.random.default_rng(0)
    far = head.scores(torch.from_numpy((centre[5] + 0.1 * rng.normal(size=(50, 8))).astype(np.float32)))
    near = head.scores(torch.from_numpy((unseen + 0.1 * rng.normal(size=(50, 8))).astype(np.float32)))
    assert near[:, 6].mean() > 2 * far[:, 6].mean()
    assert isinstance(head, TextHead)
    alone = head.named(torch.from_numpy(unseen[None])).scores(torch.from_numpy(unseen[None]))
    assert alone.shape == (1, 1)


@pytest.mark.parametrize(("form", "on_it"), [("softmax", "logit-adjustment"), ("sigmoid", "fracal")])
def test_a_text_head_is_a_base(form: str, on_it: str, cache: Cache, features: Tensor, tmp_path: Path) -> None:
    base = train("text", cache, tmp_path / "base", {"steps": 9, "warmup_steps": 0, "form": form})
    head = train(on_it, cache, tmp_path / "1", base=base).head
    assert load(tmp_path / "1").info.base[0]["method"] == "text"
    p = base.head.scores(features)
    assert not torch.allclose(head.scores(features), p) and head.scores(features).shape == p.shape
    if form == "softmax":
        shift = head.state_dict()["shift"]
        torch.testing.assert_close(
            head.full_scores(features), (base.head.full_scores(features).log() + shift).softmax(1)
        )


def test_names_without_a_file_are_their_letters() -> None:
    bat, glove, cat = hashed_names(("baseball_bat", "Baseball glove", "cat"))
    assert torch.equal(*hashed_names(("Cat", "cat")))
    cosine = functional.cosine_similarity
    assert cosine(bat, glove, dim=0) > 0.5 > 0.2 > cosine(glove, cat, dim=0)


@pytest.mark.parametrize(
    ("vectors", "error"),
    [
        (np.ones((6, 4)), ShapeError),
        (np.ones((7, 0)), ShapeError),
        (np.ones(7), ShapeError),
        (np.full((7, 4), np.nan), NonFiniteError),
        (np.zeros((7, 4)), NonFiniteError),
        (np.array(["a"] * 7), FormatError),
        (np.array([{}] * 7), FormatError),
    ],
    ids=range(7),
)
def test_embeddings_that_do_not_fit_are_refused(
    vectors: np.ndarray[Any, Any], error: type[Exception], cache: Cache, tmp_path: Path
) -> None:
    with pytest.raises(error, match="embeddings"):
        train("text", cache, tmp_path / "1", embeddings(tmp_path / "names.npy", vectors))
    with pytest.raises(MissingFileError):
        train("text", cache, tmp_path / "1", {"embeddings": str(tmp_path / "nothing.npy")})
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(FormatError):
        train("text", cache, tmp_path / "1", {"embeddings": str(tmp_path / "text.npy")})


@pytest.mark.parametrize(
    "make",
    [
        lambda: IIF(form="log"),
        lambda: IIF(strength=-1.0),
        lambda: IIF(when="both"),
        lambda: GOL(tail_share=1.5),
        lambda: GOL(masking="some"),
        lambda: ECM(power=-1.0),
        lambda: ECM(background_ratio=-1.0),
        lambda: EFL(gamma=0.0),
        lambda: EFL(alpha=2.0),
        lambda: LOCE(momentum=1.5),
        lambda: Text(temperature=0.0),
        lambda: Text(form="relu"),
        lambda: LOCE(background_score=0.0),
        lambda: BACL(begin=2.0),
        lambda: BACL(draw_features=0),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(SettingError):
        make()
