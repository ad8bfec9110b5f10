"""TDE: a normalised multi-head classifier whose share along the training momentum is taken away at inference.

Paper: Tang et al., Long-Tailed Classification by Keeping the Good and Removing the Bad Momentum Causal Effect,
NeurIPS 2020; with background exempted, as its authors do for detection.

x_h, w_h: the H parts of features and weights.
Eq. 8 (training logits): y = sum_h (tau / H) x_h / (|x_h| + 1e-9) . w_h / (|w_h| + 1e-9 + gamma), no bias, plain CE.
Moving direction: e <- mu e + mean of the batch's foreground features (only its direction is used).
Eq. 9 (TDE): y_tde = y - sum_h (tau / H) alpha cos(x_h, e_h) (e_h / |e_h|) . w_h / (...).
Scores: p = softmax(y), q = softmax(y_tde): score_bg = p_bg, score_c = (1 - p_bg) q_c / sum_fg q.
Differs: the authors' detection code (KaihuaTang/Long-Tailed-Recognition.pytorch 5c916d0) averages over rows with label
> 0, a rule of frameworks whose background is 0: here it drops class 0 and keeps background; and it applies softmax to
the scores once more. Both are confirmed as slips by the author; ``official_quirks`` reproduces them.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.base import FitRun, Head, empty
from calib.heads.fit import Batch, fit
from calib.losses.softmax import cross_entropy
from calib.parallel.distributed import ALONE, World
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, at_least, one_of


@dataclass(frozen=True)
class TDE:
    """``alpha``: how much of the moving direction is removed, 0 removes nothing; it may be changed without training.

    ``direction``: shared, of the rows of all processes, or local, of those of the one that writes the head, as theirs.
    """

    heads: int = 2
    scale: float = 16.0
    gamma: float = 1 / 32
    alpha: float = 1.5
    mu: float = 0.9998
    official_quirks: bool = False
    direction: str = "shared"
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "alpha": {"range": [0.0, 3.0]},
        "lr": {"log": [0.05, 2.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
    }

    def __post_init__(self) -> None:
        at_least(self, 1, "heads")
        one_of(self, "direction", ("shared", "local"))
        at_least(self, 0, "gamma", "alpha", "mu")
        if self.mu >= 1 or self.scale <= 0:
            raise SettingError("expected mu below 1 and scale above 0")

    def fit(self, cache: Cache, run: FitRun) -> Head:
        """Train a fresh classifier with natural sampling, following the features' direction."""
        d = cache.manifest.detector.feature_size
        if d % self.heads:
            raise SettingError(f"heads is {self.heads}: expected a divisor of the feature size {d}")
        head = TDEHead(
            len(cache.categories),
            d,
            heads=self.heads,
            scale=self.scale,
            gamma=self.gamma,
            alpha=self.alpha,
            official_quirks=self.official_quirks,
        )
        with torch.no_grad():
            head.weight.uniform_(-(d**-0.5), d**-0.5, generator=torch.Generator().manual_seed(run.seed))

        def objective(batch: Batch) -> Tensor:
            head.follow(batch.features, batch.labels, self.mu, batch.world if self.direction == "shared" else ALONE)
            values = cross_entropy(head.logits(batch.features), batch.labels)
            return batch.chunk_mean(values)

        fit(head, objective, InstanceSampler(cache, self.images, seed=run.seed), cache, self.loop, run, label="tde")
        return head


class TDEHead(Head):
    """See the module: normalised logits y, the direction e, scores with background exempted."""

    kind = "tde"
    stage_average = "probabilities"  # the authors' HTC averages those of its stages
    not_linear = "features are divided by their norm"

    direction: Tensor

    def __init__(
        self,
        num_classes: int,
        feature_size: int,
        *,
        heads: int,
        scale: float,
        gamma: float,
        alpha: float,
        official_quirks: bool,
    ) -> None:
        super().__init__()
        self.num_classes, self.feature_size = num_classes, feature_size
        self.heads, self.scale, self.gamma, self.alpha = heads, scale, gamma, alpha
        self.official_quirks = official_quirks
        self.weight = nn.Parameter(empty(num_classes + 1, feature_size))
        self.register_buffer("direction", empty(feature_size))

    def config(self) -> dict[str, Any]:
        """Shape and constants."""
        shape = {"num_classes": self.num_classes, "feature_size": self.feature_size, "heads": self.heads}
        constants = {"scale": self.scale, "gamma": self.gamma, "alpha": self.alpha}
        return {**shape, **constants, "official_quirks": self.official_quirks}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        rest = {k: v for k, v in config.items() if k not in ("num_classes", "feature_size")}
        return cls(int(config["num_classes"]), int(config["feature_size"]), **rest)

    def follow(self, features: Tensor, labels: Tensor, mu: float, world: World = ALONE) -> None:
        """Move the direction by one batch, of all processes of ``world``."""
        used = labels > 0 if self.official_quirks else labels < self.num_classes
        total, rows = features[used].detach().sum(dim=0), used.sum(dtype=features.dtype)
        world.add([total, rows])
        self.direction = mu * self.direction + total / rows.clamp_min(1)

    def _parts(self) -> Tensor:
        """[H, K, D/H] divided weights, with the scale of a head."""
        w = self.weight.reshape(len(self.weight), self.heads, -1).transpose(0, 1)
        parts: Tensor = self.scale / self.heads * w / (w.norm(dim=2, keepdim=True) + 1e-9 + self.gamma)
        return parts

    def _split(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, H, D/H]."""
        return features.reshape(features.shape[0], self.heads, self.feature_size // self.heads)

    def logits(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, C+1] y (Eq. 8)."""
        x = self._split(features)
        unit = x / (x.norm(dim=2, keepdim=True) + 1e-9)
        return torch.einsum("nhd,hkd->nk", unit, self._parts())

    def tde_logits(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, C+1] y without what lies along the direction (Eq. 9)."""
        x = self._split(features)
        e = self.direction.reshape(self.heads, -1)  # [H, D/H]
        unit = x / (x.norm(dim=2, keepdim=True) + 1e-9)
        along = e / (e.norm(dim=1, keepdim=True) + 1e-9)
        cosine = torch.einsum("nhd,hd->nh", unit, along)
        removed = torch.einsum("nh,hd,hkd->nk", self.alpha * cosine, along, self._parts())
        return self.logits(features) - removed

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1]."""
        p = self.logits(features).softmax(dim=1)
        q = self.tde_logits(features).softmax(dim=1)[:, :-1] + 1e-10
        foreground = p[:, :-1].sum(dim=1, keepdim=True) * q / (q - 1e-10).sum(dim=1, keepdim=True).clamp_min(1e-10)
        scores = torch.cat([foreground, p[:, -1:]], dim=1)
        return scores.softmax(dim=1) if self.official_quirks else scores
