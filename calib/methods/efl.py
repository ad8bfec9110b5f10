"""EFL: a focal loss whose focusing grows, class by class, with the imbalance of the gradients received.

Paper: Li et al., Equalized Focal Loss for Dense Long-Tailed Object Detection, CVPR 2022.
g_j: accumulated gradient of positives over that of negatives, in [0, 1]; 1 before the first step.
Eq. (focusing): gamma_j = gamma + s (1 - g_j).
Eq. (loss): -sum_k sum_j alpha_t (gamma_j / gamma) (1 - p_t)^gamma_j log p_t, divided by the foreground rows.
Eq. (scores): sigmoid(z).
Differs: nothing (ModelTC/United-Perception 52aaeb9): gradients are those of the loss, focal factors in them, of all
processes together. The authors train dense heads on every location; here rows are proposals, of which far fewer are
background. Fresh C sigmoids, biases -log(999).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.base import Head
from calib.heads.sigmoid import SigmoidHead, fresh_sigmoid
from calib.losses.sigmoid import equalized_focal, one_hot
from calib.losses.softmax import chunk_weights
from calib.parallel.distributed import ALONE, World
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, at_least
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings


@dataclass(frozen=True)
class EFL:
    """``gamma``: focusing of a balanced class; ``scale``: s, how much an imbalanced one gains, 0 for the plain focal
    loss; ``alpha``: weight of positives, 1 - alpha that of negatives."""

    gamma: float = 2.0
    scale: float = 8.0
    alpha: float = 0.25
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "gamma": {"range": [0.5, 3.0]},
        "scale": {"range": [0.0, 8.0]},
        "lr": {"log": [0.1, 10.0]},
        "weight_decay": {"log": [1e-07, 0.0001]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "gamma", "scale", "alpha")
        if self.gamma == 0:
            raise SettingError("gamma is 0: the weight of a class is its focusing over gamma", hint="--set gamma=2")
        if self.alpha > 1:
            raise SettingError(f"alpha is {self.alpha}: expected a number in [0, 1]")

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train fresh sigmoids."""
        c = len(cache.categories)
        head = SigmoidHead(fresh_sigmoid(c, cache.manifest.detector.feature_size, context.seed))
        balance = FocusBalance(c, self.gamma, self.scale, self.alpha)

        def objective(batch: Batch) -> Tensor:
            found = chunk_weights((batch.all_labels < c).float(), batch.all_chunk, batch.n_chunks).clamp_min(1)
            share = 1 / (batch.n_chunks * found[batch.chunk])
            values = balance.values(head.classifier(batch.features), one_hot(batch.labels, c), share, batch.world)
            return (share * values).sum()

        model = nn.ModuleDict({"head": head, "balance": balance})
        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(model, objective, sampler, cache, self.loop, context, label="efl")
        return head


class FocusBalance(nn.Module):
    """What EFL remembers: positive and negative gradients per class, and their ratio in [0, 1]."""

    positive: Tensor
    negative: Tensor
    ratio: Tensor

    def __init__(self, num_classes: int, gamma: float, scale: float, alpha: float) -> None:
        super().__init__()
        self._gamma, self._scale, self._alpha = gamma, scale, alpha
        self.register_buffer("positive", torch.zeros(num_classes))
        self.register_buffer("negative", torch.zeros(num_classes))
        self.register_buffer("ratio", torch.ones(num_classes))

    def values(self, logits: Tensor, target: Tensor, share: Tensor, world: World = ALONE) -> Tensor:
        """[N, C], [N, C], [N] what a row counts in the loss -> [N] losses; then the gradients are added, those of all
        processes."""
        focusing = self._gamma + self._scale * (1 - self.ratio)  # Eq. (focusing)
        values, gradient = equalized_focal(logits, target, focusing, self._gamma, self._alpha)  # Eq. (loss)
        gradient = gradient * share[:, None]
        positive, negative = (gradient * target).sum(dim=0), (gradient * (1 - target)).sum(dim=0)
        world.all_reduce([positive, negative])
        self.positive, self.negative = self.positive + positive, self.negative + negative
        self.ratio = (self.positive / (self.negative + 1e-10)).clamp(0, 1)
        return values
