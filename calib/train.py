"""From a method's name and a cache to a saved head."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash

from calib import registry
from calib.artifact import Artifact, HeadInfo, check_free, save
from calib.cache import Cache
from calib.errors import CalibError, SettingError, UnsupportedError
from calib.files import lock
from calib.heads.base import FitRun
from calib.progress import Progress, silent
from calib.settings import with_overrides

LOCK = "lock"


def train(
    method: str,
    cache: Path | Cache,
    out: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Artifact:
    """Fit ``method`` on ``cache`` and write the head to ``out``.

    A learned method keeps checkpoints beside ``out`` while it trains; the same call goes on from them after an
    interruption and ends in the same head.

    Raises:
        UnknownNameError: no such method. SettingError: unknown or wrong setting. UnsupportedError: the cache lacks
            what the method needs. ExistsError: ``out`` exists, or another process trains for it. FitError: training
            left the finite numbers.
    """
    info = registry.method(method)
    if seed < 0:
        raise SettingError(f"seed is {seed}: expected at least 0")
    settings = with_overrides(registry.load(info.target)(), dict(overrides or {}))
    check_free(out, overwrite=overwrite)
    opened = cache if isinstance(cache, Cache) else Cache(cache)
    _check_needs(info, opened)
    plain = json.loads(json.dumps(asdict(settings)))
    checkpoints = out.with_name(f".{out.name}.training")
    request = {"method": method, "settings": plain, "seed": seed, "cache": opened.digest}
    run = FitRun(seed, device or torch.device("cpu"), progress, checkpoints / _digest(request))
    with lock(checkpoints / LOCK, f"training {out}"):
        try:
            head = settings.fit(opened, run).to("cpu").eval().requires_grad_(False)
        except BaseException as e:
            # The same request would fail again, or was interrupted before its first checkpoint.
            if isinstance(e, CalibError) or [p.name for p in checkpoints.iterdir()] == [LOCK]:
                shutil.rmtree(checkpoints, ignore_errors=True)
            raise
        head.logits_size = opened.manifest.detector.outputs
        artifact = Artifact(head, HeadInfo.of(opened, method, plain, seed, run.losses))
        save(out, artifact, overwrite=overwrite)
        shutil.rmtree(checkpoints, ignore_errors=True)
    return artifact


def _digest(request: dict[str, Any]) -> str:
    """Names the checkpoints of a request: two fits can share their loop and still differ in what they learn."""
    return xxhash.xxh3_64(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _check_needs(info: registry.MethodInfo, cache: Cache) -> None:
    activation = cache.manifest.detector.activation
    if activation not in info.activations:
        raise UnsupportedError(
            f"{info.name} is defined for {' and '.join(info.activations)} detectors; the one of cache {cache.path} "
            f"gives {activation} scores"
        )
    if "labels" in info.needs and cache.manifest.mode != "train":
        raise UnsupportedError(
            f"{info.name} learns from labelled proposals; cache {cache.path} was extracted with --mode test",
            hint="extract the train split with --mode train",
        )
