"""Seesaw, decoupled: a normalised linear layer with an objectness pair, trained on the cache with the seesaw loss.

Paper: Wang et al., Seesaw Loss for Long-Tailed Instance Segmentation, CVPR 2021. Equations: see ``losses/seesaw.py``.
Eq. 10, 11 (normalised linear activation): z = tau x / |x| . w / |w| + b; C classes, object, background.
Eq. (scores): score_c = softmax(z_1..C)_c softmax(object pair)_object.
Differs: the bias is kept and not scaled, and norms have 1e-6 added, as in mmdetection 2.28.2. Counts are those of the
sampled batches since the start of training (``online``: of all processes together; ``local``: of each its own rows, as
theirs), or the training instances (``dataset``). As in the paper, this form is trained with repeat-factor sampling.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from calib.cache import Cache
from calib.heads.base import Head
from calib.heads.linear import LinearClassifier
from calib.heads.objectness import ObjectnessHead
from calib.losses.seesaw import add_counts, objectness_values, seesaw_values
from calib.parallel.distributed import World
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, at_least, one_of
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings

COUNTS = ("online", "local", "dataset")


def _images() -> ImageBatches:
    return ImageBatches(sampling="repeat-factor")


def _loop() -> Loop:
    # The 1x schedule: 12 epochs of some 6,250 steps of 16 images on LVIS v1, x0.1 after epochs 8 and 11.
    return Loop(steps=75_000, lr=0.02, milestones=(8 / 12, 11 / 12), warmup_steps=500)


@dataclass(frozen=True)
class Seesaw:
    """``p``: mitigation, ``q``: compensation, 0 switches either off; ``tau``: scale, 0 for a plain linear layer."""

    p: float = 0.8
    q: float = 2.0
    eps: float = 0.01
    tau: float = 20.0
    counts: str = "online"
    images: ImageBatches = field(default_factory=_images)
    loop: Loop = field(default_factory=_loop)

    space: ClassVar[dict[str, Any]] = {
        "p": {"range": [0.0, 1.5]},
        "q": {"range": [0.0, 3.0]},
        "lr": {"log": [0.01, 1.0]},
        "weight_decay": {"log": [1e-05, 0.001]},
        "repeat_threshold": {"choice": [0.001, 0.02, 0.05]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "p", "q", "eps", "tau")
        one_of(self, "counts", COUNTS)

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train a fresh layer."""
        head = ObjectnessHead(objectness_classifier(cache, self.tau, context.seed))
        state = SeesawCounts(cache, self.counts, context.world)

        def objective(batch: Batch) -> Tensor:
            z = head.classifier(batch.features)
            counts, c = state.after(batch.all_labels), head.num_classes
            values = seesaw_values(z[:, :c], batch.labels, counts, self.p, self.q, self.eps)
            values = values + objectness_values(z[:, c:], batch.labels, c)
            return batch.chunk_mean(values)

        model = nn.ModuleDict({"head": head, "state": state})
        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(model, objective, sampler, cache, self.loop, context, label="seesaw")
        return head


def objectness_classifier(cache: Cache, tau: float, seed: int) -> LinearClassifier:
    """C + 2 fresh rows, normalised with scale ``tau`` or plain."""
    d, generator = cache.manifest.detector.feature_size, torch.Generator().manual_seed(seed)
    classifier = LinearClassifier.fresh(len(cache.categories) + 2, d, "normed" if tau else "linear", generator)
    if classifier.scale is not None:
        classifier.scale.data.fill_(tau)
    return classifier


class SeesawCounts(nn.Module):
    """Instances per class: of the batches seen so far, the current one included, or of the data set.

    ``counts`` [R, C+1]: of every process where they are ``local``, so that each of them knows all and one checkpoint
    holds them; else R = 1.
    """

    counts: Tensor

    def __init__(self, cache: Cache, source: str, world: World) -> None:
        super().__init__()
        self._online = source != "dataset"
        self._rank, self._ranks = (world.rank, world.size) if source == "local" else (0, 1)
        counts = torch.cat([torch.from_numpy(cache.categories.instance_count).float(), torch.zeros(1)])
        self.register_buffer("counts", counts[None] if not self._online else torch.zeros(self._ranks, len(counts)))

    def after(self, all_labels: Tensor) -> Tensor:
        """[C] counts including the rows of this step, all N of them."""
        if self._online:
            rows = (World(k, self._ranks).shard(all_labels) for k in range(self._ranks))
            self.counts = torch.stack([add_counts(n, y) for n, y in zip(self.counts, rows, strict=True)])
        return self.counts[self._rank, :-1]
