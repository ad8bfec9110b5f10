"""The detector's own head, by the form of its scores; of a cascade the average of its stages' heads."""

from calib.cache import Cache
from calib.heads.base import Head
from calib.heads.cascade import cascade
from calib.heads.linear import LinearClassifier, LinearHead
from calib.heads.objectness import ObjectnessHead
from calib.heads.sigmoid import SigmoidHead


def detector_head(cache: Cache) -> Head:
    """The detector's own head, of a cascade the average of its stages' heads; uses given logits as they are."""
    if len(cache.stages) > 1:
        return cascade([detector_head(stage) for stage in cache.stages], cache.manifest.detector.average)
    return _own_head(cache)


def _own_head(cache: Cache) -> Head:
    kinds = {"sigmoid": SigmoidHead, "seesaw": ObjectnessHead}
    if kind := kinds.get(cache.manifest.detector.activation):
        head: Head = kind(LinearClassifier.of(cache.classifier), detector_logits=True)
        return head
    first = cache.manifest.detector.background_first
    return LinearHead(LinearClassifier.of(cache.classifier), detector_logits=True, background_first=first)
