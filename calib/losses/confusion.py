"""PCB: a running confusion matrix, the soft targets it gives, and the regularised losses.

Paper: He et al., Relieving Long-tailed Instance Segmentation via Pairwise Class Balance, CVPR 2022. The equations of
the main paper are those of the authors' code (megvii-research/PCB 066cd92) and of the supplement.

M [C, C]: rows are ground truth, columns what was predicted, foreground only, zero at the start.
Letters: N RoIs, F foreground RoIs, C foreground classes.
"""

import torch
from torch import Tensor

from calib.losses.seesaw import log_weights
from calib.losses.softmax import cross_entropy


def class_sums(p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[F, C] probabilities, [F] -> [C, C] their sum and [C] their number over the rows of every class."""
    c = p.shape[1]
    return p.new_zeros(c, c).index_add(0, labels, p.detach()), torch.bincount(labels, minlength=c).to(p)


def update_confusion(matrix: Tensor, total: Tensor, count: Tensor, momentum: float, *, renormalise: bool) -> Tensor:
    """[C, C], ``class_sums`` of foreground rows -> [C, C]; rows of classes that are absent stay as they are.

    M_y <- momentum M_y + (1 - momentum) mean of p over the rows of class y; ``renormalise`` brings the row back to
    sum 1, so that the first observation replaces the row of zeros.
    """
    mean = total / count.clamp_min(1)[:, None]
    moved = momentum * matrix + (1 - momentum) * mean
    if renormalise:
        moved = moved / moved.sum(dim=1, keepdim=True).clamp_min(torch.finfo(moved.dtype).tiny)
    return torch.where((count > 0)[:, None], moved, matrix)


def soft_targets(matrix: Tensor, labels: Tensor) -> Tensor:
    """[C, C], [F] -> [F, C]: P(ground truth = i | predicted y), column y of M over its sum."""
    column = matrix[:, labels].T
    return column / column.sum(dim=1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)


def regularisation_strength(alpha: float, iteration: int, iterations: int) -> float:
    """alpha * r / (R - 1): the first of R passes is never regularised; a single pass takes all of alpha."""
    return alpha if iterations == 1 else alpha * iteration / (iterations - 1)


def pcb_softmax_parts(logits: Tensor, labels: Tensor, matrix: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """[N, C+1], [N], [C, C] -> [N] cross entropies and [N] divergences, each with its share of ``strength``.

    The loss is sum(first) / avg_factor + sum(second) / N: background rows keep their cross entropy, foreground rows
    have (1 - a) CE and a KL(p_t || softmax(z)), p_t padded with 0 for the background.
    """
    c = len(matrix)
    foreground = labels < c
    ce = cross_entropy(logits, labels) * torch.where(foreground, 1 - strength, 1.0)
    target = soft_targets(matrix, labels[foreground])
    log_q = logits[foreground].log_softmax(dim=1)[:, :c]
    kl = (torch.xlogy(target, target) - target * log_q).sum(dim=1)
    return ce, logits.new_zeros(len(labels)).masked_scatter(foreground, strength * kl)


def pcb_seesaw_parts(
    logits: Tensor, labels: Tensor, counts: Tensor, matrix: Tensor, strength: float, p: float, q: float, eps: float
) -> tuple[Tensor, Tensor]:
    """[N, C], [N], [C], [C, C] -> [N] seesaw losses and [N] soft cross entropies on the same shifted logits.

    Differs: Eq. 5 of the paper has another denominator for every target class; the code takes the weights of the true
    label for all of them.
    """
    foreground = labels < len(matrix)
    z, y = logits[foreground], labels[foreground]
    log_q = (z + log_weights(z, y, counts, p, q, eps)).log_softmax(dim=1)
    hard = -log_q.gather(1, y[:, None])[:, 0]
    soft = -(soft_targets(matrix, y) * log_q).sum(dim=1)
    zeros = logits.new_zeros(len(labels))
    first = zeros.masked_scatter(foreground, (1 - strength) * hard)
    return first, zeros.masked_scatter(foreground, strength * soft)


def pcb_sigmoid_target(target: Tensor, labels: Tensor, matrix: Tensor, strength: float) -> Tensor:
    """[N, C+1] one-hot, [N], [C, C] -> [N, C+1]: a M[:, y] + (1 - a) one-hot on foreground rows, M as it is."""
    c = len(matrix)
    foreground = labels < c
    column = matrix[:, labels.clamp_max(c - 1)].T  # [N, C]
    soft = torch.cat([strength * column + (1 - strength) * target[:, :c], target[:, c:]], dim=1)
    return torch.where(foreground[:, None], soft, target)
