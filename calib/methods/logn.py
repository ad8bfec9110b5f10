"""LogN: logits normalised by their statistics over training proposals.

Paper: Zhao et al., LogN: Logit Normalization for Long-Tailed Object Detection, IJCV 2024.

Eq. (calibrated): z'_c = (z_c - (mu_c - min_k mu_k)) / sqrt(max(var_c, 1e-11)) for foreground c, background untouched;
scores = softmax(z'). mu, var: mean and unbiased variance of the raw logits over all sampled training proposals.
Differs: the authors (MCG-NJU/LogN 597baa5, logit_norm_head.py) take a running mean and variance with momentum 5e-5
from 0 and 1; after one pass over LVIS 29 % of the result is still that start. Here the exact statistics of the cache
are the default, ``momentum`` above 0 gives the running ones over the cache in batches of ``batch_rows`` rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import SettingError, UnsupportedError
from calib.heads.affine import AffineHead
from calib.heads.base import Head
from calib.settings import at_least
from calib.training.bases import affine_head
from calib.training.context import FitContext

_CHUNK = 8192


@dataclass(frozen=True)
class LogN:
    """``momentum`` 0: exact statistics of the cache."""

    momentum: float = 0.0
    batch_rows: int = 512

    def __post_init__(self) -> None:
        at_least(self, 0, "momentum")
        at_least(self, 2, "batch_rows")
        if self.momentum > 1:
            raise SettingError(f"momentum is {self.momentum}: expected at most 1")

    def fit(self, cache: Cache, context: FitContext) -> Head:
        """Measure the logits, of the base or the detector, of the cache's rows; nothing is trained."""
        head = affine_head(cache, context)
        size = self.batch_rows if self.momentum else _CHUNK
        if cache.n_rows < 2:
            raise UnsupportedError(f"cache {cache.path} has {cache.n_rows} rows: a variance needs two")
        statistics = Running(self.momentum, len(cache.categories) + 1)
        with context.progress("train logn", total=cache.n_rows, unit="rows") as bar:
            for start in range(0, cache.n_rows - 1, size):  # a last row alone has no variance
                stop = min(start + size, cache.n_rows)
                statistics.add(head.logits(torch.from_numpy(cache.features.read(start, stop))))
                bar.advance(stop - start)
        return normalised(head, *statistics.result())


class Running:
    """Mean and unbiased variance per column: exact with momentum 0, else exponential averages from 0 and 1."""

    def __init__(self, momentum: float, columns: int) -> None:
        self._momentum = momentum
        self._mean, self._second = torch.zeros(columns).double(), torch.ones(columns).double()
        self._rows = 0

    def add(self, logits: Tensor) -> None:
        """[n, columns]; n must be at least 2 with a momentum."""
        z = logits.double()
        if self._momentum:
            self._mean = (1 - self._momentum) * self._mean + self._momentum * z.mean(dim=0)
            if len(z) > 1:
                self._second = (1 - self._momentum) * self._second + self._momentum * z.var(dim=0)
            return
        n, mean = self._rows + len(z), z.mean(dim=0)
        delta = mean - self._mean
        inner = (z - mean).square().sum(dim=0) + delta.square() * self._rows * len(z) / n
        self._second = inner if self._rows == 0 else self._second + inner
        self._mean, self._rows = self._mean + delta * len(z) / n, n

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, [columns] each."""
        return self._mean, self._second if self._momentum else self._second / (self._rows - 1)


def normalised(head: AffineHead, mean: Tensor, variance: Tensor) -> AffineHead:
    """Fill ``head`` from [C+1] statistics, background last; the background counts with mean 0 in the minimum."""
    mu = torch.cat([mean[:-1], mean.new_zeros(1)])
    shift = mu[:-1] - mu.min()
    scale = variance[:-1].clamp_min(1e-11) ** -0.5
    return head.set(scale=scale, shift=-shift * scale)
