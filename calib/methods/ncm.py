"""NCM: nearest class mean.

Papers: Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020, Sec. 4.1
(classification); the detection form is a baseline of Li et al., Balanced Group Softmax, CVPR 2020.

Centroids m_c: mean of transform(x) over training features of class c; transform: un x, l2n x / |x|, cl2n
(x - mu) / |x - mu| with mu the mean of all features used. Centroids are not normalised again.
Eq. (logits): l2 -|q - m_c|^2; cos q . m_c / D (divided by the feature size); unit q / |q| . m_c / |m_c|.
Eq. (detection scores): score_c = (1 - p_bg) softmax_c(logits / temperature), p_bg from the detector.
Differs: the classification code (facebookresearch/classifier-balancing f162ade) has no background; the detection code
(FishYuLi/BalancedGroupSoftmax 90e04fd, DCM.py) takes ``transform=un distance=unit`` on features of ground-truth
boxes, before the ReLU or from the RoI map; a cache holds what the classifier sees, after it. A class without training
features scores 0.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from calib.cache import Cache
from calib.cache.index import ClassIndex
from calib.errors import InputError, SettingError
from calib.heads.base import Head
from calib.heads.ncm import DISTANCES, TRANSFORMS, NCMHead, transformed
from calib.settings import one_of
from calib.training.bases import base_logits
from calib.training.context import FitContext


@dataclass(frozen=True)
class NCM:
    """``rows``: ground_truth (features of appended ground-truth boxes, as in detection) or foreground (all of them)."""

    transform: str = "un"
    distance: str = "unit"
    rows: str = "ground_truth"
    temperature: float = 1.0

    space: ClassVar[dict[str, Any]] = {
        "transform": {"choice": ["un", "l2n", "cl2n"]},
        "temperature": {"log": [0.01, 1.0]},
    }

    def __post_init__(self) -> None:
        one_of(self, "transform", TRANSFORMS)
        one_of(self, "distance", DISTANCES)
        one_of(self, "rows", ("ground_truth", "foreground"))
        if not self.temperature > 0:
            raise SettingError(f"temperature is {self.temperature}: expected above 0")

    def fit(self, cache: Cache, context: FitContext) -> Head:
        """Average features per class; nothing is trained."""
        index = ClassIndex.build(cache)
        if len(index.present) == 0:
            raise InputError(f"cache {cache.path} has no foreground row", hint="extract with --mode train")
        rows = np.concatenate([index.rows(int(c)) for c in index.present])
        if self.rows == "ground_truth":
            of_objects = cache.meta("is_gt")[0][rows]
            if not of_objects.any():
                raise InputError(f"cache {cache.path} has no ground-truth rows", hint="--set rows=foreground")
            rows = rows[of_objects]
        rows = np.sort(rows)
        features = torch.from_numpy(cache.features.take(rows))
        labels = torch.from_numpy(cache.labels[rows].astype(np.int64))
        mean = features.mean(dim=0)
        form = (self.transform, self.distance, self.temperature)
        head = NCMHead(base_logits(cache, context), *form, detector_logits=context.base is None)
        return head.set(mean, *centroids(transformed(features, mean, self.transform), labels, len(cache.categories)))


def centroids(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """[N, D], [N] -> [C, D] means and [C] whether a class has any row."""
    count = torch.bincount(labels, minlength=num_classes)
    total = x.new_zeros(num_classes, x.shape[1]).index_add(0, labels, x)
    return total / count.clamp_min(1)[:, None], count > 0
