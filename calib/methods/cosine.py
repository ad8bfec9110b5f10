"""A cosine classifier trained with natural sampling: norms cannot follow counts, because there are none.

Papers: Gidaris and Komodakis, Dynamic Few-Shot Visual Learning without Forgetting, CVPR 2018; in detection the stage-1
baselines of DisAlign and Seesaw.
Eq. (logits): one of the forms of ``heads/linear.py``: cosine, normed, squashed; softmax, mean CE per chunk.
Differs: the three conventions of the authors' codes differ in epsilon, bias and scale; all are kept apart.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.cache import Cache
from calib.heads.base import Head
from calib.heads.linear import FORMS, LinearHead
from calib.losses.softmax import cross_entropy
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, at_least, one_of
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings
from calib.training.retrain import classifier_from


@dataclass(frozen=True)
class Cosine:
    """``scale`` 0 keeps the form's own (20; squashed 16); ``learn_scale`` trains it too."""

    form: str = "cosine"
    scale: float = 0.0
    learn_scale: bool = False
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "set": {"learn_scale": True},
        "lr": {"log": [0.05, 2.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
    }

    def __post_init__(self) -> None:
        one_of(self, "form", FORMS[1:])
        at_least(self, 0, "scale")

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train a fresh classifier."""
        head = LinearHead(classifier_from(cache, context, self.form, len(cache.categories) + 1))
        assert head.classifier.scale is not None
        if self.scale:
            head.classifier.scale.data = torch.tensor([self.scale])
        head.classifier.scale.requires_grad_(self.learn_scale)

        def objective(batch: Batch) -> Tensor:
            return batch.chunk_mean(cross_entropy(head.logits(batch.features), batch.labels))

        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(head, objective, sampler, cache, self.loop, context, label="cosine")
        return head
