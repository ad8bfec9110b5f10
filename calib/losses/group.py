"""Balanced Group Softmax: the groups, the sampling of `others`, the loss.

Paper: Li et al., Overcoming Classifier Imbalance for Long-tail Object Detection with Balanced Group Softmax, CVPR 2020.

Letters: N RoIs, C foreground classes, G groups of classes. Columns of the C + G + 2 logits:
``[bg, fg] [others, classes of group 1] ... [others, classes of group G]``, classes ascending within a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.losses.softmax import cross_entropy


@dataclass(frozen=True)
class Groups:
    """Group 0 separates background from foreground; group g >= 1 holds its classes and `others` at local index 0.

    ``local`` [G+1, C+1]: local target of every label in every group (background label C is `others`, and 0 = bg in
    group 0). ``slices`` [G+1] columns of every group.
    """

    local: Tensor
    slices: tuple[slice, ...]

    @classmethod
    def from_counts(cls, instance_count: Tensor, edges: Sequence[float]) -> "Groups":
        """Half-open bins of instance counts: group 1 has n < edges[0], the last n >= edges[-1]."""
        c = len(instance_count)
        group = torch.bucketize(instance_count, torch.tensor(edges, dtype=instance_count.dtype), right=True)
        local = torch.zeros(len(edges) + 2, c + 1, dtype=torch.long)
        local[0, :c] = 1
        slices = [slice(0, 2)]
        for g in range(len(edges) + 1):
            members = torch.nonzero(group == g).flatten()
            local[g + 1, members] = torch.arange(1, len(members) + 1)
            slices.append(slice(slices[-1].stop, slices[-1].stop + 1 + len(members)))
        return cls(local, tuple(slices))

    @property
    def outputs(self) -> int:
        """Number of logits: C + G + 2."""
        return int(self.slices[-1].stop)

    def scores(self, logits: Tensor, *, gated: bool = True) -> Tensor:
        """[N, C+G+2] -> [N, C+1]: P_0[fg] * P_g(c)[c] for foreground, P_0[bg] last; rows need not sum to 1 (Eq. 6).

        Without ``gated`` group 0 plays no part: P_g(c)[c], and the product of the groups' `others` last.
        """
        gate, *parts = (logits[:, columns].softmax(dim=1) for columns in self.slices)
        local = self.local[1:, :-1]  # [G, C], above 0 in the one group of a class
        start = torch.tensor([s.start - self.slices[0].stop for s in self.slices[1:]], device=local.device)
        column = ((local + start[:, None]) * (local > 0)).sum(dim=0).to(logits.device)
        foreground = torch.cat(parts, dim=1)[:, column]
        if gated:
            return torch.cat([gate[:, 1:] * foreground, gate[:, :1]], dim=1)
        others = torch.stack([p[:, 0] for p in parts]).prod(dim=0)
        return torch.cat([foreground, others[:, None]], dim=1)

    def without_others(self, logits: Tensor) -> Tensor:
        """The logits with every `others` column at -inf: a softmax over a group's own classes."""
        columns = torch.tensor([s.start for s in self.slices[1:]], device=logits.device)
        return logits.index_fill(1, columns, -torch.inf)


def sample_others(
    groups: Groups, labels: Tensor, chunk: Tensor, n_chunks: int, beta: float, generator: torch.Generator
) -> Tensor:
    """Which rows enter the loss of every group: [G+1, N] of bool.

    Group 0 takes all rows. Elsewhere, per chunk: every positive, and int(beta * positives) of the other rows,
    uniformly without replacement; all of them when there are no more; none when the chunk has no positive. Fresh at
    every call, independent between groups.
    """
    n = len(labels)
    sampled = torch.ones(len(groups.slices), n, dtype=torch.bool)
    for g in range(1, len(groups.slices)):
        positive = groups.local[g, labels] > 0  # [N]
        n_positive = torch.zeros(n_chunks, dtype=torch.long).index_add(0, chunk, positive.long())
        quota = (beta * n_positive.double()).long()  # truncation, as int() in the authors' code
        # Random keys order the others of each chunk; positives sort behind every one of them.
        key = torch.rand(n, generator=generator) + positive * 2.0
        order = torch.argsort(chunk * 4.0 + key)
        first = torch.searchsorted(chunk[order].contiguous(), torch.arange(n_chunks))
        rank = torch.empty(n, dtype=torch.long)
        rank[order] = torch.arange(n) - first[chunk[order]]
        sampled[g] = positive | (rank < quota[chunk])
    return sampled


def sampled_counts(sampled: Tensor, chunk: Tensor, n_chunks: int) -> Tensor:
    """[G+1, N], [N] -> [G+1, K] rows that enter the loss of every group in every chunk."""
    return torch.zeros(len(sampled), n_chunks, device=chunk.device).index_add(1, chunk, sampled.float())


def group_losses(
    groups: Groups,
    logits: Tensor,
    labels: Tensor,
    sampled: Tensor,
    chunk: Tensor,
    n_chunks: int,
    counts: Tensor | None = None,
) -> Tensor:
    """[G+1, K] loss of every group in every chunk: sum m CE / max(sum m, 1).

    ``counts`` [G+1, K]: the denominators where these are some of the rows only.

    Differs: Eq. 5 of the paper sums over groups per proposal; the authors' code (FishYuLi/BalancedGroupSoftmax
    90e04fd) takes the mean per group over its sampled proposals, which weighs a tail group's few positives up.
    """
    counts = sampled_counts(sampled, chunk, n_chunks) if counts is None else counts
    parts = []
    for g, columns in enumerate(groups.slices):
        target = groups.local[g].to(logits.device)[labels]
        ce = cross_entropy(logits[:, columns], target)  # Eq. 5, one group
        ce = ce.where(sampled[g], 0.0)  # not a product: without `others` an unsampled row is infinite
        total = logits.new_zeros(n_chunks).index_add(0, chunk, ce)
        parts.append(total / counts[g].clamp_min(1))
    return torch.stack(parts)
