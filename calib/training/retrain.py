"""What most methods do: train one linear classifier on the cache with their own loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import UnsupportedError
from calib.heads.linear import LinearClassifier, LinearHead
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop
from calib.training.bases import base_layer, refuse_base
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings


def classifier_from(cache: Cache, context: FitContext, start: str, outputs: int) -> LinearClassifier:
    """The classifier of the detector or the base, or a fresh one with ``outputs`` rows; raises as ``base_layer``."""
    if start == "detector":
        return base_layer(cache, context)
    refuse_base(context, f"a fresh {start} layer is drawn")
    generator = torch.Generator().manual_seed(context.seed)
    return LinearClassifier.fresh(outputs, cache.manifest.detector.feature_size, start, generator)


def retrain(
    cache: Cache,
    context: FitContext,
    loss: Callable[[Tensor, Batch], Tensor],
    *,
    start: str,
    images: ImageBatches,
    loop: Loop,
    label: str,
) -> Trainings[LinearHead]:
    """A softmax head trained on whole images; ``loss`` takes [N, C+1] logits and the batch.

    ``start``: detector (go on from its weights, or from those of the base), or a form of ``linear.FORMS`` (a fresh
    classifier of that form).

    Raises:
        UnsupportedError: the cache does not hold the proposals of training mode.
    """
    if cache.manifest.mode != "train":
        raise UnsupportedError(
            f"{label} learns from labelled proposals; cache {cache.path} was extracted with --mode test",
            hint="extract the train split with --mode train",
        )
    head = LinearHead(classifier_from(cache, context, start, len(cache.categories) + 1))

    def objective(batch: Batch) -> Tensor:
        return loss(head.logits(batch.features), batch)

    sampler = InstanceSampler(cache, images, seed=context.seed)
    yield Training(head, objective, sampler, cache, loop, context, label=label)
    return head
