"""A head on RoI maps whose first two layers are the detector's own, frozen: features = relu(fc2(relu(fc1(map))))."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from calib.cache import Cache
from calib.cache.rows import RowMatrix
from calib.errors import UnsupportedError
from calib.heads.base import Head, head_from


class BoxHead(Head):
    """The detector's box head followed by ``inner``, which works on features."""

    kind = "box-head"
    not_linear = "it works on RoI maps"

    def __init__(self, map_size: int, hidden: int, inner: Head) -> None:
        super().__init__(inner.num_classes, map_size, "maps")
        self.fc1, self.fc2 = nn.Linear(map_size, hidden), nn.Linear(hidden, inner.feature_size)
        self.inner = inner
        self.requires_grad_(False)

    @classmethod
    def of(cls, cache: Cache, inner: Head) -> Self:
        """With the layers stored in ``cache``.

        Raises:
            UnsupportedError: the cache was extracted without RoI maps.
        """
        classifier = cache.classifier
        require_maps(cache)
        assert classifier.fc1_weight is not None and classifier.fc2_weight is not None
        assert classifier.fc1_bias is not None and classifier.fc2_bias is not None
        hidden, map_size = classifier.fc1_weight.shape
        head = cls(map_size, hidden, inner)
        with torch.no_grad():
            head.fc1.weight.copy_(torch.from_numpy(classifier.fc1_weight))
            head.fc1.bias.copy_(torch.from_numpy(classifier.fc1_bias))
            head.fc2.weight.copy_(torch.from_numpy(classifier.fc2_weight))
            head.fc2.bias.copy_(torch.from_numpy(classifier.fc2_bias))
        return head

    def config(self) -> dict[str, Any]:
        """Sizes and the inner head."""
        return {"map_size": self.feature_size, "hidden": self.fc1.out_features, "inner": self.inner.description()}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        return cls(int(config["map_size"]), int(config["hidden"]), head_from(config["inner"]))

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, channels * height * width] -> [N, C+1]."""
        return self.inner.full_scores(self.fc2(self.fc1(features).relu()).relu(), logits)


def require_maps(cache: Cache) -> RowMatrix:
    """The RoI maps of ``cache``.

    Raises:
        UnsupportedError: it was extracted without.
    """
    if cache.maps is None:
        raise UnsupportedError(
            f"cache {cache.path} has no RoI maps, which this head works on", hint="extract it with --roi-maps"
        )
    return cache.maps


def input_rows(cache: Cache, head: Head) -> RowMatrix:
    """What ``head`` takes of ``cache``: features or RoI maps."""
    return require_maps(cache) if head.inputs == "maps" else cache.features
