"""TDE: a normalised multi-head classifier whose share along the training momentum is taken away at inference.

Paper: Tang et al., Long-Tailed Classification by Keeping the Good and Removing the Bad Momentum Causal Effect,
NeurIPS 2020; with background exempted, as its authors do for detection.

x_h, w_h: the H parts of features and weights.
Eq. 8 (training logits): y = sum_h (tau / H) x_h / (|x_h| + 1e-9) . w_h / (|w_h| + 1e-9 + gamma), no bias, plain CE.
Moving direction: e <- mu e + mean of the batch's foreground features (only its direction is used).
Eq. 9 (TDE): y_tde = y - sum_h (tau / H) alpha cos(x_h, e_h) (e_h / |e_h|) . w_h / (...).
Scores: p = softmax(y), q = softmax(y_tde): score_bg = p_bg, score_c = (1 - p_bg) q_c / sum_fg q.
Differs: the authors' detection code (KaihuaTang/Long-Tailed-Recognition.pytorch 5c916d0) averages over rows with label
> 0, a rule of frameworks whose background is 0: here it drops class 0 and keeps background; and it applies softmax to
the scores once more. Both are confirmed as slips by the author; ``official_quirks`` reproduces them.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.base import Head
from calib.heads.tde import TDEHead
from calib.losses.softmax import cross_entropy
from calib.parallel.distributed import ALONE
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, at_least, one_of
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings


@dataclass(frozen=True)
class TDE:
    """``alpha``: how much of the moving direction is removed, 0 removes nothing; it may be changed without training.

    ``direction``: shared, of the rows of all processes, or local, of those of the one that writes the head, as theirs.
    """

    heads: int = 2
    scale: float = 16.0
    gamma: float = 1 / 32
    alpha: float = 1.5
    mu: float = 0.9998
    official_quirks: bool = False
    direction: str = "shared"
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "alpha": {"range": [0.0, 3.0]},
        "lr": {"log": [0.05, 2.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
    }

    def __post_init__(self) -> None:
        at_least(self, 1, "heads")
        one_of(self, "direction", ("shared", "local"))
        at_least(self, 0, "gamma", "alpha", "mu")
        if self.mu >= 1 or self.scale <= 0:
            raise SettingError("expected mu below 1 and scale above 0")

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train a fresh classifier with natural sampling, following the features' direction."""
        d = cache.manifest.detector.feature_size
        if d % self.heads:
            raise SettingError(f"heads is {self.heads}: expected a divisor of the feature size {d}")
        head = TDEHead(
            len(cache.categories),
            d,
            heads=self.heads,
            scale=self.scale,
            gamma=self.gamma,
            alpha=self.alpha,
            official_quirks=self.official_quirks,
        )
        with torch.no_grad():
            head.weight.uniform_(-(d**-0.5), d**-0.5, generator=torch.Generator().manual_seed(context.seed))

        def objective(batch: Batch) -> Tensor:
            head.follow(batch.features, batch.labels, self.mu, batch.world if self.direction == "shared" else ALONE)
            values = cross_entropy(head.logits(batch.features), batch.labels)
            return batch.chunk_mean(values)

        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(head, objective, sampler, cache, self.loop, context, label="tde")
        return head
