"""Residual head: a linear layer and, beside it, a branch of two layers that corrects it.

Paper: none, this project's own; the branch is a residual connection (He et al., CVPR 2016) around the classifier, its
dropout that of Srivastava et al., JMLR 2014.
Eq. (logits): z = W_0 x + b_0 + W_2 dropout(relu(W_1 x + b_1)) + b_2, scores = softmax(z). W_0, b_0 start as the layer
of the detector or the base and are trained on; W_2 and b_2 start at 0, so that step 0 is the base.
Eq. (loss): L = mean over rows of CE(z + tau log pi), rows drawn uniformly, AdamW.
Differs: nothing is balanced with ``tau`` 0; the prior is then taken out of the logits after training, by a head of
``logit-adjustment`` that is built on this one, with its own tau chosen on a tune split.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.base import Head
from calib.heads.residual import ResidualHead
from calib.losses.margin import anchored, shifted_values
from calib.sampling.uniform import UniformSampler
from calib.settings import AdamLoop, at_least
from calib.training.bases import base_layer
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings


def _loop() -> AdamLoop:
    return AdamLoop(steps=2500, lr=1e-3, weight_decay=0.05, schedule="cosine", warmup_steps=100)


@dataclass(frozen=True)
class Residual:
    """``hidden``: width of the branch; ``dropout``: share of it that a row does without; ``tau``: logit adjustment in
    the loss."""

    hidden: int = 1024
    dropout: float = 0.5
    tau: float = 0.0
    rows_per_step: int = 2048
    loop: AdamLoop = field(default_factory=_loop)

    space: ClassVar[dict[str, Any]] = {
        "dropout": {"range": [0.0, 0.8]},
        "tau": {"range": [0.0, 1.0]},
        "hidden": {"choice": [1024, 512]},
        "lr": {"log": [0.0002, 0.005]},
        "weight_decay": {"log": [0.001, 0.3]},
    }

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden", "rows_per_step")
        at_least(self, 0, "dropout", "tau")
        if not self.dropout < 1:
            raise SettingError(f"dropout is {self.dropout}: expected a share below 1")

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train the layer on and the branch beside it."""
        head = ResidualHead(base_layer(cache, context), self.hidden)
        head.reset(torch.Generator().manual_seed(context.seed))
        adjustment = anchored(torch.from_numpy(cache.categories.instance_count), self.tau, "rare")
        shift = torch.cat([adjustment, adjustment.new_zeros(1)]).float().to(context.device)

        def objective(batch: Batch) -> Tensor:
            z = head.logits(batch.features, self._kept(batch))
            return batch.row_mean(shifted_values(z, batch.labels, shift))

        sampler = UniformSampler(cache, rows_per_step=self.rows_per_step, seed=context.seed)
        yield Training(head, objective, sampler, cache, self.loop, context, label="residual")
        return head

    def _kept(self, batch: Batch) -> Tensor | None:
        """[n, H] factors of dropout, drawn for all rows of the step: 0, or 1 / (1 - dropout)."""
        if self.dropout == 0:
            return None
        kept = torch.empty(len(batch.all_labels), self.hidden).bernoulli_(1 - self.dropout, generator=batch.generator)
        return batch.world.shard(kept).to(batch.features.device) / (1 - self.dropout)
