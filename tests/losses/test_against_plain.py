"""Every fast loss against its equation written as loops: values and gradients, in double precision."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from calib.losses import confusion, margin, seesaw, sigmoid

from ..reference import plain

C, N = 5, 14
COUNTS = [900.0, 40.0, 40.0, 3.0, 0.0]
SHARE = [0.5, 0.1, 0.02, 0.003, 0.9]
TAIL = [False, False, True, True, False]
RATIO = [0.1, 0.8, 2.0, 100.0, 0.0]


def rows(columns: int, *, top: int) -> tuple[Tensor, Tensor]:
    """Logits with an extreme row, and labels up to ``top``; the last three rows have the highest label."""
    generator = torch.Generator().manual_seed(columns)
    logits = 2 * torch.randn(N, columns, generator=generator, dtype=torch.float64)
    logits[0] *= 4
    labels = torch.randint(0, top + 1, (N,), generator=generator)
    labels[-3:] = top
    return logits, labels


MATRIX = torch.rand(C, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

LOSSES: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], list[Tensor]]]] = {
    "seesaw": (
        C,
        lambda z, y: seesaw.seesaw_values(z, y, torch.tensor(COUNTS, dtype=torch.float64), 0.8, 2.0, 0.01),
        lambda z, y: plain.seesaw(z, y, COUNTS, 0.8, 2.0, 0.01),
    ),
    "eql": (
        C,
        lambda z, y: sigmoid.eql_values(z, y, torch.tensor(TAIL)),
        lambda z, y: plain.eql(z, y, TAIL),
    ),
    "eql-v2": (
        C + 1,
        lambda z, y: _eql_v2(z, y),
        lambda z, y: plain.eql_v2(z, y, RATIO, 12, 0.8, 4),
    ),
    "balanced-sigmoid": (
        C,
        lambda z, y: sigmoid.balanced_sigmoid_values(z, y, torch.tensor(SHARE, dtype=torch.float64)),
        lambda z, y: plain.balanced_sigmoid(z, y, SHARE),
    ),
    "focal": (C + 1, lambda z, y: margin.focal_values(z, y, 2.0), lambda z, y: plain.focal(z, y, 2.0)),
    "sigmoid-focal": (
        C + 1,
        lambda z, y: sigmoid.sigmoid_focal_values(z, y, 2.0, 0.25),
        lambda z, y: plain.sigmoid_focal(z, y, 2.0, 0.25),
    ),
    "margin": (
        C + 1,
        lambda z, y: margin.margin_values(z, y, _margins(), 3.0),
        lambda z, y: plain.margin(z, y, [max(n, 1) for n in COUNTS], 0.5, 3.0),
    ),
    "pcb-softmax": (
        C + 1,
        lambda z, y: sum(confusion.pcb_softmax_parts(z, y, MATRIX, 0.4)),  # type: ignore[arg-type, return-value]
        lambda z, y: plain.pcb_softmax(z, y, MATRIX, 0.4),
    ),
}


def _eql_v2(z: Tensor, y: Tensor) -> Tensor:
    target = sigmoid.one_hot(y, C + 1).double()
    positive, negative = sigmoid.eql_v2_weights(torch.tensor(RATIO, dtype=torch.float64), 12, 0.8, 4)
    return sigmoid.weighted_bce(z, target, positive * target + negative * (1 - target))


def _margins() -> Tensor:
    counts = torch.tensor(COUNTS).clamp_min(1)
    return torch.cat([margin.class_margins(counts, 0.5), torch.zeros(1)]).double()


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name: str) -> None:
    columns, ours, theirs = LOSSES[name]
    logits, labels = rows(columns, top=C)
    fast, slow = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found, wanted = ours(fast, labels), torch.stack(theirs(slow, labels))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    weights = torch.linspace(1, 2, N, dtype=torch.float64)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_background_is_finite(name: str) -> None:
    columns, ours, _ = LOSSES[name]
    z = rows(columns, top=C)[0].requires_grad_()
    ours(z, torch.full((N,), C)).sum().backward()
    assert z.grad is not None and bool(torch.isfinite(z.grad).all())


@pytest.mark.parametrize("renormalise", [True, False])
def test_the_confusion_matrix(renormalise: bool) -> None:
    p = torch.rand(9, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 0, 3, 3, 3, 1, 0, 1, 3])
    for matrix in (torch.zeros(C, C, dtype=torch.float64), MATRIX):
        found = confusion.update_confusion(matrix, *confusion.class_sums(p, labels), 0.9, renormalise=renormalise)
        wanted = plain.confusion(matrix, p, labels, 0.9, renormalise=renormalise)
        torch.testing.assert_close(found, wanted)
        assert torch.equal(found[[2, 4]], matrix[[2, 4]])  # absent classes
    if renormalise:  # the first observation replaces the row of zeros
        first = confusion.update_confusion(
            torch.zeros(C, C).double(), *confusion.class_sums(p, labels), 0.9, renormalise=True
        )
        torch.testing.assert_close(first[[0, 1, 3]].sum(dim=1), torch.ones(3).double())


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_losses_of_certain_rows_have_a_gradient(gamma: float) -> None:
    """At p = 1 a power below 1 of 1 - p has none."""
    logits = torch.tensor([[120.0, 0.0, -120.0], [-120.0, 120.0, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 1])
    for values in (
        margin.focal_values(logits, labels, gamma),
        sigmoid.sigmoid_focal_values(logits, labels, gamma, 0.5),
    ):
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert gradient.isfinite().all() and values.isfinite().all()
    assert torch.equal(margin.focal_values(logits, labels, gamma), torch.zeros(2))


def test_limits() -> None:
    logits, labels = rows(C + 1, top=C)
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(margin.focal_values(logits, labels, 0.0), ce)
    torch.testing.assert_close(margin.margin_values(logits, labels, torch.zeros(C + 1).double(), 1.0), ce)
    torch.testing.assert_close(margin.shifted_values(logits, labels, torch.zeros(C + 1)), ce)
    torch.testing.assert_close(sum(confusion.pcb_softmax_parts(logits, labels, MATRIX, 0.0)), ce)
    z, y = rows(C, top=C)
    plain_seesaw = seesaw.seesaw_values(z, y, torch.tensor(COUNTS).double(), 0.0, 0.0, 0.01)
    foreground = y < C
    wanted = torch.nn.functional.cross_entropy(z[foreground], y[foreground], reduction="none")
    torch.testing.assert_close(plain_seesaw[foreground], wanted)
    assert not plain_seesaw[~foreground].any()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(z, sigmoid.one_hot(y, C).double(), reduction="none")
    torch.testing.assert_close(sigmoid.eql_values(z, y, torch.zeros(C, dtype=torch.bool)), bce.sum(dim=1))
    torch.testing.assert_close(sigmoid.balanced_sigmoid_values(z, y, torch.full((C,), 0.5).double()), bce.sum(dim=1))
