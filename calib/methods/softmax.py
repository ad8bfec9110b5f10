"""softmax: the detector's own head, unchanged.

Paper: Ren et al., Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks, NeurIPS 2015.
Eq. (scores): score_c = exp(z_c) / sum_j exp(z_j) over the C + 1 classes, z = x W^T + b (or the cosine form).
A sigmoid detector's: score_c = sigmoid(z_c); of one trained with the seesaw loss: see ``seesaw.py``.
Differs: nothing; the softmax keeps the detector's own column order, so that its scores come out to the bit.
"""

from dataclasses import dataclass

from calib.cache import Cache
from calib.heads.base import Head
from calib.heads.detector import detector_head
from calib.training.context import FitContext


@dataclass(frozen=True)
class Softmax:
    """No hyper-parameters."""

    def fit(self, cache: Cache, context: FitContext) -> Head:
        """The classifier of ``cache`` as a head."""
        return detector_head(cache)
