"""natural: the detector's linear head trained on with natural sampling; the control of every comparison.

Paper: none; the control that Kang et al., Decoupling Representation and Classifier, ICLR 2020, Sec. 4.1 call
instance-balanced sampling.
Eq. (loss): L = (1/K) sum_k mean_{i in chunk k} -log softmax(x_i W^T + b)_{y_i}.
Differs: on separable features, longer training alone lifts rare classes; a table without this row would credit that
to balance.
"""

from dataclasses import dataclass, field

from calib.cache import Cache
from calib.heads.base import FitRun, Head
from calib.heads.fit import fit
from calib.heads.linear import LinearHead
from calib.heads.softmax_step import mean_over_chunks
from calib.heads.stack import base_layer
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop


@dataclass(frozen=True)
class Natural:
    """The detector's own schedule, once more (rate and decay of Faster R-CNN baselines on LVIS)."""

    images: ImageBatches = field(default_factory=ImageBatches)
    loop: Loop = field(default_factory=Loop)

    def fit(self, cache: Cache, run: FitRun) -> Head:
        """Continue from the weights of the detector or the base."""
        head = LinearHead(base_layer(cache, run))
        sampler = InstanceSampler(cache, self.images, seed=run.seed)

        objective = mean_over_chunks(head.classifier)
        fit(head, objective, sampler, cache, self.loop, run, label="natural")
        return head
