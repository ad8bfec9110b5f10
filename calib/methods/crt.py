"""cRT: classifier re-training on class-balanced samples.

Paper: Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020, Sec. 4.1.
Eq. (loss): L = mean -log softmax(x W^T + b)_y over rows drawn class-balanced; W, b start from torch's default
initialisation of a linear layer.
Differs: the authors (facebookresearch/classifier-balancing f162adef) classify images and have no background. Here
background is one extra class whose share of the rows is ``background_share`` (default: as in the cache, which keeps
the detector's own balance of foreground and background).
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from calib.cache import Cache
from calib.heads.base import Head, empty
from calib.heads.linear import LinearClassifier, LinearHead
from calib.sampling.class_balanced import ClassBatches
from calib.settings import Loop
from calib.training.context import FitContext
from calib.training.fused_softmax import mean_over_rows
from calib.training.loop import Training, Trainings


def _loop() -> Loop:
    # Authors' configs: rate 0.2, decay 5e-4, batch 512, cosine to zero; 10 epochs there, steps here.
    return Loop(steps=10_000, lr=0.2, weight_decay=5e-4, schedule="cosine", warmup_steps=0)


@dataclass(frozen=True)
class CRT(ClassBatches):
    """Class-balanced rows and the loop."""

    loop: Loop = field(default_factory=_loop)

    space: ClassVar[dict[str, Any]] = {
        "lr": {"log": [0.02, 1.0]},
        "weight_decay": {"log": [0.0001, 0.01]},
        "rows_per_step": {"choice": [512, 2048]},
    }

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train a fresh layer on class-balanced rows."""
        c, d = len(cache.categories), cache.manifest.detector.feature_size
        classifier = LinearClassifier(empty(c + 1, d), empty(c + 1))
        generator = torch.Generator().manual_seed(context.seed)
        with torch.no_grad():
            for tensor in classifier.parameters():
                tensor.uniform_(-(d**-0.5), d**-0.5, generator=generator)
        head = LinearHead(classifier)

        objective, sampler = mean_over_rows(classifier), self.sampler(cache, context.seed)
        yield Training(head, objective, sampler, cache, self.loop, context, label="crt")
        return head
