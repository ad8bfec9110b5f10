"""Class-aware margin: rare classes must win by more.

Paper: Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019; as a baseline
in detection: Wang et al., SimCal, ECCV 2020, Sec. 4.1. Counts are ``instance_count``.
Eq. 13 (margins): m_j = largest n_j^-1/4 / max_k n_k^-1/4, background 0.
Eq. 14 (loss): CE(scale (z - m_y at the label)); margins are never applied at inference, scores = softmax(scale z).
Differs: the authors' code (kaidic/LDAM-DRW 2536330) has scale 30 on a cosine classifier; detection baselines state no
scale, which is 1 here on the detector's linear classifier.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.cache import Cache
from calib.heads.affine import AffineHead
from calib.heads.base import Head
from calib.losses.margin import class_margins, margin_values
from calib.settings import ImageBatches, Loop, at_least, one_of
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Trainings
from calib.training.retrain import retrain


@dataclass(frozen=True)
class ClassMargin:
    """``largest``: margin of the rarest class; ``start`` cosine with ``scale`` 30 is the classification form."""

    largest: float = 0.5
    scale: float = 1.0
    start: str = "detector"
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "largest": {"range": [0.0, 2.0]},
        "lr": {"log": [0.02, 2.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "largest", "scale")
        one_of(self, "start", ("detector", "linear", "cosine"))

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train with margins, score without."""
        counts = torch.from_numpy(cache.categories.instance_count).clamp_min(1)
        margins = torch.cat([class_margins(counts, self.largest), torch.zeros(1)]).to(context.device)

        def loss(z: Tensor, batch: Batch) -> Tensor:
            return batch.chunk_mean(margin_values(z, batch.labels, margins, self.scale))

        head = yield from retrain(
            cache, context, loss, start=self.start, images=self.images, loop=self.loop, label="class-margin"
        )
        if self.scale == 1:
            return head
        scored = AffineHead(head.classifier.to("cpu"), detector_logits=False)
        scored.scale.fill_(self.scale)
        return scored
