"""A classifier that looks several times: what it predicted is fed back into the feature.

z_r = W f_r + b, f_0 = x, f_{r+1} = f_r + MLP(z_r) (He et al., Pairwise Class Balance, CVPR 2022, supplement D: the form
for feature vectors). Scores are those of the last pass. MLP: linear, ReLU, ..., linear; the authors' code
(megvii-research/PCB 066cd92, mlp.py) can put a LayerNorm before the first layer (``use_layer_norm``).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from calib.heads.base import Folded, LogitHead, log_scores, not_foldable
from calib.heads.linear import LinearClassifier
from calib.losses.seesaw import seesaw_scores
from calib.losses.sigmoid import eql_v2_scores

# Activation -> columns of the classifier beyond the C classes.
EXTRA_COLUMNS = {"softmax": 1, "objectness": 2, "sigmoid": 1}
LAYER_NORMS = ("none", "logits", "both")  # whose MLP has one before its first layer: both is logits and boxes


def feedback_layers(inputs: int, hidden: int, outputs: int, layers: int) -> list[nn.Linear]:
    """Linear layers of an MLP with ``hidden`` units between them."""
    return [nn.Linear(a, b) for a, b in pairwise([inputs, *[hidden] * (layers - 1), outputs])]


def feedback(layers: Sequence[nn.Module], norm: nn.Module | None, x: Tensor) -> Tensor:
    """[N, inputs] -> [N, outputs]."""
    y: Tensor = x if norm is None else norm(x)
    for layer in layers[:-1]:
        y = layer(y).relu()
    out: Tensor = layers[-1](y)
    return out


def reset_feedback(layers: Sequence[nn.Module], last: float, generator: torch.Generator) -> None:
    """torch's default initialisation; the last layer gives ``last`` whatever it is given."""
    with torch.no_grad():
        for layer in layers[:-1]:
            assert isinstance(layer, nn.Linear)
            for parameter in layer.parameters():
                parameter.uniform_(-(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator)
        weight, bias = layers[-1].parameters()
        weight.zero_()
        bias.fill_(last)


class IterativeHead(LogitHead):
    """``iterations`` R passes; 1 is the plain classifier and has no MLP. Of ``layer_norm``
    logits and both are the same here: there is one MLP."""

    kind = "iterative"

    def __init__(
        self,
        classifier: LinearClassifier,
        *,
        activation: str,
        iterations: int,
        hidden: int,
        mlp_layers: int = 2,
        layer_norm: str = "none",
    ) -> None:
        outputs, feature_size = classifier.weight.shape
        super().__init__(outputs - EXTRA_COLUMNS[activation], feature_size)
        self.classifier = classifier
        self.activation, self.iterations, self.hidden = activation, iterations, hidden
        self.mlp_layers, self.layer_norm = mlp_layers, layer_norm
        made = feedback_layers(outputs, hidden, self.feature_size, mlp_layers) if iterations > 1 else []
        for i, layer in enumerate(made, start=1):
            self.add_module(f"fc{i}", layer)
        self.norm = nn.LayerNorm(outputs) if made and layer_norm != "none" else None

    @property
    def mlp(self) -> list[nn.Module]:
        """The linear layers of the MLP, fc1 and on; none for one pass."""
        return [self.get_submodule(f"fc{i}") for i in range(1, self.mlp_layers + 1)] if self.iterations > 1 else []

    def reset(self, generator: torch.Generator) -> None:
        """torch's default initialisation of the MLP, its last layer at 0: every pass starts as the plain classifier."""
        if self.mlp:
            reset_feedback(self.mlp, 0.0, generator)

    def config(self) -> dict[str, Any]:
        """Shape and form."""
        form = {k: getattr(self, k) for k in ("activation", "iterations", "hidden", "mlp_layers", "layer_norm")}
        return {"classifier": self.classifier.config(), **form}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        form = {k: v for k, v in config.items() if k != "classifier"}  # older heads have two layers and no LayerNorm
        return cls(LinearClassifier.build(config["classifier"]), **form)

    def passes(self, features: Tensor) -> list[Tensor]:
        """[N, D] -> R times [N, K] logits."""
        f, out = features, [self.classifier(features)]
        for _ in range(self.iterations - 1):
            f = f + feedback(self.mlp, self.norm, out[-1])
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
