"""EQL v2: every class's positives and negatives are weighed by the gradients it has received so far.

Paper: Tan et al., Equalization Loss v2: A New Gradient Balance Approach for Long-tailed Object Detection, CVPR 2021.
g_j: accumulated gradient of positives over that of negatives, weighted, over all rows; 100 before the first step.
Eq. 5 (weights): negative r_j = 1 / (1 + e^{-gamma (g_j - mu)}), positive q_j = 1 + alpha (1 - r_j); background 1, 1.
Eq. 4 (loss): (1/N) sum_k sum_j (q_j t + r_j (1 - t)) BCE. Scores: sigmoid(z_c) (1 - sigmoid(z_bg)).
Differs: nothing (tztztztztz/eqlv2 907fad9): weights come from the gradients before the step, those of all processes
together, C + 1 sigmoids.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from calib.cache import Cache
from calib.heads.base import Head
from calib.heads.sigmoid import SigmoidHead, fresh_sigmoid
from calib.losses.sigmoid import eql_v2_gradients, eql_v2_weights, one_hot, weighted_bce
from calib.parallel.distributed import ALONE, World
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, at_least
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings


@dataclass(frozen=True)
class EQLv2:
    """``gamma``, ``mu``: slope and centre of the weights, ``alpha``: how much positives gain."""

    gamma: float = 12.0
    mu: float = 0.8
    alpha: float = 4.0
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "gamma": {"range": [6.0, 18.0]},
        "alpha": {"range": [1.0, 8.0]},
        "lr": {"log": [0.05, 5.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "gamma", "mu", "alpha")

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train fresh sigmoids, one of them for the background."""
        c, d = len(cache.categories), cache.manifest.detector.feature_size
        head = SigmoidHead(fresh_sigmoid(c + 1, d, context.seed), has_background=True)
        balance = GradientBalance(c, self.gamma, self.mu, self.alpha)

        def objective(batch: Batch) -> Tensor:
            z = head.classifier(batch.features)
            return batch.chunk_mean(balance.values(z, one_hot(batch.labels, c + 1), batch.world))

        model = nn.ModuleDict({"head": head, "balance": balance})
        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(model, objective, sampler, cache, self.loop, context, label="eql-v2")
        return head


class GradientBalance(nn.Module):
    """What EQL v2 remembers: positive and negative gradients per class, and their ratio."""

    positive: Tensor
    negative: Tensor
    ratio: Tensor

    def __init__(self, num_classes: int, gamma: float, mu: float, alpha: float, first_ratio: float = 100.0) -> None:
        super().__init__()
        self._constants = (gamma, mu, alpha)
        self.register_buffer("positive", torch.zeros(num_classes))
        self.register_buffer("negative", torch.zeros(num_classes))
        self.register_buffer("ratio", torch.full((num_classes,), first_ratio))

    def values(self, logits: Tensor, target: Tensor, world: World = ALONE) -> Tensor:
        """[N, C+1], [N, C+1] (soft) targets -> [N] losses; then the gradients are added, those of all processes."""
        q, r = eql_v2_weights(self.ratio, *self._constants)
        weights = q * target + r * (1 - target)
        values = weighted_bce(logits, target, weights)  # Eq. 4
        positive, negative = eql_v2_gradients(logits, target, weights)
        world.all_reduce([positive, negative])
        self.positive, self.negative = self.positive + positive, self.negative + negative
        self.ratio = self.positive / (self.negative + 1e-10)
        return values
