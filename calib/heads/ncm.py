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
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from calib.cache import Cache
from calib.cache.index import ClassIndex
from calib.errors import InputError, SettingError
from calib.heads.base import FitRun, Head, empty
from calib.heads.linear import ClassifierHead, Logits
from calib.heads.stack import base_logits
from calib.settings import one_of

TRANSFORMS = ("un", "l2n", "cl2n")
DISTANCES = ("l2", "cos", "unit")


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

    def fit(self, cache: Cache, run: FitRun) -> Head:
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
        head = NCMHead(base_logits(cache, run), *form, detector_logits=run.base is None)
        return head.set(mean, *centroids(transformed(features, mean, self.transform), labels, len(cache.categories)))


def transformed(x: Tensor, mean: Tensor, transform: str) -> Tensor:
    """[N, D], [D] -> [N, D]."""
    if transform == "un":
        return x
    return functional.normalize(x if transform == "l2n" else x - mean, eps=1e-12)


def centroids(x: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """[N, D], [N] -> [C, D] means and [C] whether a class has any row."""
    count = torch.bincount(labels, minlength=num_classes)
    total = x.new_zeros(num_classes, x.shape[1]).index_add(0, labels, x)
    return total / count.clamp_min(1)[:, None], count > 0


def distances(q: Tensor, centroid: Tensor, distance: str) -> Tensor:
    """[N, D], [C, D] -> [N, C] logits."""
    if distance == "l2":
        return -(q.square().sum(1, keepdim=True) + centroid.square().sum(1) - 2 * q @ centroid.T)
    if distance == "cos":
        return q @ centroid.T / q.shape[1]
    return functional.normalize(q, eps=1e-12) @ functional.normalize(centroid, eps=1e-12).T


class NCMHead(ClassifierHead):
    """The detector, or the base, decides on background, the nearest centroid on the class."""

    kind = "ncm"
    not_linear = "classes are scored by their distance to class means"

    centroid: Tensor
    mean: Tensor
    present: Tensor

    def __init__(
        self, classifier: Logits, transform: str, distance: str, temperature: float, *, detector_logits: bool = True
    ) -> None:
        super().__init__(classifier.requires_grad_(False), detector_logits=detector_logits)
        self.transform, self.distance, self.temperature = transform, distance, temperature
        self.register_buffer("centroid", empty(self.num_classes, self.feature_size))
        self.register_buffer("mean", empty(self.feature_size))
        self.register_buffer("present", torch.zeros(self.num_classes, dtype=torch.bool))

    def set(self, mean: Tensor, centroid: Tensor, present: Tensor) -> Self:
        """Fill in what was measured."""
        self.mean, self.centroid, self.present = mean, centroid, present
        return self

    def config(self) -> dict[str, Any]:
        """As ``ClassifierHead.config``, and the form."""
        form = {"transform": self.transform, "distance": self.distance, "temperature": self.temperature}
        return super().config() | form

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1]."""
        background = self.logits(features, logits).softmax(dim=1)[:, -1:]
        near = distances(transformed(features, self.mean, self.transform), self.centroid, self.distance)
        near = (near / self.temperature).masked_fill(~self.present, -torch.inf)
        return torch.cat([(1 - background) * near.softmax(dim=1), background], dim=1)
