"""Logit adjustment, after training or in the loss.

Paper: Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021.

Eq. 9 (post hoc): arg max z_c - tau log pi_c, pi_c = n_c / sum n with n_c = ``instance_count``.
Eq. 10 (loss): CE(z + tau log pi), tested on plain z; of a sigmoid detector binary cross entropies in the place of CE.
Differs: the authors' code (google-research 1d4d2f1) adds 1e-12 to pi^tau. It classifies images; in detection the
background has no count and the constant that is irrelevant in classification sets the balance of foreground and
background. ``anchor`` chooses it: ``rare`` leaves the rarest class where it is (the largest shift is 0), ``uniform``
gives a class of mean frequency no shift, ``prior`` takes the formula as it stands.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.cache import Cache
from calib.heads.base import Head
from calib.heads.linear import LinearClassifier
from calib.heads.sigmoid import SigmoidHead
from calib.losses.margin import anchored, shifted_values
from calib.losses.sigmoid import one_hot, weighted_bce
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, at_least, one_of
from calib.training.bases import activation_of, affine_head, base_layer
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings
from calib.training.retrain import retrain


@dataclass(frozen=True)
class LogitAdjustment:
    """``when``: posthoc shifts the detector's logits, loss trains its linear head with the shift; ``tau``: strength."""

    tau: float = 1.0
    anchor: str = "rare"
    when: str = "posthoc"
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "set": {"when": "loss"},
        "tau": {"range": [0.0, 1.5]},
        "lr": {"log": [0.02, 2.0]},
        "weight_decay": {"log": [1e-05, 0.01]},
    }
    space_on_base: ClassVar[dict[str, Any]] = {"set": {"when": "posthoc"}, "tau": {"range": [0.0, 1.5]}}

    def __post_init__(self) -> None:
        at_least(self, 0, "tau")
        one_of(self, "anchor", ("rare", "uniform", "prior"))
        one_of(self, "when", ("posthoc", "loss"))

    def fit(self, cache: Cache, context: FitContext) -> Head | Trainings[Head]:
        """Shift, or train with the shift."""
        adjustment = anchored(torch.from_numpy(cache.categories.instance_count), self.tau, self.anchor)
        if activation_of(cache, context) == "sigmoid":
            shift, classifier = adjustment.float().to(context.device), base_layer(cache, context)
            if self.when == "posthoc":
                own = torch.zeros(len(shift)) if classifier.bias is None else classifier.bias.detach()
                return SigmoidHead(LinearClassifier(classifier.weight.detach(), own - shift.to(own.device)))  # Eq. 9
            return self._sigmoids(cache, context, classifier, shift)
        if self.when == "posthoc":
            return affine_head(cache, context).set(shift=-adjustment)  # Eq. 9
        shift = torch.cat([adjustment, adjustment.new_zeros(1)]).float().to(context.device)

        def values(z: Tensor, batch: Batch) -> Tensor:
            return batch.chunk_mean(shifted_values(z, batch.labels, shift))  # Eq. 10

        return retrain(
            cache, context, values, start="detector", images=self.images, loop=self.loop, label="logit-adjustment"
        )

    def _sigmoids(
        self, cache: Cache, context: FitContext, classifier: LinearClassifier, shift: Tensor
    ) -> Trainings[Head]:
        def objective(batch: Batch) -> Tensor:
            z = classifier(batch.features) + shift
            return batch.chunk_mean(weighted_bce(z, one_hot(batch.labels, z.shape[1]), torch.ones_like(z)))  # Eq. 10

        head, sampler = SigmoidHead(classifier), InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(head, objective, sampler, cache, self.loop, context, label="logit-adjustment")
        return head
