"""softmax: the detector's own head, unchanged.

Paper: Ren et al., Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks, NeurIPS 2015.
Eq. (scores): score_c = exp(z_c) / sum_j exp(z_j) over the C + 1 classes, z = x W^T + b (or the cosine form).
A sigmoid detector's: score_c = sigmoid(z_c); of one trained with the seesaw loss: see ``seesaw.py``.
Differs: nothing; the softmax keeps the detector's own column order, so that its scores come out to the bit.
"""

from dataclasses import dataclass

from calib.cache import Cache
from calib.heads.base import FitRun, Head
from calib.heads.cascade import cascade
from calib.heads.linear import LinearClassifier, LinearHead
from calib.heads.seesaw import ObjectnessHead
from calib.heads.sigmoid import SigmoidHead
from calib.heads.stack import base_of


@dataclass(frozen=True)
class Softmax:
    """No hyper-parameters."""

    def fit(self, cache: Cache, run: FitRun) -> Head:
        """The classifier of ``cache`` as a head."""
        return detector_head(cache)


def detector_head(cache: Cache) -> Head:
    """The detector's own head, of a cascade the average of its stages' heads; uses given logits as they are."""
    if len(cache.stages) > 1:
        head = cascade([detector_head(stage) for stage in cache.stages], cache.manifest.detector.average)
        head.logits_size = cache.manifest.detector.logits_size
        return head
    return _own_head(cache)


def head_below(cache: Cache, run: FitRun) -> Head:
    """The base of ``run``, or the detector's own head."""
    return base_of(run) or detector_head(cache)


def _own_head(cache: Cache) -> Head:
    kinds = {"sigmoid": SigmoidHead, "seesaw": ObjectnessHead}
    if kind := kinds.get(cache.manifest.detector.activation):
        head: Head = kind(LinearClassifier.of(cache.classifier), detector_logits=True)
        head.logits_size = cache.manifest.detector.outputs
        return head
    first = cache.manifest.detector.background_first
    return LinearHead(LinearClassifier.of(cache.classifier), detector_logits=True, background_first=first)
