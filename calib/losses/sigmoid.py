"""Losses of sigmoid classifiers: EQL, EQL v2, balanced sigmoid, sigmoid focal, ECM, EFL.

Papers: Tan et al., Equalization Loss for Long-Tailed Object Recognition, CVPR 2020 (EQL); Tan et al., Equalization
Loss v2, CVPR 2021; Ren et al., Balanced Meta-Softmax, NeurIPS 2020 (the authors' detection form); Lin et al., Focal
Loss, ICCV 2017; Cho and Krahenbuhl, Effective Class-Margins (ECM), ECCV 2022; Li et al., Equalized Focal Loss (EFL),
CVPR 2022.

Letters: N RoIs, C foreground classes, K = C or C+1 columns. Labels C are background. All values are sums over columns
per RoI: their mean over RoIs is the papers' (1/N) sum_k sum_j.
"""

import torch
from torch import Tensor
from torch.nn import functional

from calib.losses.softmax import complement


def one_hot(labels: Tensor, columns: int) -> Tensor:
    """[N] -> [N, K] targets; labels beyond the columns (background without a column) give rows of 0."""
    return (labels[:, None] == torch.arange(columns, device=labels.device)).float()


def weighted_bce(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """[N, K] each -> [N] sum_j w_j BCE(z_j, t_j)."""
    bce = functional.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none")
    return (bce * weights).sum(dim=1)


def eql_weights(labels: Tensor, is_tail: Tensor) -> Tensor:
    """[N], [C] of bool -> [N, C]: foreground rows put no negative pressure on tail classes (EQL, Eq. 3, 4)."""
    foreground = (labels < len(is_tail)).float()[:, None]
    return 1 - foreground * is_tail.float()[None] * (1 - one_hot(labels, len(is_tail)))  # Eq. 3


def eql_values(logits: Tensor, labels: Tensor, is_tail: Tensor) -> Tensor:
    """[N, C], [N], [C] -> [N]."""
    return weighted_bce(logits, one_hot(labels, logits.shape[1]), eql_weights(labels, is_tail))


def eql_v2_weights(ratio: Tensor, gamma: float, mu: float, alpha: float) -> tuple[Tensor, Tensor]:
    """[C] gradient ratio -> [C+1] positive and negative weights, 1 for the background column (EQL v2, Eq. 5, 6)."""
    negative = torch.sigmoid(gamma * (ratio - mu))  # Eq. 5, 6
    positive = 1 + alpha * (1 - negative)  # Eq. 5
    one = ratio.new_ones(1)
    return torch.cat([positive, one]), torch.cat([negative, one])


def eql_v2_gradients(logits: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """[N, C+1] each -> [C], [C] sums of weighted |dL/dz| of positives and of negatives, without gradient."""
    g = (logits.detach().sigmoid() - target).abs() * weights
    return (g * target).sum(dim=0)[:-1], (g * (1 - target)).sum(dim=0)[:-1]


def eql_v2_scores(logits: Tensor) -> Tensor:
    """[N, C+1] -> [N, C+1]: sigmoid(z_c) (1 - sigmoid(z_bg)), background last."""
    p = logits.sigmoid()
    return torch.cat([p[:, :-1] * (1 - p[:, -1:]), p[:, -1:]], dim=1)


def balanced_sigmoid_values(logits: Tensor, labels: Tensor, image_frequency: Tensor) -> Tensor:
    """[N, C], [N], [C] share of images -> [N]; foreground rows see z - log((1 - f) / f)."""
    shift = torch.logit(image_frequency)  # -log((1 - f) / f)
    foreground = (labels < logits.shape[1])[:, None]
    target = one_hot(labels, logits.shape[1])
    return weighted_bce(torch.where(foreground, logits + shift, logits), target, torch.ones_like(target))


def sigmoid_focal_values(logits: Tensor, labels: Tensor, gamma: float, alpha: float) -> Tensor:
    """[N, K], [N] -> [N] sum_j alpha_t (1 - p_t)^gamma BCE, gradient through the factor (focal loss, Eq. 5)."""
    target = one_hot(labels, logits.shape[1])
    p = logits.sigmoid()
    p_t = p * target + (1 - p) * (1 - target)
    alpha_t = alpha * target + (1 - alpha) * (1 - target)
    bce = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (alpha_t * complement(p_t) ** gamma * bce).sum(dim=1)  # Eq. 5


def ecm_shift(counts: Tensor, power: float) -> Tensor:
    """[K] counts of positives -> [K] log n^power - log m^power, m the counts of all others (ECM)."""
    n = counts.double()
    return (power * (n.log() - (n.sum() - n).log())).float()


def ecm_weights(counts: Tensor) -> Tensor:
    """[K] counts of positives -> [K] a log((1 + a) / a), a = m / n; m the counts of all others (ECM, Theorem 2)."""
    n = counts.double()
    a = (n.sum() - n) / n
    return (a * torch.log1p(1 / a)).float()


def equalized_focal(
    logits: Tensor, target: Tensor, focusing: Tensor, gamma: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """[N, C], [N, C], [C] -> [N] sum_j alpha_t (f_j / gamma) (1 - p_t)^f_j (-log p_t), and [N, C] the size of its
    gradient by every logit (EFL)."""
    log_p = functional.logsigmoid(torch.where(target > 0, logits, -logits))  # of the true answer
    p = log_p.exp()
    factor = (alpha * target + (1 - alpha) * (1 - target)) * (focusing / gamma) * complement(p) ** focusing
    with torch.no_grad():
        gradient = factor * (1 - p - focusing * p * log_p)
    return -(factor * log_p).sum(dim=1), gradient
