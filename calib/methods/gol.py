"""GOL: Gumbel activation in place of sigmoids, and negatives of tail classes left out.

Paper: Alexandridis et al., Long-tailed Instance Segmentation using Gumbel Optimized Loss, ECCV 2022.
Eq. (scores): p_c = exp(-exp(-z_c)).
Eq. (loss): (1/N) sum_k sum_j w_kj BCE(p_kj, t_kj), w as in DropLoss (Hsieh et al., AAAI 2021): 0 for negatives of tail
classes on foreground rows and, on background rows, where a uniform number is above the share of tail classes among the
foreground; tail: in less than ``tail_share`` of the training images.
Differs: logits are kept in [-4, 10] in the loss, as in the authors' code (kostas1515/GOL 70026b7), whose gradient
vanishes below -3.3 by torch's bound on that of a binary cross entropy and here at -4. ``masking`` eql leaves the
negatives of background rows in, none all; the plain form of their code has a column for background, this has none.
Weights start at 0.001, biases at -2, as there.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.base import Head
from calib.heads.gumbel import GumbelHead
from calib.heads.linear import LinearClassifier
from calib.losses.gumbel import drop_weights, gumbel_bce, tail_ratio
from calib.losses.sigmoid import eql_weights, one_hot
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, at_least, one_of
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings

WEIGHT, BIAS = 0.001, -2.0


def _images() -> ImageBatches:
    return ImageBatches(sampling="repeat-factor")


@dataclass(frozen=True)
class GOL:
    """``tail_share``: classes in fewer than this share of the training images are tail; ``masking``: which negatives
    of theirs are left out."""

    tail_share: float = 1.1e-3
    masking: str = "drop"
    images: ImageBatches = field(default_factory=_images)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "tail_share": {"log": [0.001, 0.1]},
        "masking": {"choice": ["drop", "eql", "none"]},
        "lr": {"log": [0.01, 1.0]},
        "weight_decay": {"log": [1e-07, 0.0001]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "tail_share")
        one_of(self, "masking", ("drop", "eql", "none"))
        if self.tail_share > 1:
            raise SettingError(f"tail_share is {self.tail_share}: expected a share of the images, in [0, 1]")

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train a fresh layer."""
        shape = (len(cache.categories), cache.manifest.detector.feature_size)
        head = GumbelHead(LinearClassifier(torch.full(shape, WEIGHT), torch.full(shape[:1], BIAS)))
        share = cache.categories.image_count / max(len(cache.images), 1)
        is_tail = torch.from_numpy(share < self.tail_share).to(context.device)

        def objective(batch: Batch) -> Tensor:
            z, target = head.classifier(batch.features), one_hot(batch.labels, shape[0])
            return batch.chunk_mean((self._weights(batch, is_tail) * gumbel_bce(z, target)).sum(dim=1))

        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(head, objective, sampler, cache, self.loop, context, label="gol")
        return head

    def _weights(self, batch: Batch, is_tail: Tensor) -> Tensor:
        if self.masking == "none":
            return torch.ones(1, device=is_tail.device)
        if self.masking == "eql":
            return eql_weights(batch.labels, is_tail)
        ratio = tail_ratio(batch.all_labels, is_tail, batch.all_chunk, batch.n_chunks)
        drawn = torch.rand(len(batch.all_labels), int(is_tail.sum()), generator=batch.generator)
        uniform = torch.zeros(len(batch.labels), len(is_tail), device=is_tail.device)
        uniform[:, is_tail] = batch.world.shard(drawn).to(is_tail.device)
        return drop_weights(batch.labels, is_tail, batch.world.shard(ratio), uniform)
