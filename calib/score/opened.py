"""Heads opened on a cache: for scoring it, judging on it, comparing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calib.artifact import Artifact, check_fits, load
from calib.cache import Cache
from calib.score.scorer import detector_nms
from calib.settings import Nms


@dataclass(frozen=True)
class OpenedHeads:
    """Heads of the detector that wrote ``cache``, and the thresholds that their detections are made with."""

    cache: Cache
    artifacts: tuple[Artifact, ...]
    nms: Nms


def open_heads(
    heads: Sequence[Path | Artifact],
    cache: Path | Cache,
    *,
    score_threshold: float | None = None,
    nms_iou: float | None = None,
    max_detections: int | None = None,
) -> OpenedHeads:
    """Load ``heads`` and ``cache``; thresholds that are None are the detector's own.

    Raises:
        As ``artifact.load`` and ``Cache``. InputError: a head was fitted for another detector. SettingError: a
        threshold is out of range.
    """
    opened = cache if isinstance(cache, Cache) else Cache(cache)
    artifacts = tuple(head if isinstance(head, Artifact) else load(head) for head in heads)
    for artifact, head in zip(artifacts, heads, strict=True):
        check_fits(artifact, opened, Path(artifact.info.method) if isinstance(head, Artifact) else head)
    given: dict[str, Any] = {"score_threshold": score_threshold, "nms_iou": nms_iou, "max_detections": max_detections}
    nms = replace(detector_nms(opened), **{k: v for k, v in given.items() if v is not None})
    return OpenedHeads(opened, artifacts, nms)
