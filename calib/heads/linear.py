"""The linear (or cosine) classifier and the softmax over it: the detector's own head and every head that stays linear.

Formulas:
    linear  z = x W^T + b
    cosine  z = t * (x / |x|) (W / |W|)^T, no bias, norms floored at 1e-12
    score_c = exp(z_c) / sum_{j=0..C} exp(z_j)
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from calib.cache import Classifier
from calib.heads.base import Head, empty


class LinearClassifier(nn.Module):
    """[N, D] -> [N, K] logits. ``scale`` makes it a cosine classifier."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone())
        # Frozen unless a method asks for it: most train the weights of a cosine classifier at its own scale.
        self.scale = None if scale is None else nn.Parameter(scale.clone().reshape(1), requires_grad=False)

    @classmethod
    def of(cls, classifier: Classifier) -> Self:
        """The detector's own classifier."""
        bias = None if classifier.bias is None else torch.from_numpy(classifier.bias)
        scale = None if classifier.scale is None else torch.from_numpy(classifier.scale)
        return cls(torch.from_numpy(classifier.weight), bias, scale)

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        bias = empty(config["outputs"]) if config["bias"] else None
        return cls(empty(config["outputs"], config["feature_size"]), bias, empty(1) if config["cosine"] else None)

    def config(self) -> dict[str, Any]:
        """Its shape."""
        outputs, feature_size = self.weight.shape
        bias, cosine = self.bias is not None, self.scale is not None
        return {"outputs": outputs, "feature_size": feature_size, "bias": bias, "cosine": cosine}

    def forward(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, K]."""
        if self.scale is not None:
            return self.scale * F.linear(F.normalize(features, eps=1e-12), F.normalize(self.weight, eps=1e-12))
        return F.linear(features, self.weight, self.bias)


class LinearHead(Head):
    """Softmax over a linear or cosine classifier; scores are the foreground probabilities.

    ``detector_logits`` says that the classifier is the detector's own, so that given logits may be used as they are;
    ``background_first`` keeps the detector's column order inside the softmax, whose rounding depends on it.
    """

    kind = "linear"

    def __init__(
        self, classifier: LinearClassifier, *, detector_logits: bool = False, background_first: bool = False
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.detector_logits = detector_logits
        self.background_first = background_first
        outputs, self.feature_size = classifier.weight.shape
        self.num_classes = outputs - 1

    def config(self) -> dict[str, Any]:
        """Shape and flags."""
        flags = {"detector_logits": self.detector_logits, "background_first": self.background_first}
        return {"classifier": self.classifier.config(), **flags}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        flags = {k: bool(config[k]) for k in ("detector_logits", "background_first")}
        return cls(LinearClassifier.build(config["classifier"]), **flags)

    def logits(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, C+1]."""
        z: Tensor = self.classifier(features)
        return z

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1] probabilities."""
        z = logits if logits is not None and self.detector_logits else self.logits(features)
        if self.background_first:
            return z.roll(1, dims=1).softmax(dim=1).roll(-1, dims=1)
        return z.softmax(dim=1)
