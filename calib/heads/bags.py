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
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.base import FitRun, Head, LogitHead, empty
from calib.heads.fit import Batch, fit
from calib.heads.linear import LinearClassifier
from calib.losses.group import Groups, group_losses, sample_others, sampled_counts
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, at_least, one_of


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

    def fit(self, cache: Cache, run: FitRun) -> Head:
        """Train a fresh layer (weights N(0, 0.01), biases 0) with natural sampling."""
        groups = Groups.from_counts(torch.from_numpy(cache.categories.instance_count), self.edges)
        has_others = self.others != "none"
        head = GroupHead(
            groups, cache.manifest.detector.feature_size, has_others=has_others, gated=self.background_group
        )
        with torch.no_grad():
            head.classifier.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(run.seed))
        sampler = InstanceSampler(cache, self.images, seed=run.seed)

        def objective(batch: Batch) -> Tensor:
            z = head.logits(batch.features)
            sampled = self._sampled(groups, batch)
            counts = sampled_counts(sampled, batch.all_chunk, batch.n_chunks)
            mine = batch.world.mine(sampled.T).T
            losses = group_losses(groups, z, batch.labels, mine, batch.chunk, batch.n_chunks, counts)
            losses = losses if self.background_group else losses[1:]
            return losses.sum(dim=0).mean()  # Eq. 5, mean over chunks

        fit(head, objective, sampler, cache, self.loop, run, label="bags")
        return head

    def _sampled(self, groups: Groups, batch: Batch) -> Tensor:
        """[G+1, N] rows that enter the loss of every group, of all processes: all draw the same."""
        device, labels = batch.all_labels.device, batch.all_labels.cpu()
        if self.others == "all":
            return torch.ones(len(groups.slices), len(labels), dtype=torch.bool, device=device)
        beta = self.beta if self.others == "sample" else 0.0
        return sample_others(groups, labels, batch.all_chunk.cpu(), batch.n_chunks, beta, batch.generator).to(device)


class GroupHead(LogitHead):
    """A linear layer with one softmax per group; scores are gated group probabilities (Eq. 6)."""

    kind = "group"
    not_linear = "every group of classes has a softmax of its own, multiplied by P(foreground)"

    local: Tensor

    def __init__(self, groups: Groups, feature_size: int, *, has_others: bool = True, gated: bool = True) -> None:
        super().__init__()
        self.has_others, self.gated = has_others, gated
        self.register_buffer("local", groups.local)
        self.slices = groups.slices
        self.classifier = LinearClassifier(empty(groups.outputs, feature_size), empty(groups.outputs))
        self.num_classes, self.feature_size = groups.local.shape[1] - 1, feature_size

    def config(self) -> dict[str, Any]:
        """Feature size, class count and the width of every group."""
        widths = [s.stop - s.start for s in self.slices]
        sizes = {"feature_size": self.feature_size, "num_classes": self.num_classes, "widths": widths}
        return {**sizes, "has_others": self.has_others, "gated": self.gated}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        stops = torch.tensor([0, *config["widths"]]).cumsum(0).tolist()
        slices = tuple(slice(a, b) for a, b in pairwise(stops))
        local = torch.zeros(len(slices), config["num_classes"] + 1, dtype=torch.long)
        flags = {k: bool(config[k]) for k in ("has_others", "gated")}
        return cls(Groups(local, slices), config["feature_size"], **flags)

    @property
    def distribution(self) -> str:
        """Every group of classes has a softmax of its own: no row of scores has a sum of its own."""
        return ""

    def logits(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, C+G+2]; `others` at -inf where the head has none."""
        z: Tensor = self.classifier(features)
        return z if self.has_others else Groups(self.local, self.slices).without_others(z)

    def raw(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+G+2] logits."""
        return self.logits(features)

    def activate(self, raw: Tensor) -> Tensor:
        """[N, C+G+2] -> [N, C+1]."""
        return Groups(self.local, self.slices).scores(raw, gated=self.gated)
