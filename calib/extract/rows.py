"""What becomes of a batch: proposals are matched to ground truth, chosen, and made into rows of the cache."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.boxes import Boxes
from calib.cache.image_rows import ImageRows
from calib.cache.schema import NO_ANNOTATION, PROPOSAL_BOX, REFINED_BOX
from calib.extract.adapter import Adapter, Image, RoIs
from calib.extract.dataset import Dataset
from calib.extract.label import GroundTruth, Labels, assign, choose, one_to_one

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Chosen:
    """Labels of all candidate proposals of an image, the positions kept, and where appended ground truth begins."""

    labels: Labels
    keep: NDArray[np.int64]
    appended_from: int

    @classmethod
    def none(cls) -> "Chosen":
        """Of an image whose proposals have not been seen yet."""
        labels = Labels(np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int64))
        return cls(labels, np.empty(0, np.int64), 0)


def run_batch(
    adapter: Adapter,
    dataset: Dataset,
    batch: Records,
    pixels: list[Image],
    *,
    train: bool,
    seed: int = 0,
    maps: bool = False,
) -> list[ImageRows]:
    """The rows of a batch of images: every proposal, or with ``train`` those that a training step would see."""
    objects = [dataset.objects(int(r["id"])) for r in batch]
    background, sampling = len(dataset.categories), adapter.sampling
    generators = [np.random.default_rng([seed, int(r["id"]) % 2**64]) for r in batch]
    if train and adapter.takes_proposals:
        chosen = [Chosen.none() for _ in batch]

        def exchange(
            i: int, proposals: Boxes, objectness: NDArray[np.float32], ratio: tuple[float, float]
        ) -> tuple[Boxes, NDArray[np.float32]]:
            with_objects = np.concatenate([proposals, to_network(objects[i].boxes, ratio)])
            labels = assign(with_objects, with_objects[len(proposals) :], objects[i].label, background, sampling)
            keep = choose(labels, background, sampling, generators[i])
            chosen[i] = Chosen(labels, keep, len(proposals))
            scores = np.concatenate([objectness, np.ones(len(objects[i].boxes), np.float32)])
            return with_objects[keep], scores[keep]

        found = adapter.rois(pixels, exchange, maps=maps)
    else:
        found = adapter.rois(pixels, maps=maps)
        chosen = []
        for r, o, p, rng in zip(found, objects, pixels, generators, strict=True):
            labels = assign(r.proposals, to_network(o.boxes, _ratio(r.net_size, p)), o.label, background, sampling)
            labels = one_to_one(labels, r.logits, background) if sampling.one_to_one else labels
            keep = choose(labels, background, sampling, rng) if train else np.arange(len(labels.label))
            chosen.append(Chosen(labels, keep, len(labels.label)))
        found = [taken(r, c.keep) for r, c in zip(found, chosen, strict=True)] if train else found
    return [
        image_rows(record, p.shape[:2], r, c, o)
        for record, p, r, c, o in zip(batch, pixels, found, chosen, objects, strict=True)
    ]


def taken(rois: RoIs, keep: NDArray[np.int64]) -> RoIs:
    """The RoIs at the positions ``keep``."""
    return replace(
        rois,
        proposals=rois.proposals[keep],
        objectness=rois.objectness[keep],
        features=rois.features[keep],
        logits=rois.logits[keep],
        refined=None if rois.refined is None else rois.refined[keep],
        maps=None if rois.maps is None else rois.maps[keep],
    )


def _ratio(net_size: tuple[int, int], pixels: Image) -> tuple[float, float]:
    return net_size[0] / pixels.shape[0], net_size[1] / pixels.shape[1]


def to_network(boxes: Boxes, ratio: tuple[float, float]) -> Boxes:
    """Pixels of the original image to those of the network's input; ``ratio`` (y, x) is input over image."""
    y, x = ratio
    return (boxes * np.asarray([x, y, x, y], np.float32)).astype(np.float32)


def image_rows(
    record: dict[str, Any], size: tuple[int, ...], rois: RoIs, chosen: Chosen, objects: GroundTruth
) -> ImageRows:
    """Rows of the cache; ``rois`` are those that were kept."""
    n, keep, labels = len(rois.features), chosen.keep, chosen.labels
    best = np.where(labels.max_iou[keep] > 0, labels.best[keep], -1)
    ids = np.append(objects.annotation_id, NO_ANNOTATION)  # best = -1 picks the last entry
    refined = rois.refined if rois.refined is not None else np.full((n, 4), np.nan, np.float32)
    meta: dict[str, NDArray[Any]] = {
        "image_id": np.full(n, int(record["id"]), np.int64),
        "roi_id": keep.astype(np.int32),
        "stage": np.zeros(n, np.int8),
        "objectness": rois.objectness,
        "label": labels.label[keep],
        "max_iou": labels.max_iou[keep],
        "gt_id": ids[best],
        "is_gt": keep >= chosen.appended_from,
    }
    meta |= {name: rois.proposals[:, k] for k, name in enumerate(PROPOSAL_BOX)}
    meta |= {name: refined[:, k] for k, name in enumerate(REFINED_BOX)}
    image = {
        "image_id": int(record["id"]),
        "height": size[0],
        "width": size[1],
        "net_height": rois.net_size[0],
        "net_width": rois.net_size[1],
        "neg_category_ids": record.get("neg_category_ids") or [],
        "not_exhaustive_category_ids": record.get("not_exhaustive_category_ids") or [],
    }
    return ImageRows(image, meta, rois.features, rois.logits, rois.maps)
