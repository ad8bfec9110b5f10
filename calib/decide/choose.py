"""One setting of a method chosen on a tune cache: the value whose detections have the highest AP there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calib.artifact import Artifact
from calib.cache import Cache
from calib.decide.assess import Assessment
from calib.errors import SettingError, UnsupportedError
from calib.registry import load, method
from calib.score import detector_nms
from calib.settings import with_overrides
from calib.training.context import FitContext
from calib.training.plan import check_needs
from calib.training.stages import fit_alone


@dataclass(frozen=True)
class Choice:
    """``value`` of ``key`` won; ``tried`` has the AP of every value, as a fraction."""

    key: str
    value: Any
    tried: dict[str, float]


def choose(
    name: str,
    train: Cache,
    tune: Cache,
    key: str,
    values: Sequence[str],
    overrides: Mapping[str, Any],
    *,
    base: Artifact | None = None,
    seed: int = 0,
) -> Choice:
    """Fit ``name`` on ``train``, built on ``base``, once per value of ``key``; judge each on ``tune``, which holds its
    own ground truth.

    Raises:
        SettingError: unknown key, or no value. UnsupportedError: a tune cache of training mode, or of another detector;
            caches or a base that the method has no use for. InputError: a base of another detector.
    """
    if not values:
        raise SettingError(f"no value of {key} to choose from", hint=f"--choose {key}=0.2,0.4,0.6")
    if tune.manifest.detector.digest != train.manifest.detector.digest:
        raise UnsupportedError(f"caches {train.path} and {tune.path} were written by different detectors")
    check_needs(method(name), train, base)
    assessment, nms = Assessment(tune), detector_nms(tune)
    tried, below = {}, None if base is None else base.head
    for value in values:
        settings = with_overrides(load(method(name).target)(), {**overrides, key: value})
        head = fit_alone(settings, train, FitContext(seed, base=below))
        found = assessment.found(head, nms)
        tried[value] = float(assessment.evaluate(found, nms).summary()["AP"])
    return Choice(key, max(tried, key=lambda v: tried[v]), tried)
