"""Heads of cascades: one fitted head per stage, averaged over stages as the detector averages its own scores.

Cascade R-CNN (Cai and Vasconcelos, CVPR 2018) classifies every RoI in each of S stages, with features of its own.
Detectron2's CascadeROIHeads averages probabilities, mmdetection's CascadeRoIHead and HTC average logits:

Eq. (probabilities): score = 1/S sum_s activate(z_s).
Eq. (logits): score = activate(1/S sum_s z_s); BAGS (group logits) and SimCal (each of its two heads) do so too.

Stages lie side by side: features [N, S*D], logits [N, S*K]. Letters: N proposals, S stages, D feature size, C classes.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from calib.cache import Cache
from calib.cache.rows import RowMatrix, Rows
from calib.errors import InputError, UnsupportedError
from calib.files import replacing
from calib.heads.base import FitRun, Head, LogitHead, Method, head_from
from calib.heads.box_head import input_rows
from calib.heads.combine import AverageHead, DualHead, SelectHead
from calib.progress import Progress


class CascadeHead(Head):
    """One head of the same kind per stage; ``average``: probabilities or logits.

    Raises:
        UnsupportedError: logits are to be averaged, and the head's scores are no function of logits.
    """

    kind = "cascade"
    not_linear = "it is the average of one head per stage"

    def __init__(self, heads: Sequence[Head], average: str) -> None:
        super().__init__()
        self.heads, self.average = nn.ModuleList(heads), average
        first = heads[0]
        if average == "logits" and not isinstance(first, LogitHead):
            raise UnsupportedError(
                f"the detector averages the logits of its {len(heads)} stages; a head of kind '{first.kind}' has no "
                "logits that make its scores",
                hint="of the methods, those with a softmax, sigmoid or group softmax over their logits have",
            )
        self.num_classes = first.num_classes
        self.feature_size = len(heads) * first.feature_size
        self.logits_size = len(heads) * (first.logits_size or first.num_classes + 1)

    def config(self) -> dict[str, Any]:
        """The heads, and what is averaged."""
        return {"heads": [h.description() for h in self.stages], "average": self.average}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        return cls([head_from(h) for h in config["heads"]], str(config["average"]))

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, S*D], [N, S*K] -> [N, C+1]."""
        heads = self.stages
        x = features.chunk(len(heads), dim=1)
        z = [None] * len(heads) if logits is None else logits.chunk(len(heads), dim=1)
        if self.average == "logits":  # mmdetection divides the sum, Detectron2 multiplies it
            same = [h for h in heads if isinstance(h, LogitHead)]
            raw = [h.raw(a, b) for h, a, b in zip(same, x, z, strict=True)]
            return same[0].activate(_sum(raw) / float(len(heads)))
        return _sum([h.full_scores(a, b) for h, a, b in zip(heads, x, z, strict=True)]) * (1.0 / len(heads))

    @property
    def stages(self) -> list[Head]:
        """The heads, first to last."""
        return [h for h in self.heads if isinstance(h, Head)]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def cascade(heads: Sequence[Head], average: str) -> Head:
    """One head of those of all stages. What is composed of two heads is composed again of the averages of both.

    Raises:
        UnsupportedError: as ``CascadeHead``.
    """
    first = heads[0]
    if isinstance(first, DualHead):
        tails, rests = zip(*[(h.tail, h.rest) for h in heads if isinstance(h, DualHead)], strict=True)
        return DualHead(cascade(tails, average), cascade(rests, average), first.is_tail)
    if isinstance(first, AverageHead | SelectHead):
        ones, others = zip(*[(h.one, h.other) for h in heads if isinstance(h, AverageHead | SelectHead)], strict=True)
        one, other = cascade(ones, average), cascade(others, average)
        return AverageHead(one, other) if isinstance(first, AverageHead) else SelectHead(one, other, first.eligible)
    return CascadeHead(heads, first.stage_average or average)


def fit_stages(method: Method, cache: Cache, run: FitRun) -> Head:
    """Fit ``method`` on ``cache``; on a cascade once per stage, on the rows of that stage, and compose.

    A stage's loss has the weight that the detector trained it with, where that is known (mmdetection: 1, 1/2, 1/4).
    Stages that are done are kept beside the checkpoints, so that an interrupted fit goes on with the next one.

    Raises:
        As ``method.fit``. UnsupportedError: as ``CascadeHead`` and ``stage_bases``.
    """
    bases = stage_bases(run.base, cache)
    if len(bases) == 1:
        head = method.fit(cache, run)
    else:
        heads = [_fit_stage(method, cache, replace(run, base=base), k) for k, base in enumerate(bases)]
        head = cascade(heads, cache.manifest.detector.average)
    head.logits_size = cache.manifest.detector.logits_size
    return head


def stage_bases(base: Head | None, cache: Cache) -> list[Head | None]:
    """The base of every stage of ``cache``.

    Raises:
        UnsupportedError: ``base`` works on RoI maps or on other features, or is no head per stage.
    """
    count, detector = len(cache.stages), cache.manifest.detector
    if base is None:
        return [None] * count
    if (base.inputs, base.feature_size) != ("features", count * detector.feature_size):
        raise UnsupportedError(
            f"the base takes {base.inputs} of {base.feature_size} numbers; those of cache {cache.path} are features "
            f"of {count * detector.feature_size}"
        )
    if count == 1:
        return [base]
    if not isinstance(base, CascadeHead):
        raise UnsupportedError(
            f"a head of kind '{base.kind}' is no base for the {count} stages of cache {cache.path}: each is built on a "
            "head of its own",
            hint="bases are heads with logits that were trained on this cache",
        )
    return list(base.stages)


def _fit_stage(method: Method, cache: Cache, run: FitRun, k: int) -> Head:
    folder = None if run.checkpoint is None else run.checkpoint / f"stage{k}"
    done = None if folder is None else folder / "head.safetensors"
    if done is not None and done.exists():
        head, losses = _read(done)
    else:
        losses = []
        progress = _named(run.progress, f"stage {k + 1} of {len(cache.stages)}")
        weights = cache.manifest.detector.settings.get("stage_loss_weights") or [1.0] * len(cache.stages)
        own = replace(run, progress=progress, checkpoint=folder, losses=losses, loss_weight=float(weights[k]))
        try:
            head = method.fit(cache.stages[k], own).to("cpu").eval().requires_grad_(False)
        except InputError as e:  # of rows: those of the other stages may do
            raise InputError(f"stage {k + 1} of {len(cache.stages)}: {e}", hint=e.hint) from e
        if done is not None:
            done.parent.mkdir(parents=True, exist_ok=True)
            kept = {n: t.contiguous() for n, t in head.state_dict().items()}
            with replacing(done) as temporary:
                temporary.write_bytes(
                    save(kept, {"head": json.dumps(head.description()), "losses": json.dumps(losses)})
                )
    head.logits_size = cache.manifest.detector.outputs
    run.losses.extend(losses)
    return head


def _read(path: Path) -> tuple[Head, list[tuple[int, float]]]:
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
        head = head_from(json.loads(about["head"]))
    head.load_state_dict(load_file(path))
    return head.eval().requires_grad_(False), [(int(s), float(v)) for s, v in json.loads(about["losses"])]


def _named(progress: Progress, stage: str) -> Progress:
    def opened(label: str, **keywords: Any) -> Any:
        return progress(f"{label}, {stage}", **keywords)

    return opened


class SideBySide:
    """Rows of several matrices with as many rows, one behind the other: [N, sum of widths]."""

    def __init__(self, parts: Sequence[RowMatrix]) -> None:
        self._parts = parts
        self.shape = (parts[0].shape[0], sum(p.shape[1] for p in parts))

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows ``start:stop``; raises as ``RowMatrix.read``."""
        return _joined([p.read(start, stop) for p in self._parts])

    def take(self, rows: Rows) -> NDArray[np.float32]:
        """The given rows; raises as ``RowMatrix.take``."""
        return _joined([p.take(rows) for p in self._parts])


def _joined(parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def scored_rows(cache: Cache, head: Head) -> SideBySide:
    """What ``head`` takes of ``cache`` to score it: features (of all stages) or RoI maps.

    Raises:
        UnsupportedError: the cache has no RoI maps, or is of another number of stages than the head.
    """
    rows = SideBySide([input_rows(stage, head) for stage in cache.stages])
    if rows.shape[1] != head.feature_size:
        raise UnsupportedError(
            f"cache {cache.path} has {len(cache.stages)} stages of {cache.manifest.detector.feature_size} features "
            f"({rows.shape[1]} in all); the head takes {head.feature_size}",
            hint="train the head on a cache of the same detector",
        )
    return rows


def exact_logits(cache: Cache) -> SideBySide | None:
    """The detector's own logits (of all stages) where every row has them in float32."""
    parts = [stage.logits for stage in cache.stages]
    exact = [p for p in parts if p is not None and p.dtype == np.float32]
    return SideBySide(exact) if len(exact) == len(parts) else None


class LogitRows(Protocol):
    """Logits of every row of a cache."""

    def read(self, start: int, stop: int) -> NDArray[np.float32]: ...


def as_tensor(rows: LogitRows | None, start: int, stop: int) -> Tensor | None:
    """Rows ``start:stop``, where there are any."""
    return None if rows is None else torch.from_numpy(rows.read(start, stop))
