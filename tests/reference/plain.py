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


def seesaw(logits: Tensor, labels: Tensor, counts: Sequence[float], p: float, q: float, eps: float) -> list[Tensor]:
    """Foreground rows: -log(e^z_y / (e^z_y + sum_j S_yj e^z_j)); background rows: 0."""
    c, out = logits.shape[1], []
    for z, y in zip(logits, labels.tolist(), strict=True):
        if y == c:
            out.append(z.sum() * 0)
            continue
        s = torch.softmax(z.detach(), dim=0)
        total = torch.exp(z[y])
        for j in range(c):
            if j != y:
                ratio = max(counts[j], 1) / max(counts[y], 1)
                mitigation = ratio**p if ratio < 1 else 1.0
                compensation = max(1.0, float(s[j]) / max(float(s[y]), eps)) ** q
                total = total + mitigation * compensation * torch.exp(z[j])
        out.append(-torch.log(torch.exp(z[y]) / total))
    return out


def bce(z: Tensor, t: float | Tensor) -> Tensor:
    """Binary cross entropy of one logit."""
    p = 1 / (1 + torch.exp(-z))
    return -(t * torch.log(p) + (1 - t) * torch.log(1 - p))


def eql(logits: Tensor, labels: Tensor, is_tail: Sequence[bool]) -> list[Tensor]:
    """Sum over classes of w BCE, w = 0 for negatives of tail classes on foreground rows."""
    c, out = logits.shape[1], []
    for z, y in zip(logits, labels.tolist(), strict=True):
        kept = [j for j in range(c) if j == y or y == c or not is_tail[j]]
        out.append(sum((bce(z[j], float(j == y)) for j in kept), torch.zeros(()).to(z)))
    return out


def eql_v2(
    logits: Tensor, labels: Tensor, ratio: Sequence[float], gamma: float, mu: float, alpha: float
) -> list[Tensor]:
    """Sum over C + 1 columns of (q t + r (1 - t)) BCE."""
    out = []
    for z, y in zip(logits, labels.tolist(), strict=True):
        total = torch.zeros(()).to(z)
        for j in range(len(z)):
            negative = 1.0 if j == len(z) - 1 else 1 / (1 + math.exp(-gamma * (ratio[j] - mu)))
            positive = 1.0 if j == len(z) - 1 else 1 + alpha * (1 - negative)
            total = total + (positive if j == y else negative) * bce(z[j], float(j == y))
        out.append(total)
    return out


def balanced_sigmoid(logits: Tensor, labels: Tensor, share: Sequence[float]) -> list[Tensor]:
    """Sum over classes of BCE, foreground rows with z - log((1 - f) / f)."""
    c, out = logits.shape[1], []
    for z, y in zip(logits, labels.tolist(), strict=True):
        shift = [-math.log((1 - f) / f) if y < c else 0.0 for f in share]
        out.append(sum((bce(z[j] + shift[j], float(j == y)) for j in range(c)), torch.zeros(()).to(z)))
    return out


def focal(logits: Tensor, labels: Tensor, gamma: float) -> list[Tensor]:
    """(1 - p_y)^gamma * -log p_y."""
    out = []
    for z, y in zip(logits, labels.tolist(), strict=True):
        log_p = log_softmax(list(z), y)
        out.append((1 - torch.exp(log_p)) ** gamma * -log_p)
    return out


def sigmoid_focal(logits: Tensor, labels: Tensor, gamma: float, alpha: float) -> list[Tensor]:
    """Sum over columns of alpha_t (1 - p_t)^gamma * -log p_t."""
    out = []
    for z, y in zip(logits, labels.tolist(), strict=True):
        total = torch.zeros(()).to(z)
        for j in range(len(z)):
            p = 1 / (1 + torch.exp(-z[j]))
            p_t, a = (p, alpha) if j == y else (1 - p, 1 - alpha)
            total = total - a * (1 - p_t) ** gamma * torch.log(p_t)
        out.append(total)
    return out


def margin(logits: Tensor, labels: Tensor, counts: Sequence[float], largest: float, scale: float) -> list[Tensor]:
    """CE of scale (z - m_y at the label), background (last) margin 0."""
    m = [n**-0.25 for n in counts]
    m = [largest * v / max(m) for v in m] + [0.0]
    out = []
    for z, y in zip(logits, labels.tolist(), strict=True):
        moved = [scale * (z[j] - (m[y] if j == y else 0.0)) for j in range(len(z))]
        out.append(-log_softmax(moved, y))
    return out


def confusion(matrix: Tensor, p: Tensor, labels: Tensor, momentum: float, *, renormalise: bool) -> Tensor:
    """The running confusion matrix after one batch of foreground rows."""
    out = matrix.clone()
    for y in sorted(set(labels.tolist())):
        rows = [p[i] for i in range(len(labels)) if int(labels[i]) == y]
        out[y] = momentum * matrix[y] + (1 - momentum) * sum(rows) / len(rows)
        if renormalise:
            out[y] = out[y] / out[y].sum()
    return out


def pcb_softmax(logits: Tensor, labels: Tensor, matrix: Tensor, a: float) -> list[Tensor]:
    """Background: CE. Foreground: (1 - a) CE + a KL(column y of M, normalised || softmax(z))."""
    c, out = len(matrix), []
    for z, y in zip(logits, labels.tolist(), strict=True):
        ce = -log_softmax(list(z), y)
        if y == c:
            out.append(ce)
            continue
        target = matrix[:, y] / matrix[:, y].sum()
        kl = sum(
            (t * (math.log(t) - log_softmax(list(z), i)) for i, t in enumerate(target.tolist()) if t > 0),
            torch.zeros(()).to(z),
        )
        out.append((1 - a) * ce + a * kl)
    return out
