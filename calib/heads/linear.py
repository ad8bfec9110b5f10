"""The linear (or cosine) classifier and the softmax over it: the detector's own head and every head that stays linear.

Formulas:
    linear    z = x W^T + b
    cosine    z = t (x / |x|) . (w / |w|), no bias, norms floored at 1e-12 (DisAlign's detectors, LDAM with t = 1)
    normed    z = t x / (|x| + 1e-6) . w / (|w| + 1e-6) + b (mmdetection's NormedLinear)
    squashed  z = t |x| / (1 + |x|) (x / |x|) . (w / |w|), no bias (classifier-balancing, t = 16)
    score_c = exp(z_c) / sum_{j=0..C} exp(z_j)
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.cache import Classifier
from calib.errors import ShapeError
from calib.heads.base import Folded, Head, LogitHead, empty, head_from, not_foldable


class LinearClassifier(nn.Module):
    """[N, D] -> [N, K] logits in one of the ``FORMS``; all but ``linear`` have a ``scale``."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None, form: str | None = None
    ) -> None:
        super().__init__()
        self.form = form or ("linear" if scale is None else "cosine")
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
    def fresh(cls, outputs: int, feature_size: int, form: str, generator: torch.Generator) -> Self:
        """As each form starts in its source: weights N(0, 0.01) (``squashed``: uniform), biases 0, scale 20 (16)."""
        weight = torch.randn(outputs, feature_size, generator=generator) * 0.01
        if form == "squashed":
            weight = (torch.rand(outputs, feature_size, generator=generator) * 2 - 1) * feature_size**-0.5
        bias = empty(outputs) if form in ("linear", "normed") else None
        scale = {"linear": None, "cosine": torch.tensor([20.0]), "normed": torch.tensor([20.0])}
        return cls(weight, bias, scale.get(form, torch.tensor([16.0])), form)

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        form = str(config["form"])
        if form not in FORMS:
            raise ValueError(f"unknown form of classifier '{form}'")
        bias = empty(config["outputs"]) if config["bias"] else None
        return cls(empty(config["outputs"], config["feature_size"]), bias, None if form == "linear" else empty(1), form)

    def config(self) -> dict[str, Any]:
        """Its shape."""
        outputs, feature_size = self.weight.shape
        return {"outputs": outputs, "feature_size": feature_size, "bias": self.bias is not None, "form": self.form}

    def folded(self) -> Folded:
        """Itself.

        Raises:
            UnsupportedError: a form that divides features by their norm.
        """
        if self.form != "linear":
            raise not_foldable(f"the classifier is of the form '{self.form}', which divides features by their norm")
        bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias
        return Folded(self.weight.detach(), bias.detach())

    def forward(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, K]."""
        if self.form == "linear":
            return functional.linear(features, self.weight, self.bias)
        assert self.scale is not None
        x, w = directions_of_features(features, self.form), directions_of_weight(self.weight, self.form)
        cosine = self.scale * functional.linear(x, w)
        return cosine if self.bias is None else cosine + self.bias


FORMS = ("linear", "cosine", "normed", "squashed")


def directions_of_features(x: Tensor, form: str) -> Tensor:
    """[N, D] -> [N, D] as the form divides features; ``linear`` leaves them alone."""
    if form == "squashed":
        return x / (1 + _norms(x))  # |x| / (1 + |x|) times x / |x|
    return _directions(x, form)


def directions_of_weight(w: Tensor, form: str) -> Tensor:
    """[K, D] -> [K, D] as the form divides weights; ``linear`` leaves them alone."""
    if form == "squashed":
        return w / _norms(w).clamp_min(torch.finfo(w.dtype).tiny)
    return _directions(w, form)


def _directions(x: Tensor, form: str) -> Tensor:
    if form == "linear":
        return x
    return functional.normalize(x, eps=1e-12) if form == "cosine" else x / (_norms(x) + 1e-6)


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = x.norm(dim=1, keepdim=True)
    return norms


Logits = LinearClassifier | LogitHead


class ClassifierHead(Head):
    """A head over logits: those of a linear ``classifier``, or of another head, which it is built on.

    ``detector_logits`` says that the classifier is the detector's own, so that given logits may be used as they are;
    ``extra``: its columns beyond the C classes.
    """

    def __init__(self, classifier: Logits, *, detector_logits: bool, extra: int = 1) -> None:
        if isinstance(classifier, LogitHead):
            super().__init__(classifier.num_classes, classifier.feature_size)
        else:
            outputs, feature_size = classifier.weight.shape
            super().__init__(outputs - extra, feature_size)
        self.classifier, self.detector_logits = classifier, detector_logits

    def config(self) -> dict[str, Any]:
        """The classifier's shape or the head's description, and whether it is the detector's own."""
        below = self.classifier
        described = below.description() if isinstance(below, LogitHead) else below.config()
        return {"classifier": described, "detector_logits": self.detector_logits}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        below, more = config["classifier"], {k: v for k, v in config.items() if k != "classifier"}
        classifier = head_from(below) if "kind" in below else LinearClassifier.build(below)
        if not isinstance(classifier, Logits):
            raise ValueError(f"a head of kind '{classifier.kind}' has no logits")
        return cls(classifier, **more)

    def logits(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D], [N, K] -> [N, K] of the classifier; the detector's own may be given.

        Raises:
            ShapeError: those have another width.
        """
        if isinstance(self.classifier, LogitHead):
            return self.classifier.forward(features, logits)
        if logits is not None and self.detector_logits:
            if logits.shape[1] != len(self.classifier.weight):
                expected = [len(features), len(self.classifier.weight)]
                raise ShapeError(f"logits have shape {list(logits.shape)}: expected {expected}")
            return logits
        z: Tensor = self.classifier(features)
        return z

    def raw(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """As ``logits``: heads that change them first override this."""
        return self.logits(features, logits)


class LinearHead(ClassifierHead, LogitHead):
    """Softmax over a linear or cosine classifier; scores are the foreground probabilities.

    ``background_first`` keeps the detector's column order inside the softmax, whose rounding depends on it.
    """

    kind = "linear"

    classifier: LinearClassifier

    def __init__(
        self, classifier: LinearClassifier, *, detector_logits: bool = False, background_first: bool = False
    ) -> None:
        super().__init__(classifier, detector_logits=detector_logits)
        self.background_first = background_first

    def config(self) -> dict[str, Any]:
        """As ``ClassifierHead.config``, and the order."""
        return super().config() | {"background_first": self.background_first}

    def folded(self) -> Folded:
        """The classifier."""
        return self.classifier.folded()

    def activate(self, raw: Tensor) -> Tensor:
        """[N, C+1] -> [N, C+1] probabilities."""
        if self.background_first:
            return raw.roll(1, dims=1).softmax(dim=1).roll(-1, dims=1)
        return raw.softmax(dim=1)
