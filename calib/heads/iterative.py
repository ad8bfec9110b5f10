"""A classifier that looks several times: what it predicted is fed back into the feature.

z_r = W f_r + b, f_0 = x, f_{r+1} = f_r + MLP(z_r) (He et al., Pairwise Class Balance, CVPR 2022, supplement D: the form
for feature vectors). Scores are those of the last pass.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from calib.heads.base import Folded, LogitHead, log_scores, not_foldable
from calib.heads.linear import LinearClassifier
from calib.losses.seesaw import seesaw_scores
from calib.losses.sigmoid import eql_v2_scores

# Activation -> columns of the classifier beyond the C classes.
EXTRA_COLUMNS = {"softmax": 1, "objectness": 2, "sigmoid": 1}


class IterativeHead(LogitHead):
    """``iterations`` R passes; 1 is the plain classifier and has no MLP."""

    kind = "iterative"

    def __init__(self, classifier: LinearClassifier, *, activation: str, iterations: int, hidden: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.activation, self.iterations, self.hidden = activation, iterations, hidden
        outputs, self.feature_size = classifier.weight.shape
        self.num_classes = outputs - EXTRA_COLUMNS[activation]
        self.fc1 = nn.Linear(outputs, hidden) if iterations > 1 else None
        self.fc2 = nn.Linear(hidden, self.feature_size) if iterations > 1 else None

    def reset(self, generator: torch.Generator) -> None:
        """torch's default initialisation of the MLP, its last layer at 0: every pass starts as the plain classifier."""
        if self.fc1 is None or self.fc2 is None:
            return
        bound = self.fc1.in_features**-0.5
        with torch.no_grad():
            self.fc1.weight.uniform_(-bound, bound, generator=generator)
            self.fc1.bias.uniform_(-bound, bound, generator=generator)
            self.fc2.weight.zero_()
            self.fc2.bias.zero_()

    def config(self) -> dict[str, Any]:
        """Shape and form."""
        form = {"activation": self.activation, "iterations": self.iterations, "hidden": self.hidden}
        return {"classifier": self.classifier.config(), **form}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        form = {k: config[k] for k in ("activation", "iterations", "hidden")}
        return cls(LinearClassifier.build(config["classifier"]), **form)

    def passes(self, features: Tensor) -> list[Tensor]:
        """[N, D] -> R times [N, K] logits."""
        f, out = features, [self.classifier(features)]
        for _ in range(self.iterations - 1):
            assert self.fc1 is not None and self.fc2 is not None
            f = f + self.fc2(self.fc1(out[-1]).relu())
            out.append(self.classifier(f))
        return out

    def folded(self) -> Folded:
        """The classifier, for a single pass with a softmax."""
        if self.iterations > 1 or self.activation != "softmax":
            raise not_foldable(f"the head makes {self.iterations} passes with the activation {self.activation}")
        return self.classifier.folded()

    @property
    def distribution(self) -> str:
        """Products of two sigmoids are none."""
        return "" if self.activation == "sigmoid" else "softmax"

    def forward(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1] logits whose softmax are the scores."""
        z = self.raw(features, logits)
        return z if self.activation == "softmax" else log_scores(self.activate(z))

    def raw(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, K] logits of the last pass."""
        return self.passes(features)[-1]

    def activate(self, raw: Tensor) -> Tensor:
        """[N, K] -> [N, C+1]."""
        return activated(raw, self.activation)


def activated(logits: Tensor, activation: str) -> Tensor:
    """[N, K] logits -> [N, C+1] scores."""
    if activation == "objectness":
        return seesaw_scores(logits)
    return eql_v2_scores(logits) if activation == "sigmoid" else logits.softmax(dim=1)
