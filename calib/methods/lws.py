"""LWS: learnable weight scaling.

Paper: Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020, Sec. 4.1.
Eq. 5 (logits): z'_c = f_c z_c, one learned number per class, weights frozen; class-balanced sampling, mean CE.
Differs: in the authors' code (facebookresearch/classifier-balancing f162ade, TauNormClassifier.py) the bias is scaled
as well, which is kept here, and weight decay pulls f towards 0. They classify images; the background keeps f = 1.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from calib.cache import Cache
from calib.heads.affine import AffineHead
from calib.heads.base import Head
from calib.losses.softmax import cross_entropy
from calib.sampling.class_balanced import ClassBatches
from calib.settings import Loop
from calib.training.bases import base_layer
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings


def _loop() -> Loop:
    # Authors' config: rate 0.2, decay 5e-4, batch 512, cosine to zero; 5 epochs there, steps here.
    return Loop(steps=5_000, lr=0.2, weight_decay=5e-4, schedule="cosine", warmup_steps=0)


@dataclass(frozen=True)
class LWS(ClassBatches):
    """Class-balanced rows and the loop."""

    loop: Loop = field(default_factory=_loop)

    space: ClassVar[dict[str, Any]] = {
        "lr": {"log": [0.02, 5.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
    }

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Learn the scales; the head multiplies the detector's logits by them."""
        classifier = base_layer(cache, context).requires_grad_(False)
        scales = Scales(len(cache.categories))
        model = nn.ModuleDict({"classifier": classifier, "scales": scales})

        def objective(batch: Batch) -> Tensor:
            return batch.row_mean(cross_entropy(scales(classifier(batch.features)), batch.labels))

        yield Training(model, objective, self.sampler(cache, context.seed), cache, self.loop, context, label="lws")
        return AffineHead(classifier, detector_logits=context.base is None).set(scale=scales.factor.detach().cpu())


class Scales(nn.Module):
    """One factor per foreground column, 1 at the start."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(num_classes))

    def forward(self, logits: Tensor) -> Tensor:
        """[N, K] -> [N, K]; columns beyond the factors (background) stay."""
        c = len(self.factor)
        return torch.cat([logits[:, :c] * self.factor, logits[:, c:]], dim=1)  # Eq. 5
