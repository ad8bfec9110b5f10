"""Softmax cross entropy, its weighted forms, and the reduction that two-stage detectors use.

Letters: N RoIs, C foreground classes, K chunks. A detector's step averages the losses of its devices, each of which
normalises over its own images; ``chunk_mean`` is that reduction, and differs from one global mean wherever the
denominator is not a constant.
"""

import torch
from torch import Tensor
from torch.nn import functional


def complement(p: Tensor) -> Tensor:
    """1 - p, but above 0: a power below 1 of it has a gradient at p = 1, too (it is 0 there)."""
    return (1 - p).clamp_min(torch.finfo(p.dtype).tiny)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[N, C+1], [N] -> [N] -log softmax(z)_y."""
    return functional.cross_entropy(logits, labels, reduction="none")


def chunk_mean(
    values: Tensor, chunk: Tensor, n_chunks: int, weights: Tensor | None = None, total: Tensor | None = None
) -> Tensor:
    """(1/K) sum_k [ sum_{i in k} w_i v_i / sum_{i in k} w_i ]; a chunk of weight 0 contributes 0.

    Args:
        values: [N].
        chunk: [N] chunk of every row, 0..K-1.
        n_chunks: K.
        weights: [N], all 1 when absent.
        total: [K] weight of every chunk, where ``values`` are those of some of its rows only.
    """
    w = torch.ones_like(values) if weights is None else weights
    weight = chunk_weights(w, chunk, n_chunks) if total is None else total
    return (chunk_weights(w * values, chunk, n_chunks) / weight.where(weight > 0, 1.0)).mean()


def chunk_weights(weights: Tensor, chunk: Tensor, n_chunks: int) -> Tensor:
    """[N], [N] -> [K] sum of every chunk."""
    return weights.new_zeros(n_chunks).index_add(0, chunk, weights)


def chunk_shares(chunk: Tensor, n_chunks: int) -> Tensor:
    """[N] -> [N] what every row counts in ``chunk_mean`` without weights: 1 / (K rows of its chunk)."""
    rows = torch.bincount(chunk, minlength=n_chunks)
    return 1 / (n_chunks * rows[chunk])
