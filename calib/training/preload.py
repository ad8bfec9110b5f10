"""Features kept in a device's memory: where they fit, a step reads nothing and copies row numbers only."""

import numpy as np
import torch

from calib.cache import Cache
from calib.errors import InputError
from calib.progress import Progress, silent

ROWS = 1 << 16  # read at a time


def preload(cache: Cache, device: torch.device, *, progress: Progress = silent) -> None:
    """Copy the features of ``cache``, of a cascade those of all stages, to ``device``; trainings there on this object
    then take their batches from the copy, the same numbers.

    Raises:
        InputError: they do not fit. NonFiniteError: NaN or infinity among them.
    """
    with progress("preload features", total=len(cache.stages) * cache.n_rows, unit="rows") as bar:
        for rows in (stage.features for stage in cache.stages):
            dtype = getattr(torch, rows.dtype.name)
            try:
                copy = torch.empty(rows.shape, dtype=dtype, device=device)
            except RuntimeError as e:  # of which torch's out-of-memory errors are
                size = rows.shape[0] * rows.shape[1] * rows.dtype.itemsize
                raise InputError(
                    f"the features of {cache.path} take {size / 1e9:.1f} GB, which {device} does not have",
                    hint="train without --preload: batches are read from the cache",
                ) from e
            for start in range(0, rows.shape[0], ROWS):
                part = copy[start : start + ROWS]
                part.copy_(torch.from_numpy(rows.checked(np.arange(start, start + len(part)))))
                bar.advance(len(part))
            rows.preloaded = copy
