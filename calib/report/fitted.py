"""What heads on disk say: the length of every category's weights, and how the loss went."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as load_tensors

from calib.artifact import Description, describe
from calib.layout import DESCRIPTION

from .runs import Runs

POINTS_PER_STAGE = 25


Models = Path | Mapping[str, Path] | None


def heads_of(runs: Runs, models: Models) -> dict[str, Path]:
    """Folders of the heads behind the runs: the one that the summary names, else ``models``/NAME with its highest
    version, or for NAME-VERSION that version. Runs without one are left out. ``models`` may also name
    them one by one."""
    if isinstance(models, Mapping):
        return {name: models[name] for name in runs.names if name in models}
    found = {}
    for name, summary in zip(runs.names, runs.summaries, strict=True):
        named, _, version = name.rpartition("-")
        candidates = [Path(str(summary["head"]))] if "head" in summary else []
        if models is not None:
            folder = models / name
            numbers = sorted(int(p.name) for p in folder.glob("[0-9]*") if p.name.isdecimal())
            candidates += [folder / str(n) for n in reversed(numbers)]
            candidates += [models / named / version] if named and version.isdecimal() else []
        at = next((path for path in candidates if (path / DESCRIPTION).is_file()), None)
        if at is not None:
            found[name] = at
    return found


def fitted(runs: Runs, models: Models) -> list[dict[str, Any] | None]:
    """Per head its method, ``norms`` and ``stages``, None where no folder is found. [H]

    Raises:
        CalibError: a head is damaged.
    """
    paths = heads_of(runs, models)
    return [_described(describe(paths[name]), runs) if name in paths else None for name in runs.names]


def _described(head: Description, runs: Runs) -> dict[str, Any]:
    info = head.info
    return {"method": info.method, "seed": info.seed, "norms": _norms(head, runs), "stages": _stages(info.losses)}


def _norms(head: Description, runs: Runs) -> list[float | None] | None:
    """Norm of each category's weights over their mean, None for heads that have no single linear classifier. [C]"""
    info = head.info
    weight = load_tensors(head.tensors).get("classifier.weight")
    if weight is None or weight.ndim != 2 or len(weight) not in (len(info.category_ids), len(info.category_ids) + 1):
        return None  # two heads in one, groups, more than one layer
    norm = np.linalg.norm(weight[: len(info.category_ids)].astype(np.float64), axis=1)
    if not norm.mean() > 0:
        return None
    of = dict(zip(info.category_ids, (norm / norm.mean()).round(4).tolist(), strict=True))
    return [of.get(c) for c in runs.categories["category_id"].to_pylist()]


def _stages(losses: list[list[float]]) -> list[list[list[float]]]:
    """[step, loss] of each stage of training, thinned to means of neighbours."""
    if not losses:
        return []
    points = np.array(losses)
    starts = np.flatnonzero(np.diff(points[:, 0], prepend=np.inf) < 0)
    stages = []
    for stage in np.split(points, starts[1:]):
        # The first value stands alone: it says where training came from.
        parts = [stage[:1], *np.array_split(stage[1:], min(POINTS_PER_STAGE, max(1, len(stage) - 1)))]
        stages.append([p.mean(axis=0).round(5).tolist() for p in parts if len(p)])
    return stages
