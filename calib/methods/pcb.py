"""PCB: losses softened by the classes that are usually confused into the true one, and an iterative head.

Paper: He et al., Relieving Long-tailed Instance Segmentation via Pairwise Class Balance, CVPR 2022. Equations of the
confusion matrix and of the regularised losses: ``losses/confusion.py``; of the head: ``heads/iterative.py``.

Eq. (total): L = sum_r w_r L_r over the R passes, w = 0.2 for every pass but the last, which has the rest (beyond five
passes w = 1 / R for all); the strength of pass r is alpha r / (R - 1).
Differs: the authors' code (megvii-research/PCB 066cd92) regularises from epoch 17 of 24 and only once every class was
seen; here from ``begin`` of the steps; ``every_class_first`` keeps the second rule, which can switch PCB off for ever
on small caches. Defaults of alpha are theirs: 0.4 (ce), 0.05 (seesaw), 0.2 (eql-v2). Their head works on RoI maps with
a box branch; on cached features it is the vector form of the supplement.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from calib.cache import Cache
from calib.errors import SettingError
from calib.heads.base import Head
from calib.heads.box_head import input_rows
from calib.heads.iterative import LAYER_NORMS, IterativeHead
from calib.heads.iterative_map import IterativeMapHead
from calib.heads.sigmoid import fresh_sigmoid
from calib.losses.confusion import (
    class_sums,
    pcb_seesaw_parts,
    pcb_sigmoid_target,
    pcb_softmax_parts,
    regularisation_strength,
    update_confusion,
)
from calib.losses.seesaw import objectness_values
from calib.losses.sigmoid import one_hot
from calib.methods.eql_v2 import GradientBalance
from calib.methods.seesaw import COUNTS, SeesawCounts, objectness_classifier
from calib.parallel.distributed import World
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop, at_least, one_of
from calib.training.bases import base_layer, refuse_base
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.loop import Training, Trainings

_ALPHA = {"ce": 0.4, "seesaw": 0.05, "eql-v2": 0.2}


@dataclass(frozen=True)
class PCB:
    """``base``: the loss that is regularised; ``alpha`` none: its default; ``matrix_momentum``: of the confusion
    matrix; ``iterations`` 1: no feedback; ``form``: map iterates on RoI maps with the detector's frozen box head;
    ``hidden``, ``mlp_layers``: of the feedback MLPs; ``layer_norm``: before which (the authors' eql-v2: logits);
    ``counts`` of the seesaw base: online or local."""

    base: str = "ce"
    alpha: float | None = None
    matrix_momentum: float = 0.99
    form: str = "vector"
    iterations: int = 2
    hidden: int = 256
    mlp_layers: int = 2
    layer_norm: str = "none"
    begin: float = 2 / 3
    every_class_first: bool = False
    counts: str = "online"
    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    space: ClassVar[dict[str, Any]] = {
        "base": {"choice": ["seesaw", "ce"]},
        "begin": {"choice": [0.333, 0.667]},
        "layer_norm": {"choice": ["none", "logits"]},
        "lr": {"log": [0.02, 1.0]},
        "weight_decay": {"log": [1e-06, 0.001]},
        "sampling": {"choice": ["repeat-factor", "natural"]},
        "repeat_threshold": {"choice": [0.001, 0.02, 0.05]},
    }
    space_on_base: ClassVar[dict[str, Any]] = {**space, "base": {"choice": ["ce"]}}

    def __post_init__(self) -> None:
        one_of(self, "base", tuple(_ALPHA))
        one_of(self, "form", ("vector", "map"))
        one_of(self, "counts", COUNTS)
        one_of(self, "layer_norm", LAYER_NORMS)
        at_least(self, 0, "matrix_momentum", "begin")
        if max(self.begin, self.matrix_momentum) > 1:
            raise SettingError("begin and matrix_momentum are shares: expected numbers in [0, 1]")
        at_least(self, 1, "iterations", "hidden", "mlp_layers")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise SettingError(f"alpha is {self.alpha}: expected a number in [0, 1]")

    def fit(self, cache: Cache, context: FitContext) -> Trainings[Head]:
        """Train the (iterative) head with the regularised loss."""
        head = self._start(cache, context)
        loss = _LOSSES[self.base](cache, self, context.world)

        def objective(batch: Batch) -> Tensor:
            active = loss.active(batch, self.begin * self.loop.steps, self.every_class_first)
            total = torch.zeros((), device=batch.features.device)
            early = min(0.2, 1 / self.iterations)
            for r, z in enumerate(head.passes(batch.features)):
                strength = regularisation_strength(loss.alpha, r, self.iterations) if active else 0.0
                last = r == self.iterations - 1
                weight = 1 - early * (self.iterations - 1) if last else early
                total = total + weight * batch.chunk_mean(loss.values(z, batch, strength))
            return total

        model = nn.ModuleDict({"head": head, "loss": loss})
        sampler = InstanceSampler(cache, self.images, seed=context.seed)
        yield Training(model, objective, sampler, cache, self.loop, context, label="pcb", rows=input_rows(cache, head))
        return head

    def _start(self, cache: Cache, context: FitContext) -> IterativeHead | IterativeMapHead:
        c, d, seed = len(cache.categories), cache.manifest.detector.feature_size, context.seed
        if self.base != "ce":
            refuse_base(context, f"base={self.base} draws a fresh layer")
        if self.base == "ce":
            classifier, activation = base_layer(cache, context), "softmax"
        elif self.base == "seesaw":
            classifier, activation = objectness_classifier(cache, 20.0, seed), "objectness"
        else:
            classifier, activation = fresh_sigmoid(c + 1, d, seed), "sigmoid"
        make = partial(IterativeMapHead.of, cache) if self.form == "map" else IterativeHead
        form = {k: getattr(self, k) for k in ("iterations", "hidden", "mlp_layers", "layer_norm")}
        head: IterativeHead | IterativeMapHead = make(classifier, activation=activation, **form)
        head.reset(torch.Generator().manual_seed(seed))
        return head


class Regularised(nn.Module, ABC):
    """A base loss with the running confusion matrix [C, C] and which classes were seen [C]."""

    matrix: Tensor
    seen: Tensor

    def __init__(self, cache: Cache, settings: PCB, world: World) -> None:
        super().__init__()
        c = len(cache.categories)
        self.alpha = _ALPHA[settings.base] if settings.alpha is None else settings.alpha
        self._momentum, self._renormalise = settings.matrix_momentum, settings.base != "eql-v2"
        self.register_buffer("matrix", torch.zeros(c, c))
        self.register_buffer("seen", torch.zeros(c, dtype=torch.bool))

    def active(self, batch: Batch, begin: float, every_class_first: bool) -> bool:
        """Whether this step is regularised."""
        present = torch.bincount(batch.all_labels, minlength=len(self.seen) + 1)[:-1] > 0
        self.seen = self.seen | present
        return batch.step >= begin and (not every_class_first or bool(self.seen.all()))

    def observe(self, p: Tensor, batch: Batch) -> None:
        """Update the matrix with [n, C] probabilities of the rows of all processes."""
        foreground = batch.labels < len(self.matrix)
        sums = class_sums(p[foreground], batch.labels[foreground])
        batch.world.all_reduce([*sums])
        self.matrix = update_confusion(self.matrix, *sums, self._momentum, renormalise=self._renormalise)

    @abstractmethod
    def values(self, logits: Tensor, batch: Batch, strength: float) -> Tensor:
        """[n, K] -> [n]; observes the logits first."""


class _CrossEntropy(Regularised):
    def values(self, logits: Tensor, batch: Batch, strength: float) -> Tensor:
        self.observe(logits[:, :-1].softmax(dim=1), batch)
        first, second = pcb_softmax_parts(logits, batch.labels, self.matrix, strength)
        return first + second


class _Seesaw(Regularised):
    def __init__(self, cache: Cache, settings: PCB, world: World) -> None:
        super().__init__(cache, settings, world)
        self.counts = SeesawCounts(cache, settings.counts, world)

    def values(self, logits: Tensor, batch: Batch, strength: float) -> Tensor:
        z, pair = logits[:, :-2], logits[:, -2:]
        counts = self.counts.after(batch.all_labels)
        self.observe(z.softmax(dim=1), batch)
        first, second = pcb_seesaw_parts(z, batch.labels, counts, self.matrix, strength, 0.8, 2.0, 0.01)
        return first + second + objectness_values(pair, batch.labels, len(self.matrix))


class _EQLv2(Regularised):
    def __init__(self, cache: Cache, settings: PCB, world: World) -> None:
        super().__init__(cache, settings, world)
        self.balance = GradientBalance(len(cache.categories), 12.0, 0.8, 4.0)

    def values(self, logits: Tensor, batch: Batch, strength: float) -> Tensor:
        self.observe(logits[:, :-1].sigmoid(), batch)
        labels = batch.labels
        target = pcb_sigmoid_target(one_hot(labels, logits.shape[1]), labels, self.matrix, strength)
        return self.balance.values(logits, target, batch.world)


_LOSSES: dict[str, type[Regularised]] = {"ce": _CrossEntropy, "seesaw": _Seesaw, "eql-v2": _EQLv2}
