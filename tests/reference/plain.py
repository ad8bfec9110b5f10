"""The equations as loops over rows and classes: slow, and easy to compare with the papers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def log_softmax(z: Sequence[Tensor], k: int) -> Tensor:
    """log of softmax(z)_k, without any trick."""
    total = torch.stack([torch.exp(v) for v in z]).sum()
    return torch.log(torch.exp(z[k]) / total)


def cross_entropy(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """-log softmax of the label, a row at a time."""
    return [-log_softmax(list(row), int(y)) for row, y in zip(logits, labels, strict=True)]


def chunk_mean(values: Sequence[Tensor], chunk: Tensor, n_chunks: int, weights: Sequence[float]) -> Tensor:
    """Mean over chunks of the weighted mean within each; a chunk without weight is 0."""
    parts = []
    for k in range(n_chunks):
        rows = [i for i in range(len(values)) if int(chunk[i]) == k]
        total = sum(weights[i] for i in rows)
        parts.append(sum(weights[i] * values[i] for i in rows) / total if total else torch.zeros(()))
    return torch.stack([torch.as_tensor(p) for p in parts]).mean()


def group_of(count: int, edges: Sequence[float]) -> int:
    """1-based group of a class."""
    return 1 + sum(count >= e for e in edges)


def group_loss(
    logits: Tensor, labels: Tensor, sampled: Tensor, counts: Sequence[int], edges: Sequence[float]
) -> Tensor:
    """Sum over groups of the mean cross entropy over sampled rows, one chunk."""
    c = len(counts)
    members = [[k for k in range(c) if group_of(counts[k], edges) == g] for g in range(1, len(edges) + 2)]
    columns = [[0, 1]]
    for m in members:
        first = columns[-1][-1] + 1
        columns.append(list(range(first, first + 1 + len(m))))
    total = torch.zeros(())
    for g, own in enumerate(columns):
        values = []
        for i, y in enumerate(labels.tolist()):
            if not bool(sampled[g, i]):
                continue
            local = (0 if y == c else 1) if g == 0 else (members[g - 1].index(y) + 1 if y in members[g - 1] else 0)
            values.append(-log_softmax([logits[i, k] for k in own], local))
        total = total + (sum(values) / len(values) if values else 0.0)
    return total


def group_scores(logits: Tensor, counts: Sequence[int], edges: Sequence[float]) -> list[list[float]]:
    """P_0[fg] P_g(c)[c] for every class, then P_0[bg]."""
    members = [[k for k in range(len(counts)) if group_of(counts[k], edges) == g] for g in range(1, len(edges) + 2)]
    rows = []
    for z in logits.tolist():
        foreground = math.exp(z[1]) / (math.exp(z[0]) + math.exp(z[1]))
        row, first = [0.0] * len(counts) + [1 - foreground], 2
        for m in members:
            e = [math.exp(v) for v in z[first : first + 1 + len(m)]]
            for i, k in enumerate(m, start=1):
                row[k] = foreground * e[i] / sum(e)
            first += len(e)
        rows.append(row)
    return rows


def linear(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """z_ik = sum_d x_id w_kd + b_k."""
    return torch.stack(
        [
            torch.stack([(x * w).sum() + (0 if bias is None else bias[k]) for k, w in enumerate(weight)])
            for x in features
        ]
    )


def aligned(z: Tensor, s: Tensor, alpha: Tensor, beta: Tensor, form: str) -> Tensor:
    """DisAlign's Eq. 5 or Eq. 6, a proposal and a class at a time; the last column is left alone."""
    rows = []
    for i in range(len(z)):
        changed = []
        for k in range(len(alpha)):
            if form == "eq5":
                changed.append(s[i] * (alpha[k] * z[i, k] + beta[k]) + (1 - s[i]) * z[i, k])
            else:
                changed.append((1 + s[i] * alpha[k]) * z[i, k] + s[i] * beta[k])
        rows.append(torch.stack([*changed, z[i, -1]]))
    return torch.stack(rows)


def power_weights(counts: Sequence[int], rho: float) -> list[float]:
    """Mean 1 over the foreground, 1 for the background."""
    total = sum(max(n, 1) for n in counts)
    u = [math.pow(max(n, 1) / total, -rho) for n in counts]
    return [len(u) * v / sum(u) for v in u] + [1.0]
