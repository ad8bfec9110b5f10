"""Classes drawn with given probabilities."""

import torch
from torch import Tensor


def classes_at(probability: Tensor, uniform: Tensor) -> Tensor:
    """[C] of sum 1, [k] in [0, 1) -> [k] classes, ascending: where the cumulated probabilities reach the numbers."""
    total = probability.double().cumsum(dim=0)
    return torch.searchsorted(total, uniform.double().sort().values).clamp_max(len(total) - 1)


def classes_per_chunk(probability: Tensor, each: int, n_chunks: int, generator: torch.Generator) -> Tensor:
    """[C] -> [K, each] classes for every chunk, drawn anew."""
    weights = probability.cpu()
    return torch.stack([classes_at(weights, torch.rand(each, generator=generator)) for _ in range(n_chunks)])
