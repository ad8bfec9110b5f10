"""Softmax losses that move or bend the logits: focal, class-aware margin, prior-shifted, by inverse frequency.

Papers: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017; Cao et al., Learning Imbalanced Datasets with
Label-Distribution-Aware Margin Loss (LDAM), NeurIPS 2019; Ren et al., Balanced Meta-Softmax, NeurIPS 2020; Menon et
al., Long-Tail Learning via Logit Adjustment, ICLR 2021; Alexandridis et al., Inverse Image Frequency, IEEE TIP 2023.

Letters: N RoIs, K columns (C foreground classes, and the background last where there is one).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from calib.losses.softmax import complement, cross_entropy


def focal_values(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """[N, K], [N] -> [N] (1 - p_y)^gamma * -log p_y, gradient through the factor (focal loss, Eq. 4)."""
    log_p = logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
    return -(complement(log_p.exp()) ** gamma) * log_p  # Eq. 4


def class_margins(counts: Tensor, largest: float) -> Tensor:
    """[K] counts -> [K] margins largest * n_j^-1/4 / max_k n_k^-1/4 (LDAM, Eq. 13); an infinite count gives 0."""
    m = counts.double() ** -0.25
    return (largest * m / m.max()).float()


def margin_values(logits: Tensor, labels: Tensor, margins: Tensor, scale: float) -> Tensor:
    """[N, K], [N], [K] -> [N] cross entropy of scale * (z - m_y at the label) (LDAM, Eq. 14)."""
    moved = logits - torch.zeros_like(logits).scatter(1, labels[:, None], margins[labels][:, None])
    return cross_entropy(scale * moved, labels)


def log_prior(counts: Tensor) -> Tensor:
    """[K] -> [K] log n (Balanced Meta-Softmax, Eq. 3); a class without samples counts as one sample."""
    return counts.double().clamp_min(1).log().float()


def logit_adjustment(counts: Tensor, tau: float) -> Tensor:
    """[K] -> [K] log(pi^tau + 1e-12), pi = n / sum n (Menon et al., Eq. 10); the authors' code has the 1e-12."""
    pi = counts.double() / counts.double().sum()
    return (pi**tau + 1e-12).log()


def shifted_values(logits: Tensor, labels: Tensor, shift: Tensor) -> Tensor:
    """[N, K], [N], [K] -> [N] CE(z + shift): balanced softmax with log n, the adjusted loss with log pi^tau."""
    return cross_entropy(logits + shift, labels)


def anchored(counts: Tensor, tau: float, anchor: str) -> Tensor:
    """[C] -> [C] adjustments tau log pi + constant; what is subtracted after training, added in the loss."""
    adjustment = logit_adjustment(counts.clamp_min(1), tau)
    if anchor == "rare":
        return adjustment - adjustment.min()
    if anchor == "uniform":
        return adjustment + tau * torch.log(torch.tensor(float(len(counts))))
    return adjustment


_FREQUENCY: dict[str, Callable[[Tensor], Tensor]] = {
    "raw": lambda p: -p.log(),
    "prob": lambda p: -p.logit(),
    "normit": lambda p: -torch.special.ndtri(p),
    "gombit": lambda p: -(-torch.log1p(-p)).log(),
    "base2": lambda p: -p.log2(),
    "base10": lambda p: -p.log10(),
}
FREQUENCY_FORMS = ("raw", "smooth", *tuple(_FREQUENCY)[1:])


def inverse_frequency(counts: Tensor, total: int, form: str) -> Tensor:
    """[C] of ``total`` -> [C] weights of IIF in one of FREQUENCY_FORMS; shares stay within half a count of 0 and 1."""
    if form == "smooth":
        return (torch.tensor(float(total + 1), dtype=torch.double) / (counts.double() + 1)).log() + 1
    half = 0.5 / max(total, 1)
    return _FREQUENCY[form]((counts.double() / max(total, 1)).clamp(half, 1 - half))
