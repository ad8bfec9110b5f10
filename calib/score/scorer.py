"""Offline scoring: a cache and heads to detections, one image at a time.

Letters: N proposals of one image, C foreground classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calib.boxes import Boxes, clip, decode, rescale
from calib.cache import Cache
from calib.cache.schema import PROPOSAL_BOX, REFINED_BOX
from calib.errors import NonFiniteError, UnsupportedError
from calib.heads.base import Head
from calib.progress import Progress, silent
from calib.score.by_size import by_size
from calib.score.detect import Detections, detect
from calib.score.inputs import LogitRows, as_tensor, exact_logits, scored_rows
from calib.settings import Nms


@dataclass(frozen=True)
class ImageDetections:
    """Detections of one image; boxes in the pixels of the original image."""

    image_id: int
    detections: Detections
    roi_id: Any  # [K]


def score(
    cache: Cache, head: Head, nms: Nms, *, logits: LogitRows | None = None, progress: Progress = silent
) -> Iterator[ImageDetections]:
    """Yield the detections of every image of ``cache``, in its order; ``head`` is given ``logits``, or the stored ones.

    Raises:
        UnsupportedError, NonFiniteError: as ``Scorer``.
    """
    scorer = Scorer(cache, logits)
    with progress("score", total=len(scorer), unit="images") as bar:
        for i in range(len(scorer)):
            yield scorer.image(i, [(head, nms)])[0]
            bar.advance()


class Scorer:
    """A cache of test mode, scored image by image with any number of heads; each image is read once for all of them.

    Stored logits are used where they are exact (float32, every row); otherwise heads compute them from features. Images
    are scored one by one: the rounding of a matrix product depends on its number of rows, and an image must score the
    same here and in the service.
    """

    def __init__(self, cache: Cache, logits: LogitRows | None = None) -> None:
        """
        Raises:
            UnsupportedError: the cache holds the sampled proposals of training mode.
        """
        if cache.manifest.mode == "train":
            raise UnsupportedError(
                f"cache {cache.path} was extracted with --mode train: it holds sampled proposals and ground truth",
                hint="score a cache extracted with --mode test",
            )
        self._cache, self._boxes = cache, _Boxes(cache.stages[-1])
        self._logits = logits or exact_logits(cache)
        self._roi_ids = cache.stages[-1].meta("roi_id")[0]

    def __len__(self) -> int:
        """Images."""
        return len(self._boxes.images)

    def boxes(self, i: int) -> Boxes:
        """[N, 4], or [N, C, 4] of boxes per class: those of image ``i`` in its own pixels, before suppression."""
        image = self._boxes.images[i]
        return rescale(self._boxes.of(i), *_sizes(image))

    @torch.inference_mode()
    def scores(self, i: int, head: Head) -> NDArray[np.float32]:
        """[N, C] scores of image ``i`` by ``head``.

        Raises:
            UnsupportedError: the cache lacks the RoI maps or stages of the head.
        """
        start, stop = int(self._cache.image_start[i]), int(self._cache.image_start[i + 1])
        features = torch.from_numpy(scored_rows(self._cache, head).read(start, stop))
        found: NDArray[np.float32] = head.scores(features, as_tensor(self._logits, start, stop)).numpy()
        return found

    @torch.inference_mode()
    def image(self, i: int, heads: Sequence[tuple[Head, Nms]]) -> list[ImageDetections]:
        """Detections of image ``i`` by each head, with its own thresholds.

        Raises:
            UnsupportedError: the cache lacks the RoI maps or stages of a head. NonFiniteError: scores or boxes are not
                finite.
        """
        cache, image = self._cache, self._boxes.images[i]
        start, stop = int(cache.image_start[i]), int(cache.image_start[i + 1])
        z = as_tensor(self._logits, start, stop)
        inputs: dict[str, torch.Tensor] = {}
        boxes = self._boxes.of(i)
        net, size = _sizes(image)
        found = []
        for head, nms in heads:
            if head.inputs not in inputs:
                inputs[head.inputs] = torch.from_numpy(scored_rows(cache, head).read(start, stop))
            scores = head.scores(inputs[head.inputs], z).numpy()
            try:
                one = detect(scores, boxes, nms, min_box_side=cache.manifest.detector.min_box_side)
            except NonFiniteError as e:
                raise NonFiniteError(
                    f"image {image['image_id']} of cache {cache.path}: {e}", hint="extract the cache again"
                ) from e
            box = rescale(one.box, net, size)
            box = clip(box, *size) if cache.manifest.detector.clips_last else box
            one = by_size(head, Detections(one.row, one.category, one.score, box))
            found.append(ImageDetections(image["image_id"], one, self._roi_ids[start:stop][one.row]))
        return found


def _sizes(image: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of the network's input and of the picture."""
    return (image["net_height"], image["net_width"]), (image["height"], image["width"])


class _Boxes:
    """Boxes of every image in network pixels: as stored, or decoded per class from the features. Those of a cascade are
    its last stage's."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._agnostic = cache.manifest.detector.class_agnostic
        names = REFINED_BOX if self._agnostic else PROPOSAL_BOX
        self._boxes = np.stack(cache.meta(*names), axis=1)  # [rows, 4]
        self.images = cache.images.to_pylist()

    def of(self, i: int) -> Boxes:
        """[N, 4] or [N, C, 4]."""
        start, stop = int(self._cache.image_start[i]), int(self._cache.image_start[i + 1])
        own: Boxes = self._boxes[start:stop]
        if self._agnostic:
            return own
        classifier, image = self._cache.classifier, self.images[i]
        assert classifier.box_weight is not None and classifier.box_bias is not None
        deltas = self._cache.features.read(start, stop) @ classifier.box_weight.T + classifier.box_bias
        decoded = decode(deltas.reshape(len(own), -1, 4), own, self._cache.manifest.detector.box_weights)
        return clip(decoded, image["net_height"], image["net_width"])


def detector_nms(cache: Cache) -> Nms:
    """The thresholds the detector itself uses."""
    d = cache.manifest.detector
    return Nms(d.score_threshold, d.nms_iou, d.max_detections)
