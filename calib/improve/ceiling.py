"""What any head can reach, before time is spent on one: proposal recall and AP with right labels, per bin."""

from pathlib import Path
from typing import Any

from calib.cache import Cache
from calib.decide.assess import Assessment
from calib.doctor.data import FEW_CATEGORIES, FEW_OBJECTS
from calib.evaluate import DEFAULT_BINS, bin_index
from calib.score.opened import open_heads

LOW_RECALL = 0.5  # of proposals: below it more is lost before the classifier than in it
LITTLE_ROOM = 0.01  # AP between the detector and right labels that no head needs to be trained for
METRICS = ("AP", "AP1", "AP2", "AP3", "AP4")


def ceiling(cache: Path, detector: Path, max_detections: int | None = None) -> dict[str, Any]:
    """Recall, AP of the detector as it is (its head at ``detector``) and of right labels, as fractions; warnings."""
    opened = open_heads([detector], cache, max_detections=max_detections)
    assessment, nms, head = Assessment(opened.cache), opened.nms, opened.artifacts[0].head
    as_is = assessment.evaluate(assessment.found(head, nms), nms).summary()
    metrics = assessment.proposal_metrics(head, nms)
    oracle = metrics.pop("oracle", {})
    objects = _objects(assessment)
    found = {
        "recall": {k: v for k, v in metrics.items() if "recall" in k},
        "detector": {k: float(as_is[k]) for k in METRICS},
        "right_labels": {k: float(oracle[k]) for k in METRICS if k in oracle},
        "categories": {f"n{b + 1}": int(as_is[f"n{b + 1}"]) for b in range(len(objects))},
        "objects": {f"objects{b + 1}": n for b, n in enumerate(objects)},
    }
    return found | {"warnings": [*_about_recall(found), *_about_room(found)]}


def few(cache: Path, what: str) -> list[str]:
    """A warning where the rare categories of a split are too few to judge by."""
    assessment = Assessment(Cache(cache))
    counts, objects = assessment.evaluator.instance_count, assessment.evaluator.objects.n[:, 0]
    if counts is None:
        return []
    rare = (bin_index(counts, DEFAULT_BINS) == 0) & (objects > 0)
    categories, n = int(rare.sum()), int(objects[rare].sum())
    if categories >= FEW_CATEGORIES and n >= FEW_OBJECTS:
        return []
    return [
        f"{what} has {n} objects of {categories} categories with fewer than {DEFAULT_BINS[0]} training instances: "
        "AP1 and a gain in it mean little there"
    ]


def _objects(assessment: Assessment) -> list[int]:
    """Objects that count, by bin; empty without training counts."""
    counts, n = assessment.evaluator.instance_count, assessment.evaluator.objects.n[:, 0]
    if counts is None:
        return []
    of_bin = bin_index(counts, DEFAULT_BINS)
    return [int(n[of_bin == b].sum()) for b in range(len(DEFAULT_BINS) + 1)]


def _about_recall(found: dict[str, Any]) -> list[str]:
    recall = found["recall"]
    return [
        f"proposals cover {100 * recall[key]:.0f} % of the objects of bin {key[-1]}: what is not proposed no head can "
        "find; the detector's proposals are to be mended first"
        for key in ("recall1", "recall2", "recall3", "recall4")
        if 0 <= recall.get(key, -1.0) < LOW_RECALL
    ]


def _about_room(found: dict[str, Any]) -> list[str]:
    own, best = found["detector"], found["right_labels"]
    return [
        f"{key} is {100 * own[key]:.1f} % and {100 * best[key]:.1f} % with right labels: no head can help there"
        for key in METRICS
        if best.get(key, -1.0) >= 0 and own[key] >= 0 and best[key] - own[key] < LITTLE_ROOM
    ]
