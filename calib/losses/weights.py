"""Class weights from counts. All return [C+1] with 1 for the background, last.

A class without samples counts as one sample.
"""

import torch
from torch import Tensor


def power_class_weights(counts: Tensor, rho: float) -> Tensor:
    """Generalised re-weighting: u_c = (n_c / sum n)^-rho, w_c = C u_c / sum u, mean 1 over the foreground.

    Zhang et al., Distribution Alignment, CVPR 2021, Eq. 11 up to scale.
    """
    n = counts.double().clamp_min(1)
    u = (n / n.sum()) ** -rho  # Eq. 11
    return _with_background(len(n) * u / u.sum())


def clipped_class_weights(counts: Tensor, beta: float | None, low: float, high: float) -> Tensor:
    """clip(u / mean u, low, high) with u = 1/n, or with ``beta`` the effective number u = (1 - beta) / (1 - beta^n).

    The baselines of Li et al., Balanced Group Softmax, CVPR 2020; effective number: Cui et al., CVPR 2019, Eq. 2.
    """
    n = counts.double().clamp_min(1)
    u = 1 / n if beta is None else (1 - beta) / (1 - beta**n)
    return _with_background((u / u.mean()).clamp(low, high))


def reference_class_weights(counts: Tensor, reference: float, low: float, high: float) -> Tensor:
    """clip(reference / n, low, high): the re-weighting baseline of Wang et al., SimCal, ECCV 2020, Sec. 4.1."""
    return _with_background((reference / counts.double().clamp_min(1)).clamp(low, high))


def _with_background(w: Tensor) -> Tensor:
    return torch.cat([w, w.new_ones(1)]).float()
