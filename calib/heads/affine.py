"""What every post-hoc method is: logits stretched and shifted per class, then scores multiplied per class.

z' = scale * z + shift, s = softmax(z'), s'_c = factor_c s_c, and the row is brought back to sum 1 (``all``), its
foreground to 1 - s_bg (``foreground``), or left alone (``none``).
"""

from typing import Any, Self

import torch
from torch import Tensor

from calib.heads.base import Folded, LogitHead, empty, not_foldable
from calib.heads.linear import LinearClassifier

RENORMALISE = ("all", "foreground", "none")


class AffineHead(LogitHead):
    """Post-hoc correction of a softmax, mostly the detector's own; all vectors are [C+1], background last."""

    kind = "affine"

    scale: Tensor
    shift: Tensor
    factor: Tensor

    def __init__(
        self, classifier: LinearClassifier, *, renormalise: str = "none", detector_logits: bool = True
    ) -> None:
        super().__init__()
        if renormalise not in RENORMALISE:
            raise ValueError(f"unknown renormalisation '{renormalise}'")
        self.classifier = classifier.requires_grad_(False)
        self.renormalise, self.detector_logits = renormalise, detector_logits
        outputs, self.feature_size = classifier.weight.shape
        self.num_classes = outputs - 1
        for name, start in (("scale", 1.0), ("shift", 0.0), ("factor", 1.0)):
            self.register_buffer(name, empty(outputs) + start)

    def set(self, *, scale: Tensor | None = None, shift: Tensor | None = None, factor: Tensor | None = None) -> Self:
        """Fill in foreground values [C]; the background keeps 1, 0, 1."""
        for name, values in (("scale", scale), ("shift", shift), ("factor", factor)):
            if values is not None:
                getattr(self, name)[:-1] = values.float()
        return self

    def config(self) -> dict[str, Any]:
        """Shape, renormalisation, and whether the classifier is the detector's own."""
        flags = {"renormalise": self.renormalise, "detector_logits": self.detector_logits}
        return {"classifier": self.classifier.config(), **flags}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        return cls(
            LinearClassifier.build(config["classifier"]),
            renormalise=str(config["renormalise"]),
            detector_logits=bool(config["detector_logits"]),
        )

    def folded(self) -> Folded:
        """Rows times ``scale``, ``shift`` in the bias, and log ``factor`` too where rows are brought back to sum 1."""
        weight, bias, _ = self.classifier.folded()
        if bool((self.factor != 1).any()) and (self.renormalise != "all" or bool((self.factor <= 0).any())):
            raise not_foldable(
                f"scores are multiplied per class after the softmax (renormalise '{self.renormalise}'), which no "
                "linear layer before it does"
            )
        return Folded(self.scale[:, None] * weight, self.scale * bias + self.shift + self.factor.log())

    def raw(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1] corrected logits."""
        z: Tensor = logits if logits is not None and self.detector_logits else self.classifier(features)
        return self.scale * z + self.shift

    def correct(self, logits: Tensor) -> Tensor:
        """[N, C+1] logits -> [N, C+1] scores."""
        return self.activate(self.scale * logits + self.shift)

    def activate(self, raw: Tensor) -> Tensor:
        """[N, C+1] corrected logits -> [N, C+1] scores."""
        s = raw.softmax(dim=1) * self.factor
        if self.renormalise == "all":
            return s / _safe(s.sum(dim=1, keepdim=True))
        if self.renormalise == "foreground":
            foreground = s[:, :-1] / _safe(s[:, :-1].sum(dim=1, keepdim=True))
            return torch.cat([foreground * (1 - s[:, -1:]), s[:, -1:]], dim=1)
        return s


def _safe(total: Tensor) -> Tensor:
    return total.clamp_min(torch.finfo(total.dtype).tiny)
