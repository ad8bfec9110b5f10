"""Residual head: a linear layer and, beside it, a branch of two layers that corrects it.

Paper: none, this project's own; the branch is a residual connection (He et al., CVPR 2016) around the classifier, its
dropout that of Srivastava et al., JMLR 2014.
Eq. (logits): z = W_0 x + b_0 + W_2 dropout(relu(W_1 x + b_1)) + b_2, scores = softmax(z). W_0, b_0 start as the layer
of the detector or the base and are trained on; W_2 and b_2 start at 0, so that step 0 is the base.
Eq. (loss): L = mean over rows of CE(z + tau log pi), rows drawn uniformly, AdamW.
Differs: nothing is balanced with ``tau`` 0; the prior is then taken out of the logits after training, by a head of
``logit-adjustment`` that is built on this one, with its own tau chosen on a tune split.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.base import FitRun, Head, LogitHead
from calib.heads.fit import Batch, fit
from calib.heads.linear import LinearClassifier
from calib.heads.logit_adjustment import anchored
from calib.heads.stack import base_layer
from calib.losses.margin import shifted_values
from calib.sampling.uniform import UniformSampler
from calib.settings import AdamLoop, at_least


def _loop() -> AdamLoop:
    return AdamLoop(steps=2500, lr=1e-3, weight_decay=0.05, schedule="cosine", warmup_steps=100)


@dataclass(frozen=True)
class Residual:
    """``hidden``: width of the branch; ``dropout``: share of it that a row does without; ``tau``: logit adjustment in
    the loss."""

    hidden: int = 1024
    dropout: float = 0.5
    tau: float = 0.0
    rows_per_step: int = 2048
    loop: AdamLoop = field(default_factory=_loop)

    space: ClassVar[dict[str, Any]] = {
        "dropout": {"range": [0.0, 0.8]},
        "tau": {"range": [0.0, 1.0]},
        "hidden": {"choice": [1024, 512]},
        "lr": {"log": [0.0002, 0.005]},
        "weight_decay": {"log": [0.001, 0.3]},
    }

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden", "rows_per_step")
        at_least(self, 0, "dropout", "tau")
        if not self.dropout < 1:
            raise SettingError(f"dropout is {self.dropout}: expected a share below 1")

    def fit(self, cache: Cache, run: FitRun) -> Head:
        """Train the layer on and the branch beside it."""
        head = ResidualHead(base_layer(cache, run), self.hidden)
        head.reset(torch.Generator().manual_seed(run.seed))
        adjustment = anchored(torch.from_numpy(cache.categories.instance_count), self.tau, "rare")
        shift = torch.cat([adjustment, adjustment.new_zeros(1)]).float().to(run.device)

        def objective(batch: Batch) -> Tensor:
            z = head.logits(batch.features, self._kept(batch))
            return batch.row_mean(shifted_values(z, batch.labels, shift))

        sampler = UniformSampler(cache, rows_per_step=self.rows_per_step, seed=run.seed)
        fit(head, objective, sampler, cache, self.loop, run, label="residual")
        return head

    def _kept(self, batch: Batch) -> Tensor | None:
        """[n, H] factors of dropout, drawn for all rows of the step: 0, or 1 / (1 - dropout)."""
        if self.dropout == 0:
            return None
        kept = torch.empty(len(batch.all_labels), self.hidden).bernoulli_(1 - self.dropout, generator=batch.generator)
        return batch.world.mine(kept).to(batch.features.device) / (1 - self.dropout)


class ResidualHead(LogitHead):
    """Softmax over the sum of a linear classifier and a branch of two layers."""

    kind = "residual"
    not_linear = "it has a hidden layer"

    def __init__(self, classifier: LinearClassifier, hidden: int) -> None:
        super().__init__()
        self.classifier, self.hidden = classifier, hidden
        outputs, self.feature_size = classifier.weight.shape
        self.num_classes = outputs - 1
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
