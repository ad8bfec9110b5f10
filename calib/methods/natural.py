"""natural: the detector's own head trained on with natural sampling; the control of every comparison.

Paper: none; the control that Kang et al., Decoupling Representation and Classifier, ICLR 2020, Sec. 4.1 call
instance-balanced sampling.
Eq. (loss): L = (1/K) sum_k mean_{i in chunk k} l_i, z_i = x_i W^T + b, with l of the detector's kind:
    softmax   l = -log softmax(z)_y
    sigmoid   l = sum_{c < C} BCE(z_c, [c = y]); background rows have targets 0 (Detectron2, fast_rcnn.py,
              ``sigmoid_cross_entropy_loss``: summed over classes, divided by all rows)
    seesaw    l = [y < C] -log softmax(z_1..C)_y - log softmax(object pair)_{object or background}: the seesaw
              loss with all weights S = 1 (p = q = 0), the plain loss of its layer
Differs: on separable features, longer training alone lifts rare classes; a table without this row would credit that
to balance. Query detectors (DETR's family) weigh their sigmoid losses by focal factors or IoU; the control does not.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.cache import Cache
from calib.heads.base import Head
from calib.heads.linear import LinearClassifier, LinearHead
from calib.heads.objectness import ObjectnessHead
from calib.heads.sigmoid import SigmoidHead
from calib.losses.seesaw import objectness_values, seesaw_values
from calib.losses.sigmoid import one_hot, weighted_bce
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop
from calib.training.bases import activation_of, base_layer
from calib.training.batch import Batch, Objective
from calib.training.context import FitContext
from calib.training.fused_softmax import mean_over_chunks
from calib.training.loop import Training, Trainings


@dataclass(frozen=True)
class Natural:
    """The detector's own schedule, once more (rate and decay of Faster R-CNN baselines on LVIS)."""

    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "lr": {"log": [0.01, 2.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
        "sampling": {"choice": ["natural", "repeat-factor"]},
        "repeat_threshold": {"choice": [0.001, 0.02, 0.05]},
    }

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Continue from the weights of the detector or the base."""
        head, objective = _FORMS[activation_of(cache, context)](base_layer(cache, context))
        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(head, objective, sampler, cache, self.loop, context, label="natural")
        return head


def _softmax(classifier: LinearClassifier) -> tuple[Head, Objective]:
    head = LinearHead(classifier)
    return head, mean_over_chunks(head.classifier)


def _sigmoid(classifier: LinearClassifier) -> tuple[Head, Objective]:
    def objective(batch: Batch) -> Tensor:
        z = classifier(batch.features)
        return batch.chunk_mean(weighted_bce(z, one_hot(batch.labels, z.shape[1]), torch.ones_like(z)))

    return SigmoidHead(classifier), objective


def _seesaw(classifier: LinearClassifier) -> tuple[Head, Objective]:
    def objective(batch: Batch) -> Tensor:
        z, pair = classifier(batch.features).split([len(classifier.weight) - 2, 2], dim=1)
        values = seesaw_values(z, batch.labels, z.new_ones(z.shape[1]), 0.0, 0.0, 1.0)
        return batch.chunk_mean(values + objectness_values(pair, batch.labels, z.shape[1]))

    return ObjectnessHead(classifier), objective


_FORMS = {"softmax": _softmax, "sigmoid": _sigmoid, "seesaw": _seesaw}
