"""Cross entropy, its reduction over chunks, class weights."""

import pytest
import torch

from calib.losses.softmax import chunk_mean, cross_entropy
from calib.losses.weights import power_class_weights

from ..reference import plain


def test_the_chunked_mean_and_its_gradient_equal_the_plain_version() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (9,), generator=generator)
    chunk = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3])  # chunk 2 is empty
    weights = torch.rand(9, generator=generator, dtype=torch.float64)
    fast, slow = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = chunk_mean(cross_entropy(fast, labels), chunk, 4, weights)
    theirs = plain.chunk_mean(plain.cross_entropy(slow, labels), chunk, 4, weights.tolist())
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs.to(ours))
    torch.testing.assert_close(fast.grad, slow.grad)


def test_two_chunks_by_hand() -> None:
    # Chunk 0: values 1 and 3, weights 1 and 3: (1 + 9) / 4 = 2.5. Chunk 1: 4. Mean: 3.25.
    values, weights = torch.tensor([1.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 0.5])
    assert chunk_mean(values, torch.tensor([0, 0, 1]), 2, weights) == 3.25


def test_a_chunk_without_weight_adds_nothing_and_no_nan() -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = chunk_mean(values, torch.tensor([0, 1]), 3, torch.tensor([0.0, 1.0]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2 / 3)
    assert values.grad is not None and values.grad.tolist() == pytest.approx([0, 1 / 3])


@pytest.mark.parametrize("rho", [0.0, 0.8, 1.5])
def test_power_weights(rho: float) -> None:
    counts = [1000, 30, 3, 0]
    found = power_class_weights(torch.tensor(counts), rho)
    torch.testing.assert_close(found, torch.tensor(plain.power_weights(counts, rho)))
    assert float(found[:-1].mean()) == pytest.approx(1)
    assert rho == 0 or found[2] > found[1] > found[0]
