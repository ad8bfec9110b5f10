"""rfs_*: repeat factors of images, and the two ways of rounding them."""

import numpy as np
import torch

from calib.sampling.repeat_factor import ceil_copies, repeat_factors, stochastic_copies

from .case import Case


def check(case: Case) -> None:
    offsets = case["offsets"].numpy()
    n = len(offsets) - 1
    image = np.repeat(np.arange(n), np.diff(offsets))
    factors = repeat_factors(image, case["cats"].numpy(), n, case.hyper["t"])
    case.check("repeat_factor_mmdet", torch.from_numpy(factors))
    case.check("repeat_factor_d2", torch.from_numpy(factors))
    case.check("repeat_indices_mmdet_ceil", torch.from_numpy(np.repeat(np.arange(n), ceil_copies(factors))))
    # One epoch of theirs, drawn by their generator: every image floor or ceil of its factor; ours alike, on average r.
    theirs = np.bincount(case["epoch_indices_d2_seeded"].numpy(), minlength=n)
    rng = np.random.default_rng(0)
    ours = np.stack([stochastic_copies(factors, rng) for _ in range(4000)])
    for copies in (theirs, *ours[:50]):
        assert ((copies >= np.floor(factors)) & (copies <= np.ceil(factors))).all()
    assert np.abs(ours.mean(axis=0) - factors).max() < 0.05
