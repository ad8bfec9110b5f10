"""IIF: logits multiplied by the inverse image frequency of their class.

Paper: Alexandridis et al., Inverse Image Frequency for Long-Tailed Image Recognition, IEEE TIP 2023 (arXiv 2209.04861).

Eq. (weights): w_c = -ln p_c, p_c = images with c / all images (form raw); smooth: ln((N + 1) / (n_c + 1)) + 1; prob:
-logit p_c; normit: -Phi^-1(p_c); gombit: -ln(-ln(1 - p_c)); base2, base10: other logarithms. Background 1.
Eq. (scores): softmax(w z), after training (when=posthoc) or also in training (when=loss): CE(w z).
Differs: ``strength`` t is ours: 1 + t (w - 1), so that 0 is the detector and 1 the paper. p_c is kept within half an
image of 0 and 1. The authors' code (kostas1515/iif 747b041) trains with the weights; their best form takes p_c of
instances (``counts``) and base 10.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.cache import Cache
from calib.heads.affine import AffineHead
from calib.heads.base import Head
from calib.losses.margin import FREQUENCY_FORMS, inverse_frequency
from calib.losses.softmax import cross_entropy
from calib.settings import ImageBatches, Loop, at_least, one_of
from calib.training.bases import affine_head
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Trainings
from calib.training.retrain import retrain


@dataclass(frozen=True)
class IIF:
    """``form``: of the weights; ``counts``: images or instances; ``strength``: 0 is the detector; ``when``: posthoc
    multiplies the detector's logits, loss trains its linear head with the weights; ``start``: of that training."""

    form: str = "raw"
    counts: str = "images"
    strength: float = 1.0
    when: str = "posthoc"
    start: str = "detector"
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "set": {"when": "loss"},
        "form": {"choice": ["raw", "smooth", "base10"]},
        "strength": {"range": [0.0, 1.0]},
        "lr": {"log": [0.005, 1.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
    }
    space_on_base: ClassVar[dict[str, Any]] = {
        "set": {"when": "posthoc"},
        "form": {"choice": ["raw", "base10"]},
        "strength": {"range": [0.0, 1.0]},
    }

    def __post_init__(self) -> None:
        one_of(self, "form", FREQUENCY_FORMS)
        one_of(self, "counts", ("images", "instances"))
        one_of(self, "when", ("posthoc", "loss"))
        one_of(self, "start", ("detector", "linear", "cosine", "normed"))
        at_least(self, 0, "strength")

    def fit(self, cache: Cache, context: FitContext) -> Head | Trainings[Head]:
        """Multiply, or train with the weights."""
        weights = self.weights(cache)
        if self.when == "posthoc":
            return affine_head(cache, context).set(scale=weights)
        return self._train(cache, context, weights)

    def weights(self, cache: Cache) -> Tensor:
        """[C] factors of the foreground logits."""
        k, of_images = cache.categories, self.counts == "images"
        counts = torch.from_numpy(k.image_count if of_images else k.instance_count)
        total = len(cache.images) if of_images else int(k.instance_count.sum())
        return 1 + self.strength * (inverse_frequency(counts, total, self.form) - 1)

    def _train(self, cache: Cache, context: FitContext, weights: Tensor) -> Trainings[Head]:
        scale = torch.cat([weights, weights.new_ones(1)]).float().to(context.device)

        def loss(z: Tensor, batch: Batch) -> Tensor:
            return batch.chunk_mean(cross_entropy(scale * z, batch.labels))

        head = yield from retrain(
            cache, context, loss, start=self.start, images=self.images, loop=self.loop, label="iif"
        )
        return AffineHead(head.classifier.to("cpu"), detector_logits=False).set(scale=weights)
