"""Averages over groups of categories: by training instances (AP1, AP2, ...), by frequency (r, c, f), all.

With edges 10, 100, 1000: AP1 averages categories with fewer than 10 training instances (also none at all),
AP2 with 10 to 99, AP3 with 100 to 999, AP4 with 1000 or more. Every average is the plain mean over the
categories that are present in the split, and stands beside their number. bAP is the mean of the bins that
have a category.

Papers: Wang et al., "The Devil is in Classification", ECCV 2020 (SimCal: the bins and bAP); Li et al.,
"Overcoming Classifier Imbalance with Balanced Group Softmax", CVPR 2020 (the same cut points).
Differs: SimCal's code (lvis_api/lvis/eval.py @e5f3076) leaves out of the last bin every category with more
training instances than the category that is most frequent in val, and gives NaN for a category whose only
objects have area 0; both are accidents of that code.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from calib.errors import SettingError

DEFAULT_BINS = (10, 100, 1000)


def check_bins(bins: Sequence[int]) -> tuple[int, ...]:
    """Return ``bins`` as a tuple.

    Raises:
        SettingError: empty, not positive, or not ascending.
    """
    edges = tuple(bins)
    if not edges or edges[0] < 1 or any(a >= b for a, b in pairwise(edges)):
        raise SettingError(f"bins must be ascending positive counts, got {list(edges)}", hint="10,100,1000 is usual")
    return edges


def bin_index(instance_count: NDArray[np.int64], bins: Sequence[int]) -> NDArray[np.int64]:
    """Bin of each category, 0 for counts below ``bins[0]``, up to ``len(bins)``. [C] -> [C]"""
    return np.searchsorted(np.array(bins), instance_count, side="right")


def mean_present(value: NDArray[np.float64]) -> tuple[float, int]:
    """Mean over the entries that are not -1, and their number; (-1, 0) if there is none."""
    present = value[value > -1]
    return (float(present.mean()), len(present)) if len(present) else (-1.0, 0)


def bin_means(
    ap: NDArray[np.float64], instance_count: NDArray[np.int64] | None, bins: Sequence[int]
) -> dict[str, float | int]:
    """AP1, n1, AP2, n2, ... and bAP; -1 and 0 where no category exists, or without counts. [C], [C]

    Raises:
        SettingError: see ``check_bins``.
    """
    index = None if instance_count is None else bin_index(instance_count, check_bins(bins))
    metrics: dict[str, float | int] = {}
    for i in range(len(check_bins(bins)) + 1):
        members = ap[:0] if index is None else ap[index == i]
        metrics[f"AP{i + 1}"], metrics[f"n{i + 1}"] = mean_present(members)
    each = np.array([metrics[f"AP{i + 1}"] for i in range(len(bins) + 1)])
    return metrics | {"bAP": mean_present(each)[0]}


def frequency_means(ap: NDArray[np.float64], frequency: tuple[str, ...] | None) -> dict[str, float | int]:
    """APr, nr, APc, nc, APf, nf by the ground truth's own field; -1 and 0 where no category exists. [C]"""
    metrics: dict[str, float | int] = {}
    for letter in "rcf":
        members = ap[:0] if frequency is None else ap[np.array([f == letter for f in frequency], np.bool_)]
        metrics[f"AP{letter}"], metrics[f"n{letter}"] = mean_present(members)
    return metrics
