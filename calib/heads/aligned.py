"""Logits scaled and shifted per class, blended by a per-proposal confidence; equations: ``methods/disalign.py``."""

from typing import Any

import torch
from torch import Tensor, nn

from calib.heads.base import Folded, LogitHead, empty, not_foldable
from calib.heads.linear import ClassifierHead, Logits


def align(z: Tensor, s: Tensor, alpha: Tensor, beta: Tensor, parametrisation: str = "eq5") -> Tensor:
    """Foreground logits [N, C], confidence [N, 1], alpha [C], beta [C] -> aligned foreground logits [N, C]."""
    if parametrisation == "eq6":
        return (1 + s * alpha) * z + s * beta  # Eq. 6
    return s * (alpha * z + beta) + (1 - s) * z  # Eq. 5


class AlignedHead(ClassifierHead, LogitHead):
    """Softmax over the aligned logits of a frozen classifier; scores are foreground probabilities."""

    kind = "aligned"

    def __init__(
        self,
        classifier: Logits,
        parametrisation: str,
        *,
        detector_logits: bool,
        uses_confidence: bool = True,
    ) -> None:
        super().__init__(classifier.requires_grad_(False), detector_logits=detector_logits)
        self.parametrisation, self.uses_confidence = parametrisation, uses_confidence
        self.confidence = nn.Linear(self.feature_size, 1)
        self.alpha = nn.Parameter(empty(self.num_classes))
        self.beta = nn.Parameter(empty(self.num_classes))

    def reset(self, generator: torch.Generator) -> None:
        """Start as the identity: alpha 1 (eq. 6: 0), beta 0, v from N(0, 0.01), c 0."""
        with torch.no_grad():
            self.alpha.fill_(1.0 if self.parametrisation == "eq5" else 0.0)
            self.beta.zero_()
            self.confidence.weight.normal_(0, 0.01, generator=generator)
            self.confidence.bias.zero_()

    def config(self) -> dict[str, Any]:
        """As ``ClassifierHead.config``, and the form."""
        form = {"parametrisation": self.parametrisation, "uses_confidence": self.uses_confidence}
        return super().config() | form

    def aligned(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1] aligned logits, background's untouched."""
        z = self.logits(features, logits)
        s = self.confidence(features).sigmoid() if self.uses_confidence else z.new_ones(1)  # Eq. 4
        return torch.cat([align(z[:, :-1], s, self.alpha, self.beta, self.parametrisation), z[:, -1:]], dim=1)

    def folded(self) -> Folded:
        """Rows times alpha (eq. 6: 1 + alpha), beta in the bias, where the confidence is switched off."""
        if self.uses_confidence:
            raise not_foldable("the alignment is blended by a confidence, a sigmoid of the features")
        weight, bias, _ = self.classifier.folded()
        alpha = self.alpha.detach() + (self.parametrisation == "eq6")
        scale, shift = (torch.cat([v, v.new_full((1,), e)]) for v, e in ((alpha, 1.0), (self.beta.detach(), 0.0)))
        return Folded(scale[:, None] * weight, scale * bias + shift)

    def raw(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1] aligned logits."""
        return self.aligned(features, logits)

    def activate(self, raw: Tensor) -> Tensor:
        """[N, C+1] -> [N, C+1] probabilities."""
        return raw.softmax(dim=1)
