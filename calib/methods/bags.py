"""BAGS: Balanced Group Softmax.

Paper: Li et al., Overcoming Classifier Imbalance for Long-tail Object Detection with Balanced Group Softmax, CVPR 2020.

Classes are grouped by training ``instance_count``; every group has its own softmax with an `others` class; group 0
tells background from foreground.
Eq. 5 (loss): L = L_0 + sum_g mean over sampled rows of -log softmax(z_g)_{local(y)}, sampled as in ``sample_others``.
Eq. 6 (scores): score_c = P_0[fg] P_g(c)[c]; rows need not sum to 1.
Differs: the mean per group (see ``losses/group.py``) and a two-way softmax for group 0, as in the authors' code
(FishYuLi/BalancedGroupSoftmax 90e04fd); the paper writes one sigmoid, the same function of the difference.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.base import Head
from calib.heads.group import GroupHead
from calib.losses.group import Groups, group_losses, sample_others, sampled_counts
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, at_least, one_of
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings


def _loop() -> Loop:
    # Authors' configs: 12 epochs of about 3,500 steps of 16 images, x0.1 after epochs 8 and 11, clip 35.
    return Loop(
        steps=42_000,
        lr=0.01,
        milestones=(8 / 12, 11 / 12),
        warmup_steps=500,
        warmup_factor=1 / 3,
        clip_norm=35.0,
    )


@dataclass(frozen=True)
class Bags:
    """``edges``: half-open bins of instance counts; ``beta``: `others` rows per positive in every group.

    ``others``: sample (with ``beta``), all (every row in every group), none (groups without `others`);
    ``background_group`` off leaves background to the `others` of all groups: the paper's Tables 4 and 5.
    """

    edges: tuple[float, ...] = (10, 100, 1000)
    beta: float = 8.0
    others: str = "sample"
    background_group: bool = True
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=_loop)

    space: ClassVar[dict[str, Any]] = {
        "beta": {"log": [1.0, 64.0]},
        "lr": {"log": [0.01, 1.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "beta")
        one_of(self, "others", ("sample", "all", "none"))
        if list(self.edges) != sorted(set(self.edges)) or min(self.edges, default=1) <= 0:
            given = ",".join(f"{edge:g}" for edge in self.edges)
            raise SettingError(f"edges are {given}: expected rising positive numbers, for example 10,100,1000")

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train a fresh layer (weights N(0, 0.01), biases 0) with natural sampling."""
        groups = Groups.from_counts(torch.from_numpy(cache.categories.instance_count), self.edges)
        has_others = self.others != "none"
        head = GroupHead(
            groups, cache.manifest.detector.feature_size, has_others=has_others, gated=self.background_group
        )
        with torch.no_grad():
            head.classifier.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(context.seed))
        sampler = InstanceSampler(cache, self.images, seed=context.seed)

        def objective(batch: Batch) -> Tensor:
            z = head.logits(batch.features)
            sampled = self._sampled(groups, batch)
            counts = sampled_counts(sampled, batch.all_chunk, batch.n_chunks)
            own = batch.world.shard(sampled.T).T
            losses = group_losses(groups, z, batch.labels, own, batch.chunk, batch.n_chunks, counts)
            losses = losses if self.background_group else losses[1:]
            return losses.sum(dim=0).mean()  # Eq. 5, mean over chunks

        yield Training(head, objective, sampler, cache, self.loop, context, label="bags")
        return head

    def _sampled(self, groups: Groups, batch: Batch) -> Tensor:
        """[G+1, N] rows that enter the loss of every group, of all processes: all draw the same."""
        device, labels = batch.all_labels.device, batch.all_labels.cpu()
        if self.others == "all":
            return torch.ones(len(groups.slices), len(labels), dtype=torch.bool, device=device)
        beta = self.beta if self.others == "sample" else 0.0
        return sample_others(groups, labels, batch.all_chunk.cpu(), batch.n_chunks, beta, batch.generator).to(device)
