"""Gumbel activation: scores exp(-exp(-z)), their binary cross entropy, and which negatives it leaves out.

Papers: Alexandridis et al., Long-tailed Instance Segmentation using Gumbel Optimized Loss (GOL), ECCV 2022; the
masking: Hsieh et al., DropLoss for Long-Tail Instance Segmentation, AAAI 2021.

Letters: N RoIs, C foreground classes. Labels C are background.
"""

import torch
from torch import Tensor

from calib.losses.sigmoid import one_hot

LOWEST, HIGHEST = -4.0, 10.0  # logits beyond have the loss of these, and no gradient


def gumbel(logits: Tensor) -> Tensor:
    """[N, C] -> [N, C] exp(-exp(-z))."""
    return (-(-logits).exp()).exp()


def gumbel_bce(logits: Tensor, target: Tensor) -> Tensor:
    """[N, C] each -> [N, C] binary cross entropy of exp(-exp(-z))."""
    e = (-logits.clamp(LOWEST, HIGHEST)).exp()  # -log p
    return target * e - (1 - target) * (-torch.expm1(-e)).log()


def drop_weights(labels: Tensor, is_tail: Tensor, ratio: Tensor, uniform: Tensor) -> Tensor:
    """[N], [C] of bool, [N], [N, C] in [0, 1) -> [N, C] of 0 and 1: negatives that count.

    Foreground rows put no negative pressure on tail classes; background rows do where ``uniform`` is at most ``ratio``,
    the share of tail classes among the foreground of their chunk.
    """
    foreground = labels < len(is_tail)
    left_out = is_tail & (foreground[:, None] | (uniform > ratio[:, None]))
    return 1 - left_out.to(uniform) * (1 - one_hot(labels, len(is_tail)).to(uniform))


def tail_ratio(labels: Tensor, is_tail: Tensor, chunk: Tensor, n_chunks: int) -> Tensor:
    """[N], [C], [N] -> [N] share of tail classes among the foreground of a row's chunk; 1 where there is none."""
    foreground = labels < len(is_tail)
    tail = torch.cat([is_tail, is_tail.new_zeros(1)])[labels]
    sums = torch.zeros(2, n_chunks, device=labels.device)
    sums.index_add_(1, chunk, torch.stack([tail, foreground]).float())
    return torch.where(sums[1] > 0, sums[0] / sums[1].clamp_min(1), 1.0)[chunk]
