"""A linear layer and, beside it, a branch of two layers that corrects it; equations: ``methods/residual.py``."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from calib.heads.base import LogitHead
from calib.heads.linear import LinearClassifier


class ResidualHead(LogitHead):
    """Softmax over the sum of a linear classifier and a branch of two layers."""

    kind = "residual"
    not_linear = "it has a hidden layer"

    def __init__(self, classifier: LinearClassifier, hidden: int) -> None:
        outputs, feature_size = classifier.weight.shape
        super().__init__(outputs - 1, feature_size)
        self.classifier, self.hidden = classifier, hidden
        self.fc1, self.fc2 = nn.Linear(self.feature_size, hidden), nn.Linear(hidden, outputs)

    def reset(self, generator: torch.Generator) -> None:
        """torch's default initialisation of the first layer, 0 of the second."""
        bound = self.feature_size**-0.5
        with torch.no_grad():
            self.fc1.weight.uniform_(-bound, bound, generator=generator)
            self.fc1.bias.uniform_(-bound, bound, generator=generator)
            self.fc2.weight.zero_()
            self.fc2.bias.zero_()

    def config(self) -> dict[str, Any]:
        """The classifier's shape and the width of the branch."""
        return {"classifier": self.classifier.config(), "hidden": self.hidden}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        return cls(LinearClassifier.build(config["classifier"]), int(config["hidden"]))

    def logits(self, features: Tensor, kept: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1]; ``kept`` [N, H] multiplies what the first layer of the branch gives."""
        h = self.fc1(features).relu()
        z: Tensor = self.classifier(features) + self.fc2(h if kept is None else h * kept)
        return z

    def raw(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1] logits."""
        return self.logits(features)

    def activate(self, raw: Tensor) -> Tensor:
        """[N, C+1] -> [N, C+1] probabilities."""
        return raw.softmax(dim=1)
