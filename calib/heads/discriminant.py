"""Gaussians with a shared covariance, pooled with the logits of a base; equations: ``methods/discriminant.py``."""

from typing import Any

import torch
from torch import Tensor

from calib.heads.base import Folded, LogitHead, empty, not_foldable
from calib.heads.linear import ClassifierHead, LinearClassifier, Logits

ABSENT = -1e4  # logit of a class without rows: finite, and 0 after any softmax


class DiscriminantHead(ClassifierHead, LogitHead):
    """Gaussians pooled with the logits of ``classifier``; ``has_background``: these have a column for it."""

    kind = "discriminant"
    not_linear = "the background has the base's softmax, the classes have another one"

    shift: Tensor
    present: Tensor

    def __init__(
        self, classifier: Logits, m: float, *, has_background: bool = True, detector_logits: bool = True
    ) -> None:
        extra = int(has_background)
        super().__init__(classifier.requires_grad_(False), detector_logits=detector_logits, extra=extra)
        self.m, self.has_background = m, has_background
        c = self.num_classes
        self.gaussians = LinearClassifier(empty(c, self.feature_size), empty(c)).requires_grad_(False)
        self.register_buffer("shift", empty(c))
        self.register_buffer("present", torch.zeros(c, dtype=torch.bool))

    def config(self) -> dict[str, Any]:
        """As ``ClassifierHead.config``, the share of the Gaussians, and whether there is a background column."""
        return super().config() | {"m": self.m, "has_background": self.has_background}

    def folded(self) -> Folded:
        """The base's layer with ``shift`` in its bias, where the Gaussians have no share."""
        if self.m > 0 or not bool(self.present.all()):
            raise not_foldable(f"a head of kind '{self.kind}' is no linear layer: {self.not_linear}")
        weight, bias, _ = self.classifier.folded()
        background = slice(self.num_classes, None)
        rest = (weight[background], bias[background]) if self.has_background else (weight[:1] * 0, bias[:1] * 0)
        weight, bias = weight[: self.num_classes], bias[: self.num_classes] - self.shift
        return Folded(torch.cat([weight, rest[0]]), torch.cat([bias, rest[1]]))

    def raw(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1] logits: the foreground's have the sum of z' (Eq. 4) and the shares of q (Eq. 5)."""
        z = self.logits(features, logits)
        background = z[:, self.num_classes :] if self.has_background else torch.zeros_like(z[:, :1])
        z = z[:, : self.num_classes] - self.shift
        pool = (self.gaussians(features) + (1 - self.m) * z).masked_fill(~self.present, -torch.inf)
        foreground = pool.log_softmax(dim=1) + z.logsumexp(dim=1, keepdim=True)
        return torch.cat([foreground.clamp_min(ABSENT), background], dim=1)

    def activate(self, raw: Tensor) -> Tensor:
        """[N, C+1] -> [N, C+1] probabilities."""
        return raw.softmax(dim=1)
