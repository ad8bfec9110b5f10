"""C classes and an objectness pair from one layer: score_c = softmax(z_1..C)_c softmax(object pair)_object (Seesaw)."""

from torch import Tensor

from calib.heads.base import LogitHead, log_scores
from calib.heads.linear import ClassifierHead, LinearClassifier
from calib.losses.seesaw import seesaw_scores


class ObjectnessHead(ClassifierHead, LogitHead):
    """C classes and an objectness pair from one layer; rows of C + 1 scores sum to 1."""

    kind = "objectness"
    not_linear = "class scores are multiplied by an objectness with a softmax of its own"

    classifier: LinearClassifier

    def __init__(self, classifier: LinearClassifier, *, detector_logits: bool = False) -> None:
        super().__init__(classifier, detector_logits=detector_logits, extra=2)

    def forward(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, D] -> [N, C+1] logits whose softmax are the scores."""
        return log_scores(self.full_scores(features, logits))

    def activate(self, raw: Tensor) -> Tensor:
        """[N, C+2] -> [N, C+1]."""
        return seesaw_scores(raw)
