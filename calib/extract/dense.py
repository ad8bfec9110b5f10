"""Dense one-stage detectors: every place is a candidate, and each level may have a classifier of its own.

What the cache has of them: the places that the detector itself looks at (scores above its floor, as many as it takes of
a level), and the best ``PER_LEVEL`` of every level in any case, so that a head finds what the detector scored too low.
Boxes are decoded; training rows are sampled from the same candidates, by the IoU of these boxes with the objects. The
features are those of ``calib.heads.blocks``, linear in which all levels are one classifier.
Letters: M places of a level (anchors of a place counted apart), N candidates, D input of a classifier, C columns.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.cache import Classifier
from calib.cache.schema import Detector
from calib.errors import UnsupportedError
from calib.extract.adapter import Adapter, Image, Own, Replace, RoIs, Sampling
from calib.extract.staging import array
from calib.heads.blocks import Blocks, Layer

PER_LEVEL = 300  # Girshick et al.'s proposals of a picture in Faster R-CNN's tests, here of a level
SAMPLING = Sampling(foreground_iou=0.5, background_iou=0.4)  # Lin et al., Focal Loss, ICCV 2017, Sec. 4.1


@dataclass(frozen=True)
class Level:
    """One level of one picture: the input [channels, H, W] of the convolution ``conv``, layer ``layer`` of the blocks;
    logits [M, C] and boxes [M, 4] in network pixels, anchors of a place behind each other."""

    conv: nn.Conv2d
    layer: int
    given: Tensor
    logits: Tensor
    boxes: Tensor


class DenseAdapter(Adapter):
    """Records candidates; subclasses run the detector. ``most``: of a level, of those above the floor."""

    takes_proposals = False
    model: Any
    device: torch.device
    sampling: Sampling
    blocks: Blocks
    most: int

    @abstractmethod
    def _run(self, images: list[Image]) -> list[tuple[tuple[int, int], list[Level]]]:
        """Of every picture height and width of the network's input, and the levels."""

    @abstractmethod
    def detections(self, image: Image) -> Own:
        """See ``Adapter.detections``."""

    def classifier(self) -> Classifier:
        """All classifiers as one (see ``Adapter.classifier``)."""
        return self.blocks.classifier()

    @torch.no_grad()
    def rois(self, images: list[Image], replace: Replace | None = None, *, maps: bool = False) -> list[RoIs]:
        """The candidates of every image; places are no regions, so that nothing is exchanged and there are no maps."""
        return [self._rois(size, levels) for size, levels in self._run(images)]

    def _rois(self, size: tuple[int, int], levels: list[Level]) -> RoIs:
        parts = [self._candidates(level) for level in levels]
        features, logits, boxes, best = (array(torch.cat(p)) for p in zip(*parts, strict=True))
        return RoIs(boxes, best, features, logits, boxes, size)

    def _candidates(self, level: Level) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features [N, width], logits [N, C], boxes [N, 4] and best scores [N] of the candidates of a level."""
        best = self.scores(level.logits).amax(dim=1)
        above = int((best > self.detector.score_threshold).sum())
        count = min(len(best), max(PER_LEVEL, min(above, self.most)))
        at = best.topk(count).indices.sort().values
        anchors = self.blocks.layers[level.layer].anchors
        x = patches(level.conv, level.given, at // anchors)
        z = level.logits[at]
        return self.blocks.features(level.layer, at % anchors, x, z), z, level.boxes[at], best[at]

    def scores(self, logits: Tensor) -> Tensor:
        """[M, columns] -> [M, C]."""
        return logits.sigmoid() if self.detector.activation == "sigmoid" else logits.softmax(dim=1)[:, :-1]

    def most_rows(self, mode: str) -> int:
        """The sample, or all that a picture can give (subclasses know how many levels of what size there are)."""
        return self.sampling.rows_per_image if mode == "train" else self._most_candidates()

    @abstractmethod
    def _most_candidates(self) -> int:
        """The largest number of candidates of one picture."""

    def _describe(self, source: str, activation: str, fold: str = "", **thresholds: Any) -> None:
        """Set ``detector``; ``fold``: why no head goes back into the detector, where that is so."""
        b = self.blocks
        dense = {"layout": b.layout, "outputs": b.outputs, "columns": list(b.columns), "not_foldable": fold}
        dense |= {"layers": [layer.name for layer in b.layers], "anchors": [layer.anchors for layer in b.layers]}
        self.detector = Detector(
            source=source,
            digest=b.classifier().digest(),
            num_classes=len(b.columns) - (activation == "softmax"),
            feature_size=b.width,
            activation=activation,
            settings={"dense": dense},
            **thresholds,
        )


def layers_of(named: Sequence[tuple[str, nn.Module]], anchors: Sequence[int]) -> list[Layer]:
    """The convolutions that classify, and how many anchors of a place each has.

    Raises:
        UnsupportedError: they are no plain convolutions.
    """
    layers = []
    for (name, conv), count in zip(named, anchors, strict=True):
        plain = isinstance(conv, nn.Conv2d) and conv.stride == conv.dilation == (1, 1) and conv.groups == 1
        if not plain or not isinstance(conv, nn.Conv2d) or isinstance(conv.padding, str):
            raise UnsupportedError(f"{name} is no plain convolution, which classifiers of dense detectors are")
        weight = conv.weight.detach().float().cpu().flatten(1)
        bias = torch.zeros(len(weight)) if conv.bias is None else conv.bias.detach().float().cpu()
        layers.append(Layer(name, weight, bias, count))
    return layers


def patches(conv: nn.Conv2d, given: Tensor, cell: Tensor) -> Tensor:
    """What a convolution sees at the places ``cell`` [N] of its input [channels, H, W]: [N, D], as its weight lies."""
    (height, width), (y, x) = conv.kernel_size, (int(n) for n in conv.padding)
    padded = nn.functional.pad(given.float(), (x, x, y, y))
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # [channels, H, W, height, width]
    columns = windows.shape[2]
    return windows[:, cell // columns, cell % columns].transpose(0, 1).flatten(1)
