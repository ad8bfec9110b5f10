"""DisAlign: a learned per-class scale and shift of the logits, blended by a per-proposal confidence.

Paper: Zhang et al., Distribution Alignment: A Unified Framework for Long-tail Visual Recognition, CVPR 2021.

Eq. 4 (confidence): s = sigmoid(x v^T + c), one number per proposal.
Eq. 5 (aligned): z'_k = s (alpha_k z_k + beta_k) + (1 - s) z_k for foreground k; the background logit is untouched.
Eq. 6 as printed: z'_k = (1 + s alpha_k) z_k + s beta_k (``parametrisation="eq6"``).
Eq. 11 (weights): w_k proportional to instance_count_k^-rho, mean 1 over the foreground, background 1.
Loss: (1/K) sum_k sum_{i in chunk k} w_{y_i} CE_i / sum_{i in chunk k} w_{y_i}.
Differs: eq. 5 and eq. 6 disagree in the paper; detection code (cvpods 2deea5dc, disalign_fast_rcnn.py) has eq. 5,
the default. Eq. 11 normalises to sum 1; the code to mean 1, which matters beside the background's weight of 1.
``base="cosine"`` first fits a cosine classifier (scale from 20) to the cache, as the paper's stage 1 does.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from calib.cache import Cache
from calib.heads.base import FitRun, Folded, Head, LogitHead, empty, not_foldable
from calib.heads.fit import Batch, fit
from calib.heads.linear import ClassifierHead, LinearHead, Logits
from calib.heads.retrain import classifier_from
from calib.heads.stack import base_logits
from calib.losses.softmax import cross_entropy
from calib.losses.weights import power_class_weights
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, at_least, one_of


def _loop() -> Loop:
    # Authors' v0.5 recipe: 4,500 steps of 16 images, x0.1 at 4,000, decay on all four tensors.
    return Loop(steps=4500, lr=0.02, milestones=(8 / 9,), warmup_steps=1000)


@dataclass(frozen=True)
class DisAlign:
    """``rho``: strength of the re-weighting (0.8 in the paper's detection experiments).

    ``magnitude`` (alpha), ``margin`` (beta) and ``confidence`` (s, else 1) can each be switched off, as in Table 6.
    """

    rho: float = 0.8
    parametrisation: str = "eq5"
    base: str = "detector"
    magnitude: bool = True
    margin: bool = True
    confidence: bool = True
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=_loop)
    base_loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "set": {"base": "cosine"},
        "rho": {"range": [0.0, 1.5]},
        "lr": {"log": [0.02, 2.0]},
        "base_loop.lr": {"log": [0.05, 2.0]},
        "base_loop.weight_decay": {"log": [1e-06, 0.001]},
    }
    space_on_base: ClassVar[dict[str, Any]] = {"rho": {"range": [0.0, 1.5]}, "lr": {"log": [0.02, 2.0]}}

    def __post_init__(self) -> None:
        at_least(self, 0, "rho")
        one_of(self, "parametrisation", ("eq5", "eq6"))
        one_of(self, "base", ("detector", "cosine"))

    def fit(self, cache: Cache, run: FitRun) -> Head:
        """Freeze the classifier, train alpha, beta, v and c with natural sampling."""
        head = AlignedHead(
            self._base(cache, run),
            self.parametrisation,
            detector_logits=self.base == "detector" and run.base is None,
            uses_confidence=self.confidence,
        )
        head.reset(torch.Generator().manual_seed(run.seed))
        head.alpha.requires_grad_(self.magnitude)
        head.beta.requires_grad_(self.margin)
        head.confidence.requires_grad_(self.confidence)
        weights = power_class_weights(torch.from_numpy(cache.categories.instance_count), self.rho).to(run.device)

        def objective(batch: Batch) -> Tensor:
            values = cross_entropy(head.aligned(batch.features), batch.labels)
            return batch.chunk_mean(values, weights)

        fit(
            head,
            objective,
            InstanceSampler(cache, self.images, seed=run.seed),
            cache,
            self.loop,
            run,
            label="disalign",
        )
        return head

    def _base(self, cache: Cache, run: FitRun) -> Logits:
        if self.base == "detector":
            return base_logits(cache, run)
        head = LinearHead(classifier_from(cache, run, "cosine", len(cache.categories) + 1))
        head.requires_grad_(True)  # the scale too

        def objective(batch: Batch) -> Tensor:
            return batch.chunk_mean(cross_entropy(head.logits(batch.features), batch.labels))

        sampler = InstanceSampler(cache, self.images, seed=run.seed)
        fit(head, objective, sampler, cache, self.base_loop, run, label="disalign base")
        return head.classifier.requires_grad_(False)


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
