"""AP-pool: one precision-recall curve for all categories of a pool together.

AP takes each category's ranking by itself; a detector whose scores mean different things for different categories loses
nothing by it. Pooled, its detections are ranked against each other.

Paper: Dave et al., "Evaluating Large-Vocabulary Object Detectors: The Devil is in the Details", 2021, section 5.
Differs: nothing; results per category are limited as in AP-fixed (10,000 over the split).
"""

import numpy as np
from numpy.typing import NDArray

from .average_precision import EPS, best_beyond, true_positives_needed
from .evaluation import Evaluator, Matched, Rescored
from .outcome import settle
from .results import Detections
from .select import NO_CAP, Caps

POOLS = ("all", "r", "c", "f")


def pooled_ap(
    evaluator: Evaluator, detections: Detections | Rescored, *, per_category: int = 10_000
) -> dict[str, float]:
    """AP of the pools ``all``, ``r``, ``c`` and ``f`` (by the ground truth's ``frequency``); -1 without objects.

    Raises:
        InputError: detections of images that the ground truth does not have.
    """
    truth = evaluator.truth
    matched = evaluator.match(detections, Caps(NO_CAP, per_category))
    metrics = {}
    for pool in POOLS:
        # Categories without objects belong to their pool too: their detections are false.
        members = [pool in ("all", f) for f in truth.frequency or [""] * len(truth.category_ids)]
        metrics[pool] = _pool_ap(evaluator, matched, np.array(members, np.bool_))
    return metrics


def _pool_ap(evaluator: Evaluator, matched: Matched, members: NDArray[np.bool_]) -> float:
    """Mean over thresholds of the AP of one curve over the categories ``members`` [C]."""
    n = int(evaluator.objects.n[members, 0].sum())
    if n == 0:
        return -1.0
    ranked = matched.ranked
    row = np.flatnonzero(members[ranked.category])
    # Score down, then image, category, file order, as the reference lines them up; rows come by category already.
    row = row[np.lexsort((ranked.category[row], ranked.image[row], -ranked.score[row]))]
    needed = true_positives_needed(n)
    each = []
    for t in range(len(evaluator.thresholds)):
        is_true, is_false = settle(matched, t)
        true, false = is_true[row], is_false[row]
        k = np.cumsum(true)[true]
        envelope = best_beyond(k / (np.cumsum(false)[true] + k + EPS), np.zeros(len(k), np.int64))
        reached = needed[needed <= len(k)]
        each.append(envelope[reached - 1].sum() / len(needed))
    return float(np.mean(each))
