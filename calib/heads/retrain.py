"""What most methods do: train one linear classifier on the cache with their own loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import UnsupportedError
from calib.heads.base import FitRun
from calib.heads.fit import Batch, fit
from calib.heads.linear import LinearClassifier, LinearHead
from calib.heads.stack import base_layer, refuse_base
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop


@dataclass(frozen=True)
class Retrained:
    """``start``: detector (go on from its weights, or from those of the base) or a form of ``linear.FORMS`` (a fresh
    classifier of that form)."""

    start: str
    images: ImageBatches
    loop: Loop


def classifier_from(cache: Cache, run: FitRun, start: str, outputs: int) -> LinearClassifier:
    """The classifier of the detector or the base, or a fresh one with ``outputs`` rows; raises as ``base_layer``."""
    if start == "detector":
        return base_layer(cache, run)
    refuse_base(run, f"a fresh {start} layer is drawn")
    generator = torch.Generator().manual_seed(run.seed)
    return LinearClassifier.fresh(outputs, cache.manifest.detector.feature_size, start, generator)


def retrain(
    cache: Cache, run: FitRun, how: Retrained, loss: Callable[[Tensor, Batch], Tensor], *, label: str
) -> LinearHead:
    """A softmax head trained on whole images; ``loss`` takes [N, C+1] logits and the batch.

    Raises:
        UnsupportedError: the cache does not hold the proposals of training mode.
    """
    if cache.manifest.mode != "train":
        raise UnsupportedError(
            f"{label} learns from labelled proposals; cache {cache.path} was extracted with --mode test",
            hint="extract the train split with --mode train",
        )
    head = LinearHead(classifier_from(cache, run, how.start, len(cache.categories) + 1))
    sampler = InstanceSampler(cache, how.images, seed=run.seed)

    def objective(batch: Batch) -> Tensor:
        return loss(head.logits(batch.features), batch)

    fit(head, objective, sampler, cache, how.loop, run, label=label)
    return head
