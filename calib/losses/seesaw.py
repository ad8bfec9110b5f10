"""Seesaw loss: negatives of a class are weighed by how much rarer they are and by how wrongly they were scored.

Paper: Wang et al., Seesaw Loss for Long-Tailed Instance Segmentation, CVPR 2021.

Eq. 4 (weights): S_yj = M_yj * C_yj, S_yy = 1.
Eq. 6 (mitigation): M_yj = min(1, (n_j / n_y)^p), counts at least 1.
Eq. 8 (compensation): C_yj = max(1, s_j / s_y)^q, s = softmax(z), no gradient.
Eq. 3 (loss): -log( e^{z_y} / (e^{z_y} + sum_{j != y} S_yj e^{z_j}) ), computed as z_j + log S_yj.
Objectness: a two-way softmax beside the C classes; score_c = softmax(z)_c * P(object).
Differs: s_y has a floor of ``eps`` in the authors' code (open-mmlab/mmdetection 2.28.2, seesaw_loss.py), which caps C.

Letters: N RoIs, F foreground RoIs among them, C foreground classes. Labels C are background.
"""

import torch
from torch import Tensor

from calib.losses.softmax import cross_entropy


def log_weights(logits: Tensor, labels: Tensor, counts: Tensor, p: float, q: float, eps: float) -> Tensor:
    """[F, C], [F], [C] -> [F, C] log S, without gradient; ``p`` or ``q`` 0 switches a factor off."""
    n = counts.clamp_min(1)
    log_m = p * torch.log(n[None] / n[labels][:, None]).clamp_max(0)  # Eq. 6
    s = logits.detach().softmax(dim=1)
    own = s.gather(1, labels[:, None]).clamp_min(eps)
    log_c = q * torch.log(s / own).clamp_min(0)  # Eq. 8
    return (log_m + log_c).scatter(1, labels[:, None], 0.0)  # Eq. 4


def seesaw_values(logits: Tensor, labels: Tensor, counts: Tensor, p: float, q: float, eps: float) -> Tensor:
    """[N, C], [N], [C] -> [N] losses, 0 for background rows."""
    foreground = labels < logits.shape[1]
    z, y = logits[foreground], labels[foreground]
    values = cross_entropy(z + log_weights(z, y, counts, p, q, eps), y)  # Eq. 3
    return logits.new_zeros(len(labels)).masked_scatter(foreground, values)


def objectness_values(pair: Tensor, labels: Tensor, background: int) -> Tensor:
    """[N, 2] logits of (object, background), [N] -> [N] cross entropy."""
    return cross_entropy(pair, (labels == background).long())


def seesaw_scores(logits: Tensor) -> Tensor:
    """[N, C+2] (classes, object, background) -> [N, C+1]; rows sum to 1."""
    objectness = logits[:, -2:].softmax(dim=1)
    return torch.cat([logits[:, :-2].softmax(dim=1) * objectness[:, :1], objectness[:, 1:]], dim=1)


def add_counts(counts: Tensor, labels: Tensor) -> Tensor:
    """[C+1] counts with those of a batch added; background is counted at C."""
    return counts + torch.bincount(labels, minlength=len(counts)).to(counts)
