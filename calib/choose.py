"""One setting of a method chosen on a tune cache: the value whose detections have the highest AP there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calib.cache import Cache
from calib.detect import Detections as ImageResult
from calib.errors import SettingError, UnsupportedError
from calib.evaluate import Detections, GroundTruth, evaluate
from calib.heads.base import FitRun, Head
from calib.registry import load, method
from calib.score import detector_nms, score
from calib.settings import Nms, with_overrides


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
    seed: int = 0,
) -> Choice:
    """Fit ``name`` on ``train`` once per value of ``key``; judge each on ``tune``, which holds its own ground truth.

    Raises:
        SettingError: unknown key, or no value. UnsupportedError: a tune cache of training mode, or of another detector.
    """
    if not values:
        raise SettingError(f"no value of {key} to choose from", hint=f"--choose {key}=0.2,0.4,0.6")
    if tune.manifest.detector.digest != train.manifest.detector.digest:
        raise UnsupportedError(f"caches {train.path} and {tune.path} were written by different detectors")
    truth, nms = ground_truth(tune), detector_nms(tune)
    tried = {}
    for value in values:
        settings = with_overrides(load(method(name).target)(), {**overrides, key: value})
        head = settings.fit(train, FitRun(seed)).to("cpu").eval().requires_grad_(False)
        head.logits_size = train.manifest.detector.outputs
        tried[value] = float(
            evaluate(truth, detections(tune, head, nms), max_detections=nms.max_detections).summary()["AP"]
        )
    return Choice(key, max(tried, key=lambda v: tried[v]), tried)


def detections(cache: Cache, head: Head, nms: Nms) -> Detections:
    """Everything ``head`` finds in ``cache``, as the evaluator takes it."""
    found = list(score(cache, head, nms))
    parts: list[ImageResult] = [f.detections for f in found]
    image_id = np.repeat([f.image_id for f in found], [len(p.score) for p in parts])
    category = np.concatenate([p.category for p in parts]) if parts else np.empty(0, np.int64)
    scores = np.concatenate([p.score for p in parts]) if parts else np.empty(0, np.float32)
    boxes = np.concatenate([p.box for p in parts]) if parts else np.empty((0, 4), np.float32)
    return Detections.from_arrays(image_id.astype(np.int64), cache.categories.category_id[category], scores, boxes)


def ground_truth(cache: Cache) -> GroundTruth:
    """The split's labels as the cache holds them.

    Raises:
        MissingFileError: it holds none.
    """
    k = cache.categories
    rows = zip(k.category_id, k.name, k.instance_count, k.image_count, k.frequency, strict=True)
    names = ("id", "name", "instance_count", "image_count", "frequency")
    images = [
        {"id": r["image_id"], **{n: r[n] for n in ("neg_category_ids", "not_exhaustive_category_ids")}}
        for r in cache.images.to_pylist()
    ]
    annotations = [
        {
            "id": a["id"],
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": [a["x1"], a["y1"], a["x2"] - a["x1"], a["y2"] - a["y1"]],
            "area": a["area"],
            "ignore": int(a["ignore"]),
        }
        for a in cache.annotations().to_pylist()
    ]
    categories = [dict(zip(names, (_plain(v) for v in row), strict=True)) for row in rows]
    document = {"images": images, "annotations": annotations, "categories": categories}
    return GroundTruth.from_document(document, cache.path)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
