"""Discriminant head: one Gaussian per class with a shared covariance, in closed form, pooled with a base.

Papers: Fisher, The Use of Multiple Measurements in Taxonomic Problems, Annals of Eugenics 1936; the shrinkage:
Friedman, Regularized Discriminant Analysis, JASA 1989. The pool with a base is this project's own.

Over the foreground rows x of training, y their classes, n_c rows of class c, mu_c their mean, R = x - mu_y:
Eq. 1 (covariance): S = sum_k n_{y_k}^-e R_k R_k^T / sum_k n_{y_k}^-e; e = 0 every row alike, e = 1 every class.
Eq. 2 (shrinkage): S' = (1 - s) S + s (tr S / D) I.
Eq. 3 (log-likelihood of class c, up to a constant): g_c = mu_c^T S'^-1 x - 1/2 mu_c^T S'^-1 mu_c.
Eq. 4 (base): z'_c = z_c - tau (log N_c - min_k log N_k), N_c = ``instance_count``; p_bg from softmax(z', z_bg).
Eq. 5 (scores): score_c = (1 - p_bg) q_c, q = softmax over the foreground of (m / T) g + (1 - m) z'.
Differs: the background, which is no Gaussian, is the base's. A sigmoid base's logits are log odds against background,
whose logit is then 0. A class without rows scores 0.
"""

from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import InputError, SettingError, UnsupportedError
from calib.heads.base import Head
from calib.heads.discriminant import DiscriminantHead
from calib.heads.linear import LinearClassifier, Logits
from calib.heads.objectness import ObjectnessHead
from calib.losses.margin import anchored
from calib.settings import at_least
from calib.training.bases import activation_of, base_logits
from calib.training.context import FitContext

LARGEST = 4096  # of D: a covariance then takes 128 MiB, and every row 16 million products


ROWS = 8192  # at a time


ROUNDING = 1e-12  # shares of what they are computed from below which numbers are its rounding


@dataclass(frozen=True)
class Discriminant:
    """``m``: share of the Gaussians in the pool, 1 for them alone; ``T``: their temperature; ``s``: shrinkage; ``e``:
    how far classes count alike in the covariance; ``tau``: logit adjustment of the base."""

    m: float = 0.7
    T: float = 8.0
    s: float = 0.4
    e: float = 0.5
    tau: float = 0.4

    space: ClassVar[dict[str, Any]] = {
        "m": {"range": [0.0, 1.0]},
        "T": {"log": [1.0, 12.0]},
        "s": {"log": [0.02, 0.9]},
        "e": {"choice": [0.5, 0.0, 1.0]},  # each reads the features once; what else is drawn only solves again
        "tau": {"range": [0.0, 1.2]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "m", "s", "e", "tau")
        if max(self.m, self.s) > 1 or not self.T > 0:
            raise SettingError(f"m is {self.m}, s {self.s}, T {self.T}: expected m and s in [0, 1], T above 0")

    def fit(self, cache: Cache, context: FitContext) -> Head:
        """Measure means and covariance of the cache's foreground rows and solve; nothing is trained."""
        flags = {"has_background": activation_of(cache, context) != "sigmoid", "detector_logits": context.base is None}
        head = DiscriminantHead(_below(cache, context), self.m, **flags)
        classes = measured(cache, self.e, context)
        for own, found in zip((head.gaussians.weight, head.gaussians.bias), discriminant(classes, self.s), strict=True):
            assert own is not None
            own.copy_(self.m / self.T * found)
        head.shift = anchored(torch.from_numpy(cache.categories.instance_count), self.tau, "rare").float()
        head.present = classes.count > 0
        return head


def _below(cache: Cache, context: FitContext) -> Logits:
    """What gives the base's logits; of a seesaw detector the logarithms of its scores."""
    if context.base is None and cache.manifest.detector.activation == "seesaw":
        return ObjectnessHead(LinearClassifier.of(cache.classifier), detector_logits=True)
    return base_logits(cache, context)


@dataclass(frozen=True)
class Measured:
    """Rows [C] and means [C, D] of the classes, and the covariance [D, D] of Eq. 1 within them, in float64."""

    count: Tensor
    mean: Tensor
    covariance: Tensor


_KNOWN: WeakKeyDictionary[Cache, dict[tuple[float, str], Measured]] = WeakKeyDictionary()


def measured(cache: Cache, e: float, context: FitContext) -> Measured:
    """What ``cache`` holds of its classes, read once for as long as it is open: other settings solve again.

    Raises:
        UnsupportedError: the features are too wide. InputError: no foreground row.
    """
    known, key = _KNOWN.setdefault(cache, {}), (e, str(context.device))
    if key not in known:
        known[key] = _measure(cache, e, context)
    return known[key]


def _measure(cache: Cache, e: float, context: FitContext) -> Measured:
    c, d = cache.background, cache.manifest.detector.feature_size
    if d > LARGEST:
        raise UnsupportedError(
            f"cache {cache.path} has features of {d} numbers: a covariance of {d} x {d}; at most {LARGEST} x {LARGEST} "
            "are solved for",
            hint="natural, crt and residual take features of any size",
        )
    rows = np.flatnonzero((cache.labels >= 0) & (cache.labels < c))
    if len(rows) == 0:
        raise InputError(f"cache {cache.path} has no foreground row", hint="extract with --mode train")
    labels = torch.from_numpy(cache.labels[rows].astype(np.int64)).to(context.device)
    count = torch.bincount(labels, minlength=c).double()
    weight = count.clamp_min(1) ** -e
    total, products = (torch.zeros(n, d, dtype=torch.float64, device=context.device) for n in (c, d))
    with context.progress("train discriminant", total=len(rows), unit="rows") as bar:
        for start in range(0, len(rows), ROWS):
            part = slice(start, start + ROWS)
            x = torch.from_numpy(cache.features.take(rows[part])).to(context.device).double()
            total.index_add_(0, labels[part], x)
            products.addmm_(x.T * weight[labels[part]], x)
            bar.advance(len(x))
    mean = total / count.clamp_min(1)[:, None]
    within = products - (mean.T * (weight * count)) @ mean  # around the means of the classes instead of 0
    if within.trace() <= ROUNDING * products.trace():
        within = torch.zeros_like(within)  # what is left is the rounding of the subtraction
    return Measured(count.cpu(), mean.cpu(), (within / (weight * count).sum()).cpu())


def discriminant(classes: Measured, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Weights [C, D] and biases [C] of g (Eq. 3).

    Raises:
        InputError: the covariance has no inverse.
    """
    s = classes.covariance
    s = (1 - shrinkage) * s + shrinkage * s.diagonal().mean() * torch.eye(len(s), dtype=s.dtype)  # Eq. 2
    factor, failed = torch.linalg.cholesky_ex(s)
    if int(failed) or not bool(factor.diagonal().square().min() > ROUNDING * s.diagonal().max()):
        raise InputError(
            f"the covariance within {int((classes.count > 0).sum())} classes of {int(classes.count.sum())} rows has no "
            f"inverse with a shrinkage of {shrinkage:g}",
            hint="--set s=0.3; where every class has one row, nothing varies within any",
        )
    weight = torch.cholesky_solve(classes.mean.T, factor).T
    return weight, -0.5 * (weight * classes.mean).sum(dim=1)
