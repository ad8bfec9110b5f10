"""What ``fit`` really minimises: one step of rate 1 moves every tensor by the gradient of the slow plain loss.

This holds the pieces together that other tests look at one by one: which rows a step sees, their labels, chunks and
weights, which tensors move, and the loss.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from calib.cache import Cache
from calib.cache.index import ClassIndex
from calib.heads.aligned import AlignedHead
from calib.heads.base import Head
from calib.heads.combine import DualHead
from calib.heads.linear import LinearClassifier, LinearHead
from calib.losses.softmax import cross_entropy
from calib.methods.bags import Bags
from calib.methods.crt import CRT
from calib.methods.disalign import DisAlign
from calib.methods.natural import Natural
from calib.methods.simcal import SimCal
from calib.sampling import Sampler, Step
from calib.sampling.bilevel import BilevelSampler
from calib.sampling.class_balanced import ClassBalancedSampler
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, with_overrides
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Method, Training, Trainings, fitting, run_alone
from calib.training.stages import fit_alone

from ..reference import plain
from ..toy import Toy

BATCHES = ImageBatches(chunks=3, images_per_chunk=2)
SEED = 4


@pytest.fixture(scope="module", params=[False, True], ids=["seven classes", "one class"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    toy = Toy(counts=(30,)) if request.param else Toy()
    return toy.write(tmp_path_factory.mktemp("toy") / "cache")


def stepped(method: Method, cache: Cache, lr: float, steps: int = 1) -> Head:
    """The head after plain SGD steps of one rate."""
    loop = {
        "steps": steps,
        "milestones": (1.0,),
        "lr": lr,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "clip_norm": 0.0,
        "warmup_steps": 0,
    }
    settings = with_overrides(method, {f"loop.{k}": v for k, v in loop.items()})
    return run_alone(fitting(settings, cache, FitContext(SEED)))


def trained(head: Head) -> list[Tensor]:
    """The tensors that may move; of a dual head those of the calibrated one."""
    return [p for p in (head.tail if isinstance(head, DualHead) else head).parameters() if p.requires_grad]


def moves(method: Method, cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """(start, start - end) of every tensor that trains."""
    start, end = (trained(stepped(method, cache, lr)) for lr in (0.0, 1.0))
    return [(a.detach(), (a - b).detach()) for a, b in zip(start, end, strict=True)]


def rows_of(cache: Cache, sampler: Sampler, i: int = 0) -> tuple[Step, Tensor, Tensor]:
    """Step i: rows and chunks, features [n, D], labels [n]."""
    step = sampler.step(i)
    labels = torch.from_numpy(cache.labels[step.rows].astype(np.int64))
    return step, torch.from_numpy(cache.features.take(step.rows)).double(), labels


def compare(pairs: Sequence[tuple[Tensor, Tensor]], loss: Callable[..., Tensor]) -> None:
    """The moves are the gradient of ``loss`` at the start, and are no zeros."""
    leaves = [start.double().clone().requires_grad_() for start, _ in pairs]
    for gradient, (_, move) in zip(torch.autograd.grad(loss(*leaves), leaves), pairs, strict=True):
        torch.testing.assert_close(move.double(), gradient, atol=2e-6, rtol=2e-5)
        assert gradient.abs().max() > 1e-5


def test_natural(cache: Cache) -> None:
    step, x, y = rows_of(cache, InstanceSampler(cache, BATCHES, seed=SEED))

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        values = plain.cross_entropy(plain.linear(x, weight, bias), y)
        return plain.chunk_mean(values, torch.from_numpy(step.chunk), 3, [1.0] * len(y))

    compare(moves(Natural(images=BATCHES), cache), loss)


@pytest.mark.parametrize("form", ["eq5", "eq6"])
def test_disalign(form: str, cache: Cache) -> None:
    """Two steps: at the start, which is the identity, v and c have no gradient."""
    method = DisAlign(images=BATCHES, parametrisation=form)
    weights = plain.power_weights(cache.categories.instance_count.tolist(), 0.8)
    sampler = InstanceSampler(cache, BATCHES, seed=SEED)
    start, end = ([p.detach() for p in trained(stepped(method, cache, lr, steps=2))] for lr in (0.0, 1.0))
    p = [t.double() for t in start]
    for i in range(2):
        step, x, y = rows_of(cache, sampler, i)
        z = torch.from_numpy(cache.classifier.logits(x.float().numpy())).double()
        alpha, beta, v, c = p = [t.detach().requires_grad_() for t in p]
        s = 1 / (1 + torch.exp(-plain.linear(x, v, c)[:, 0]))
        values = plain.cross_entropy(plain.aligned(z, s, alpha, beta, form), y)
        loss = plain.chunk_mean(values, torch.from_numpy(step.chunk), 3, [weights[k] for k in y.tolist()])
        p = [t - g for t, g in zip(p, torch.autograd.grad(loss, p), strict=True)]
    for first, wanted, found in zip(start, p, end, strict=True):
        torch.testing.assert_close(found.double(), wanted.detach(), atol=2e-6, rtol=2e-5)
        assert (found - first).abs().max() > 1e-5


@pytest.mark.parametrize("beta", [0.0, 1e6])
def test_bags(beta: float, cache: Cache) -> None:
    """With beta 0 no `others` are drawn, with a huge one all of them where there is a positive: nothing is random."""
    step, x, y = rows_of(cache, InstanceSampler(cache, BATCHES, seed=SEED))
    counts, edges = cache.categories.instance_count.tolist(), (10, 100, 1000)

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        z, chunk = plain.linear(x, weight, bias), torch.from_numpy(step.chunk)
        parts = []
        for k in range(3):
            own = y[chunk == k]
            groups = [plain.group_of(counts[c], edges) if c < len(counts) else 0 for c in own.tolist()]
            sampled = [[True] * len(own)]
            for g in range(1, 5):
                sampled.append([h == g or (beta > 0 and g in groups) for h in groups])
            parts.append(plain.group_loss(z[chunk == k], own, torch.tensor(sampled), counts, edges))
        return torch.stack(parts).mean()

    compare(moves(Bags(beta=beta, images=BATCHES), cache), loss)


def test_crt(cache: Cache) -> None:
    method = CRT(rows_per_step=40, background_share=0.25)
    index = ClassIndex.build(cache)
    _, x, y = rows_of(cache, ClassBalancedSampler(index, rows_per_step=40, background_share=0.25, seed=SEED))
    assert int((y == cache.background).sum()) == 10
    compare(
        moves(method, cache),
        lambda weight, bias: torch.stack(plain.cross_entropy(plain.linear(x, weight, bias), y)).mean(),
    )


@pytest.mark.parametrize("form", ["linear", "mlp"])
def test_simcal(form: str, cache: Cache) -> None:
    index, max_iou = ClassIndex.build(cache), cache.meta("max_iou")[0]
    _, x, y = rows_of(cache, BilevelSampler(index, max_iou, classes_per_step=6, seed=SEED))

    def loss(*layers: Tensor) -> Tensor:
        z = plain.linear(x, *layers[:2])
        if form == "mlp":
            z = plain.linear(z.clamp_min(0), *layers[2:])
        return torch.stack(plain.cross_entropy(z, y)).mean()

    compare(moves(SimCal(form=form, hidden=5, classes_per_step=6), cache), loss)


def test_the_detectors_own_tensors_do_not_move(cache: Cache) -> None:
    dual, aligned = (stepped(m, cache, 1.0) for m in (SimCal(classes_per_step=6), DisAlign(images=BATCHES)))
    assert isinstance(dual, DualHead) and isinstance(dual.rest, LinearHead) and isinstance(aligned, AlignedHead)
    for own in (dual.rest.classifier, aligned.classifier):
        assert own.bias is not None
        assert np.array_equal(own.weight.numpy(force=True), cache.classifier.weight)
        assert np.array_equal(own.bias.numpy(force=True), cache.classifier.bias)


def test_every_step_draws_anew_and_the_same_from_the_same_seed(cache: Cache) -> None:
    """What an objective draws (the `others` of BAGS) depends on seed and step alone."""
    sampler, loop = InstanceSampler(cache, BATCHES, seed=SEED), Loop(steps=6)

    def drawn(seed: int) -> list[float]:
        head, seen = LinearHead(LinearClassifier.of(cache.classifier)), []

        def objective(batch: Batch) -> Tensor:
            seen.append(torch.rand(1, generator=batch.generator).item())
            return cross_entropy(head.logits(batch.features), batch.labels).mean()

        def draw() -> Trainings[None]:
            yield Training(head, objective, sampler, cache, loop, FitContext(seed), label="draw")

        run_alone(draw())
        return seen

    assert drawn(0) == drawn(0)
    assert len({*drawn(0), *drawn(1)}) == 12


def test_weight_decay_momentum_clipping_and_rate_by_hand(tmp_path: Path) -> None:
    """Two steps of the loop against the update written out: v = g + wd p, then m v + g + wd p; p -= lr v."""
    cache = Toy(counts=(30, 8)).write(tmp_path / "cache")
    settings = {"momentum": 0.5, "weight_decay": 0.1, "clip_norm": 0.05, "warmup_steps": 4, "warmup_factor": 0.5}
    method = with_overrides(
        Natural(images=BATCHES), {f"loop.{k}": v for k, v in ({"steps": 2, "lr": 1.0} | settings).items()}
    )
    head = fit_alone(method, cache, FitContext(SEED))
    sampler = InstanceSampler(cache, BATCHES, seed=SEED)
    p = [torch.from_numpy(a).double() for a in (cache.classifier.weight, cache.classifier.bias)]
    v: list[Tensor] = []
    for i, lr in enumerate((0.5, 0.625)):  # from half the rate, 4 steps up to the whole
        step = sampler.step(i)
        x = torch.from_numpy(cache.features.take(step.rows)).double()
        y = torch.from_numpy(cache.labels[step.rows].astype(np.int64))
        p = [t.detach().requires_grad_() for t in p]
        values = plain.cross_entropy(plain.linear(x, *p), y)
        g = torch.autograd.grad(plain.chunk_mean(values, torch.from_numpy(step.chunk), 3, [1.0] * len(y)), p)
        norm = float(sum((t**2).sum() for t in g)) ** 0.5
        assert norm > 0.05
        full = [t * 0.05 / (norm + 1e-6) + 0.1 * q for t, q in zip(g, p, strict=True)]  # decay is not clipped
        v = [0.5 * a + b for a, b in zip(v, full, strict=True)] if v else full
        p = [q - lr * a for q, a in zip(p, v, strict=True)]
    assert isinstance(head, LinearHead) and head.classifier.bias is not None
    torch.testing.assert_close(head.classifier.weight.double(), p[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(head.classifier.bias.double(), p[1], atol=1e-6, rtol=1e-5)
