"""DisAlign: a learned per-class scale and shift of the logits, blended by a per-proposal confidence.

Paper: Zhang et al., Distribution Alignment: A Unified Framework for Long-tail Visual Recognition, CVPR 2021.

Eq. 4 (confidence): s = sigmoid(x v^T + c), one number per proposal.
Eq. 5 (aligned): z'_k = s (alpha_k z_k + beta_k) + (1 - s) z_k for foreground k; the background logit is untouched.
Eq. 6 as printed: z'_k = (1 + s alpha_k) z_k + s beta_k (``parametrisation="eq6"``).
Eq. 11 (weights): w_k proportional to instance_count_k^-rho, mean 1 over the foreground, background 1.
Loss: (1/K) sum_k sum_{i in chunk k} w_{y_i} CE_i / sum_{i in chunk k} w_{y_i}.
Differs: eq. 5 and eq. 6 disagree in the paper; detection code (cvpods 2deea5dc, disalign_fast_rcnn.py) has eq. 5,
the default. Eq. 11 normalises to sum 1; the code to mean 1, which matters beside the background's weight of 1.
``base="cosine"`` first fits a cosine classifier (scale from 20) to the cache, as the paper's stage 1 does.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.cache import Cache
from calib.heads.aligned import AlignedHead
from calib.heads.base import Head
from calib.heads.linear import LinearHead, Logits
from calib.losses.softmax import cross_entropy
from calib.losses.weights import power_class_weights
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, at_least, one_of
from calib.training.bases import base_logits
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings
from calib.training.retrain import classifier_from


def _loop() -> Loop:
    # Authors' v0.5 recipe: 4,500 steps of 16 images, x0.1 at 4,000, decay on all four tensors.
    return Loop(steps=4500, lr=0.02, milestones=(8 / 9,), warmup_steps=1000)


@dataclass(frozen=True)
class DisAlign:
    """``rho``: strength of the re-weighting (0.8 in the paper's detection experiments).

    ``magnitude`` (alpha), ``margin`` (beta) and ``confidence`` (s, else 1) can each be switched off, as in Table 6.
    """

    rho: float = 0.8
    parametrisation: str = "eq5"
    base: str = "detector"
    magnitude: bool = True
    margin: bool = True
    confidence: bool = True
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=_loop)
    base_loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "set": {"base": "cosine"},
        "rho": {"range": [0.0, 1.5]},
        "lr": {"log": [0.02, 2.0]},
        "base_loop.lr": {"log": [0.05, 2.0]},
        "base_loop.weight_decay": {"log": [1e-06, 0.001]},
    }
    space_on_base: ClassVar[dict[str, Any]] = {"rho": {"range": [0.0, 1.5]}, "lr": {"log": [0.02, 2.0]}}

    def __post_init__(self) -> None:
        at_least(self, 0, "rho")
        one_of(self, "parametrisation", ("eq5", "eq6"))
        one_of(self, "base", ("detector", "cosine"))

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Freeze the classifier, train alpha, beta, v and c with natural sampling."""
        head = AlignedHead(
            (yield from self._base(cache, context)),
            self.parametrisation,
            detector_logits=self.base == "detector" and context.base is None,
            uses_confidence=self.confidence,
        )
        head.reset(torch.Generator().manual_seed(context.seed))
        head.alpha.requires_grad_(self.magnitude)
        head.beta.requires_grad_(self.margin)
        head.confidence.requires_grad_(self.confidence)
        weights = power_class_weights(torch.from_numpy(cache.categories.instance_count), self.rho).to(context.device)

        def objective(batch: Batch) -> Tensor:
            values = cross_entropy(head.aligned(batch.features), batch.labels)
            return batch.chunk_mean(values, weights)

        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(head, objective, sampler, cache, self.loop, context, label="disalign")
        return head

    def _base(self, cache: Cache, context: FitContext) -> Trainings[Logits]:
        if self.base == "detector":
            return base_logits(cache, context)
        head = LinearHead(classifier_from(cache, context, "cosine", len(cache.categories) + 1))
        head.requires_grad_(True)  # the scale too

        def objective(batch: Batch) -> Tensor:
            return batch.chunk_mean(cross_entropy(head.logits(batch.features), batch.labels))

        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(head, objective, sampler, cache, self.base_loop, context, label="disalign base")
        return head.classifier.requires_grad_(False)
