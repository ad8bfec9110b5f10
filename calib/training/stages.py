"""Fitting a method on every stage of a cascade; on other detectors there is one."""

import json
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save

from calib.cache import Cache
from calib.errors import InputError, UnsupportedError
from calib.files import replacing
from calib.heads.base import Head, head_from
from calib.heads.cascade import CascadeHead, cascade
from calib.layout import TENSORS
from calib.progress import Bar, Progress
from calib.training.context import FitContext
from calib.training.loop import Method, Trainings, fitting, run_alone


def fit_alone(method: Method, cache: Cache, context: FitContext) -> Head:
    """Fit ``method`` on ``cache``; the head is on the CPU and frozen. Raises as ``fit_stages``."""
    return run_alone(fit_stages(method, cache, context)).to("cpu").eval().requires_grad_(False)


def fit_stages(method: Method, cache: Cache, context: FitContext) -> Trainings[Head]:
    """Fit ``method`` on ``cache``; on a cascade once per stage, on the rows of that stage, and compose.

    A stage's loss has the weight that the detector trained it with, where that is known (mmdetection: 1, 1/2, 1/4).
    Stages that are done are kept beside the checkpoints, so that an interrupted fit goes on with the next one.

    Raises:
        As ``method.fit``. UnsupportedError: as ``CascadeHead`` and ``stage_bases``.
    """
    bases = stage_bases(context.base, cache)
    if len(bases) == 1:
        return (yield from fitting(method, cache, context))
    heads = []
    for k, base in enumerate(bases):
        heads.append((yield from _fit_stage(method, cache, replace(context, base=base), k)))
    return cascade(heads, cache.manifest.detector.average)


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


def _fit_stage(method: Method, cache: Cache, context: FitContext, k: int) -> Trainings[Head]:
    folder = None if context.checkpoint is None else context.checkpoint / f"stage{k}"
    done = None if folder is None else folder / TENSORS
    if done is not None and done.exists():
        head, losses = _read(done)
        context.losses.extend(losses)
        return head
    losses = []
    progress = _named(context.progress, f"stage {k + 1} of {len(cache.stages)}")
    weights = cache.manifest.detector.settings.get("stage_loss_weights") or [1.0] * len(cache.stages)
    own = replace(context, progress=progress, checkpoint=folder, losses=losses, loss_weight=float(weights[k]))
    try:
        head = (yield from fitting(method, cache.stages[k], own)).to("cpu").eval().requires_grad_(False)
    except InputError as e:  # of rows: those of the other stages may do
        raise InputError(f"stage {k + 1} of {len(cache.stages)}: {e}", hint=e.hint) from e
    if done is not None:
        _write(done, head, losses)
    context.losses.extend(losses)
    return head


def _write(path: Path, head: Head, losses: list[tuple[int, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.contiguous() for n, t in head.state_dict().items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, {"head": json.dumps(head.description()), "losses": json.dumps(losses)}))


def _read(path: Path) -> tuple[Head, list[tuple[int, float]]]:
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
        head = head_from(json.loads(about["head"]))
    head.load_state_dict(load_file(path))
    return head.eval().requires_grad_(False), [(int(s), float(v)) for s, v in json.loads(about["losses"])]


def _named(progress: Progress, stage: str) -> Progress:
    def opened(label: str, *, total: int, unit: str) -> AbstractContextManager[Bar]:
        return progress(f"{label}, {stage}", total=total, unit=unit)

    return opened
