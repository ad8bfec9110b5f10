"""LOCE's equilibrium loss: margins from the mean scores that classes have had.

Paper: Feng et al., Exploring Classification Equilibrium in Long-Tailed Object Detection, ICCV 2021.

Letters: N RoIs, C foreground classes, E entries: objects of the batch, or classes drawn from a memory.
"""

import torch
from torch import Tensor

from calib.losses.softmax import cross_entropy


def equilibrium_values(logits: Tensor, labels: Tensor, mean_score: Tensor) -> Tensor:
    """[N, C+1], [N], [C+1] -> [N] -log(m_y e^{z_y} / sum_k m_k e^{z_k})."""
    return cross_entropy(logits + mean_score.log(), labels)


def updated_scores(mean_score: Tensor, entry: Tensor, label: Tensor, momentum: float) -> Tensor:
    """[C+1], [E] mean scores of entries, [E] their classes -> [C+1]: m_c <- a m_c + (1 - a) mean of the class's
    entries, a = momentum^entries; classes without an entry stay."""
    number = torch.bincount(label, minlength=len(mean_score)).to(mean_score)
    total = mean_score.new_zeros(len(mean_score)).index_add(0, label, entry)
    a = momentum**number
    return a * mean_score + (1 - a) * total / number.clamp_min(1)


def drawing_probability(mean_score: Tensor) -> Tensor:
    """[C+1] -> [C] probability of a class to be drawn from the memory: inverse to its mean score."""
    inverse = 1 / (mean_score[:-1] + 1e-7)
    return inverse / inverse.sum()
