"""Two fitted heads made into one: by class, by the mean, or by row."""

from dataclasses import replace
from pathlib import Path

import torch

from calib.artifact import Artifact, load, save
from calib.errors import InputError, SettingError
from calib.heads.base import Head
from calib.heads.combine import AverageHead, DualHead, SelectHead
from calib.methods.simcal import is_tail

KINDS = ("dual", "average", "select")


def combine(
    kind: str, one: Path, other: Path, out: Path, *, threshold: int | None = None, overwrite: bool = False
) -> Artifact:
    """Compose the heads at ``one`` and ``other`` and write the result to ``out``.

    dual: classes of at most ``threshold`` training instances (default 300) take their scores from ``other``, the rest
    from ``one``. average: the mean of both. select: whole rows from ``other`` where ``one`` sees foreground and, with a
    threshold, ``other`` sees a class of at most so many instances.

    Raises:
        SettingError: no such kind, or a threshold that the kind has no use for. InputError: heads of different
        detectors or categories. UnsupportedError: heads of different inputs.
    """
    if kind not in KINDS:
        raise SettingError(f"kind is '{kind}': expected one of {', '.join(KINDS)}")
    if threshold is not None and (kind == "average" or threshold < 0):
        raise SettingError(f"threshold is {threshold}: average takes none, dual and select one of at least 0")
    a, b = load(one), load(other)
    _check_same(a, b, one, other)
    head = _composed(kind, a, b, threshold)
    settings = {"kind": kind, "threshold": threshold, "one": a.part(), "other": b.part()}
    info = replace(a.info, method="combine", settings=settings, losses=[], base=[])
    artifact = Artifact(head.eval().requires_grad_(False), info)
    save(out, artifact, overwrite=overwrite)
    return artifact


def _check_same(a: Artifact, b: Artifact, one: Path, other: Path) -> None:
    for what in ("detector_digest", "category_ids"):
        if getattr(a.info, what) != getattr(b.info, what):
            raise InputError(
                f"heads {one} and {other} were fitted for different "
                f"{'detectors' if what == 'detector_digest' else 'categories'}",
                hint="train both on caches of one detector",
            )


def _composed(kind: str, a: Artifact, b: Artifact, threshold: int | None) -> Head:
    if kind == "average":
        return AverageHead(a.head, b.head)
    counts = torch.tensor(a.info.instance_counts)
    if kind == "dual":
        return DualHead(b.head, a.head, is_tail(counts, 300 if threshold is None else threshold))
    return SelectHead(a.head, b.head, None if threshold is None else is_tail(counts, threshold))
