"""BACL's classification loss: pairwise margins between foreground classes, and which negatives count.

Paper: Qi et al., Balanced Classification: A Unified Framework for Long-Tailed Object Detection, arXiv 2308.02213.

M [C, C]: how foreground rows of class i (rows) were scored as class j (columns), foreground only.
Letters: N RoIs, F foreground RoIs, C foreground classes.
"""

import torch
from torch import Tensor

from calib.losses.sigmoid import eql_v2_scores, one_hot, weighted_bce

LEAST = 1e-3  # entries of M count as at least this


def pairwise_margins(matrix: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """[C, C], [N] -> [N, C+1]: alpha log(M_yj / M_jy) on foreground rows; 0 for the background's column and rows."""
    c = len(matrix)
    foreground = labels < c
    y, log_m = labels[foreground], matrix.clamp_min(LEAST).log()
    margins = matrix.new_zeros(len(labels), c + 1)
    margins[foreground, :c] = alpha * (log_m[y] - log_m[:, y].T)
    return margins


def pairwise_weights(logits: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """[N, C+1], [N] -> [N, C+1] of 0 and 1: on foreground rows only classes count that score at least as high as the
    true one, or at least ``threshold``; the background's column and all of a background row count."""
    scores = eql_v2_scores(logits.detach())
    own = scores.gather(1, labels[:, None])
    counts = (scores >= own) | (scores >= threshold) | (labels == logits.shape[1] - 1)[:, None]
    counts[:, -1] = True
    return counts.to(logits)


def pairwise_values(logits: Tensor, labels: Tensor, matrix: Tensor, alpha: float, threshold: float) -> Tensor:
    """[N, C+1], [N], [C, C] -> [N] sum_j w_j BCE(z_j + margin_j, t_j)."""
    moved = logits + pairwise_margins(matrix, labels, alpha)
    return weighted_bce(moved, one_hot(labels, logits.shape[1]), pairwise_weights(logits, labels, threshold))


def error_probability(matrix: Tensor) -> Tensor:
    """[C, C] -> [C] probability of a class to be drawn: its share of all that was scored as another, 1 - M_cc."""
    error = (1 - matrix.diagonal()).clamp_min(0)
    total = error.sum()
    return error / total if total > 0 else torch.full_like(error, 1 / len(error))
