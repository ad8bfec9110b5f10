"""Balanced group softmax: groups, the draw of `others`, the loss, the scores."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.losses.group import Groups, group_losses, sample_others

from ..reference import plain

COUNTS = [5, 2000, 50, 700, 3, 10, 100, 1000]
EDGES = (10, 100, 1000)
GROUPS = Groups.from_counts(torch.tensor(COUNTS), EDGES)


def test_groups_are_half_open_bins_in_ascending_class_order() -> None:
    members = [torch.nonzero(GROUPS.local[g]).flatten().tolist() for g in range(1, 5)]
    assert members == [[0, 4], [2, 5], [3, 6], [1, 7]]
    assert GROUPS.local[0].tolist() == [1] * 8 + [0]
    assert [(s.start, s.stop) for s in GROUPS.slices] == [(0, 2), (2, 5), (5, 8), (8, 11), (11, 14)]
    assert GROUPS.outputs == 14


def test_loss_and_gradient_equal_the_plain_version() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(30, GROUPS.outputs, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 9, (30,), generator=generator)
    sampled = sample_others(GROUPS, labels, torch.zeros(30, dtype=torch.long), 1, 1.0, generator)
    fast, slow = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = group_losses(GROUPS, fast, labels, sampled, torch.zeros(30, dtype=torch.long), 1).sum()
    theirs = plain.group_loss(slow, labels, sampled, COUNTS, EDGES)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs.to(ours))
    torch.testing.assert_close(fast.grad, slow.grad)


def test_a_chunk_of_background_trains_group_0_only() -> None:
    z = torch.randn(6, GROUPS.outputs, requires_grad=True)
    labels, chunk = torch.full((6,), 8), torch.zeros(6, dtype=torch.long)
    sampled = sample_others(GROUPS, labels, chunk, 1, 8.0, torch.Generator())
    losses = group_losses(GROUPS, z, labels, sampled, chunk, 1)
    assert losses[0] > 0 and not losses[1:].any()
    losses.sum().backward()
    assert z.grad is not None and not z.grad[:, 2:].any()


@given(
    labels=st.lists(st.integers(0, 8), min_size=1, max_size=60),
    beta=st.sampled_from([0.0, 0.5, 1.0, 2.5, 8.0, 1000.0]),
    n_chunks=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_others_per_chunk(labels: list[int], beta: float, n_chunks: int, seed: int) -> None:
    y = torch.tensor(labels)
    chunk = torch.arange(len(y)) * n_chunks // len(y)
    sampled = sample_others(GROUPS, y, chunk, n_chunks, beta, torch.Generator().manual_seed(seed))
    assert bool(sampled[0].all())
    for g in range(1, 5):
        positive = GROUPS.local[g, y] > 0
        assert bool(sampled[g][positive].all())
        for k in range(n_chunks):
            here = chunk == k
            n_positive, n_other = int((positive & here).sum()), int((~positive & here).sum())
            assert int((sampled[g] & ~positive & here).sum()) == min(int(beta * n_positive), n_other)


def test_every_other_is_equally_likely() -> None:
    y, chunk = torch.tensor([0] + [8] * 20), torch.zeros(21, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    hits = torch.stack([sample_others(GROUPS, y, chunk, 1, 5.0, generator)[1, 1:] for _ in range(4000)]).sum(dim=0)
    # 5 of 20, 4,000 times: 1,000 each with a deviation of 27.
    assert hits.min() > 850 and hits.max() < 1150


def test_scores_by_hand() -> None:
    # P_0 = softmax(0, log 3) = (1/4, 3/4); group 1: others, class 0, class 4 = softmax(0, 0, log 2) = 1/4, 1/4, 1/2.
    z = torch.zeros(1, GROUPS.outputs)
    z[0, 1], z[0, 4] = torch.log(torch.tensor(3.0)), torch.log(torch.tensor(2.0))
    scores = GROUPS.scores(z)[0]
    assert scores[8] == pytest.approx(0.25)
    assert scores[0] == pytest.approx(0.75 * 0.25) and scores[4] == pytest.approx(0.75 * 0.5)
    assert scores[1] == pytest.approx(0.75 / 3)


@given(
    counts=st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    edges=st.lists(st.integers(1, 3000), max_size=5, unique=True).map(sorted),
    seed=st.integers(0, 1000),
)
def test_scores_equal_the_plain_version_for_any_counts_and_edges(
    counts: list[int], edges: list[int], seed: int
) -> None:
    groups = Groups.from_counts(torch.tensor(counts), edges)
    assert groups.outputs == len(counts) + len(edges) + 3
    z = torch.randn(3, groups.outputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wanted = torch.tensor(plain.group_scores(z, counts, edges), dtype=torch.float64)
    torch.testing.assert_close(groups.scores(z), wanted)


def test_without_a_proposal_there_is_no_loss_and_no_nan() -> None:
    z, none = torch.zeros(0, GROUPS.outputs, requires_grad=True), torch.zeros(0, dtype=torch.long)
    sampled = sample_others(GROUPS, none, none, 2, 8.0, torch.Generator())
    losses = group_losses(GROUPS, z, none, sampled, none, 2)
    losses.sum().backward()
    assert losses.shape == (5, 2) and not losses.any() and z.grad is not None
