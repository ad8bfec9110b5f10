"""A normalised multi-head classifier without its share along the training momentum; equations: ``methods/tde.py``."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from calib.heads.base import Head, empty
from calib.parallel.distributed import ALONE, World


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
        super().__init__(num_classes, feature_size)
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
        world.all_reduce([total, rows])
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
