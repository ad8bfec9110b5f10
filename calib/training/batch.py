"""The rows of one training step, and what a loss is to the training loop.

Letters: N rows of a step, n of them those of this process (all, where it is alone), D feature size, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.losses.softmax import chunk_mean, chunk_weights
from calib.parallel.distributed import ALONE, World


@dataclass(frozen=True)
class Batch:
    """Rows of one step on the device: features [n, D], labels [n] (C = background), chunk [n] of ``n_chunks``.

    ``generator`` is seeded by (seed, step), on the CPU; ``step`` counts from 0. The features are overwritten by the
    next step. Where several processes train together, each has the features of its own n rows, and all know the labels
    and chunks of all N: they draw for all and divide by the weights of all, so that their losses sum to that of one
    process. ``rows`` [N]: where they lie in the cache. The last rows are none of the sampler's:
    ``added`` says how many were put behind it, part by part.
    """

    step: int
    features: Tensor
    all_labels: Tensor
    all_chunk: Tensor
    n_chunks: int
    world: World = ALONE
    generator: torch.Generator = field(default_factory=torch.Generator)
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    added: tuple[int, ...] = ()

    @cached_property
    def labels(self) -> Tensor:
        """[n]."""
        return self.own(self.all_labels)

    @cached_property
    def chunk(self) -> Tensor:
        """[n]."""
        return self.own(self.all_chunk)

    def own(self, values: Tensor) -> Tensor:
        """[N, ...] -> [n, ...] of the rows of this process."""
        if not self.added:
            return self.world.shard(values)
        parts = torch.split(values, [len(values) - sum(self.added), *self.added])
        return torch.cat([self.world.shard(part) for part in parts])

    def extended(self, features: Tensor, labels: Tensor, chunk: Tensor) -> Self:
        """The batch and M more rows behind it: features [m, D] of this process (``world.shard`` of all), labels and
        chunks [M] of all."""
        return replace(
            self,
            features=torch.cat([self.features, features]),
            all_labels=torch.cat([self.all_labels, labels]),
            all_chunk=torch.cat([self.all_chunk, chunk]),
            added=(*self.added, len(labels)),
        )

    def chunk_mean(self, values: Tensor, class_weights: Tensor | None = None) -> Tensor:
        """[n], [C+1] -> this process's part of the mean over chunks (``losses.softmax.chunk_mean``)."""
        weights = torch.ones_like(self.all_labels, dtype=values.dtype)
        if class_weights is not None:
            weights = class_weights[self.all_labels]
        total = chunk_weights(weights, self.all_chunk, self.n_chunks)
        return chunk_mean(values, self.chunk, self.n_chunks, self.own(weights), total)

    def row_mean(self, values: Tensor) -> Tensor:
        """[n] -> this process's part of the mean over all N rows."""
        return values.sum() / len(self.all_labels)


Objective = Callable[[Batch], Tensor]


class FusedLoss(ABC):
    """An objective that also computes its gradient itself, faster than autograd in bfloat16."""

    @abstractmethod
    def __call__(self, batch: Batch) -> Tensor:
        """The loss, for autograd."""

    @abstractmethod
    def gradients(self, batch: Batch) -> Tensor:
        """The loss; its gradient, computed by products in bfloat16, is put into ``grad`` of the parameters."""
