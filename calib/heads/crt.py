"""cRT: classifier re-training on class-balanced samples.

Paper: Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020, Sec. 4.1.
Eq. (loss): L = mean -log softmax(x W^T + b)_y over rows drawn class-balanced; W, b start from torch's default
initialisation of a linear layer.
Differs: the authors (facebookresearch/classifier-balancing f162adef) classify images and have no background. Here
background is one extra class whose share of the rows is ``background_share`` (default: as in the cache, which keeps
the detector's own balance of foreground and background).
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from calib.cache import Cache
from calib.cache.index import ClassIndex
from calib.errors import SettingError
from calib.heads.base import FitRun, Head, empty
from calib.heads.fit import Batch, fit
from calib.heads.linear import LinearClassifier, LinearHead
from calib.losses.softmax import cross_entropy
from calib.sampling.class_balanced import ClassBalancedSampler
from calib.settings import Loop, at_least


def _loop() -> Loop:
    # Authors' configs: rate 0.2, decay 5e-4, batch 512, cosine to zero; 10 epochs there, steps here.
    return Loop(steps=10_000, lr=0.2, weight_decay=5e-4, schedule="cosine", warmup_steps=0)


@dataclass(frozen=True)
class CRT:
    """``rows_per_step``: batch size; ``draws_per_visit``: consecutive rows of a class."""

    rows_per_step: int = 512
    draws_per_visit: int = 4
    background_share: float | None = None
    loop: Loop = field(default_factory=_loop)

    def __post_init__(self) -> None:
        at_least(self, 1, "rows_per_step", "draws_per_visit")
        if self.background_share is not None and not 0 <= self.background_share < 1:
            raise SettingError(f"background_share is {self.background_share}: expected a share in [0, 1)")

    def fit(self, cache: Cache, run: FitRun) -> Head:
        """Train a fresh layer on class-balanced rows."""
        c, d = len(cache.categories), cache.manifest.detector.feature_size
        classifier = LinearClassifier(empty(c + 1, d), empty(c + 1))
        generator = torch.Generator().manual_seed(run.seed)
        with torch.no_grad():
            for tensor in classifier.parameters():
                tensor.uniform_(-(d**-0.5), d**-0.5, generator=generator)
        head = LinearHead(classifier)
        sampler = ClassBalancedSampler(
            ClassIndex.build(cache),
            rows_per_step=self.rows_per_step,
            background_share=background_share(cache, self.background_share),
            draws_per_visit=self.draws_per_visit,
            seed=run.seed,
        )

        def objective(batch: Batch) -> Tensor:
            return cross_entropy(head.logits(batch.features), batch.labels).mean()

        fit(head, objective, sampler, cache, self.loop, run, label="crt")
        return head


def background_share(cache: Cache, given: float | None) -> float:
    """``given``, or the share of background among the usable rows of ``cache``."""
    if given is not None:
        return given
    usable = cache.labels[cache.labels >= 0]
    return float(np.mean(usable == cache.background)) if len(usable) else 0.0
