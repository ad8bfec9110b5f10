"""From what the detector computed for a batch of images to the rows of the cache."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.boxes import Boxes
from calib.cache.image_rows import ImageRows
from calib.cache.schema import IGNORE, NO_ANNOTATION, PROPOSAL_BOX, REFINED_BOX
from calib.extract.adapter import Adapter, Image, RoIs, Sampling
from calib.extract.label import GroundTruth, Labels, assign, choose, one_to_one
from calib.extract.options import Extraction
from calib.extract.plan import Batch


def launch(adapter: Adapter, batch: Batch, pixels: list[Image], settings: Extraction) -> Callable[[], list[ImageRows]]:
    """Start the detector on a batch; what is returned gives its rows, once, on any thread."""
    sizes = [(p.shape[0], p.shape[1]) for p in pixels]
    background, sampling, train = adapter.detector.num_classes, adapter.sampling, settings.mode == "train"
    exchanged = train and adapter.takes_proposals

    def generator(i: int) -> np.random.Generator:
        return np.random.default_rng([settings.seed, int(batch.records[i]["id"]) % 2**64])

    if not exchanged:
        found = adapter.launch(pixels, maps=settings.roi_maps)

        def choice(i: int, rois: RoIs) -> Chosen:
            objects, n = batch.objects[i], len(rois.proposals)
            boxes = to_network(objects.boxes, _ratio(rois.net_size, sizes[i]))
            labels = assign(rois.proposals, boxes, objects.label, background, sampling)
            labels = one_to_one(labels, rois.logits, background) if sampling.one_to_one else labels
            keep = choose(labels, background, sampling, generator(i)) if train else np.arange(n)
            return Chosen(labels, keep, n)

    else:
        chosen: dict[int, Chosen] = {}

        def exchange(
            i: int, proposals: Boxes, objectness: NDArray[np.float32], ratio: tuple[float, float]
        ) -> tuple[Boxes, NDArray[np.float32]]:
            objects = batch.objects[i]
            with_objects = np.concatenate([proposals, to_network(objects.boxes, ratio)])
            labels = assign(with_objects, with_objects[len(proposals) :], objects.label, background, sampling)
            keep = choose(labels, background, sampling, generator(i))
            chosen[i] = Chosen(labels, keep, len(proposals))
            scores = np.concatenate([objectness, np.ones(len(objects.boxes), np.float32)])
            return with_objects[keep], scores[keep]

        found = adapter.launch(pixels, exchange, maps=settings.roi_maps)

        def choice(i: int, rois: RoIs) -> Chosen:
            return chosen[i]

    def rows() -> list[ImageRows]:
        out = []
        for i, r in enumerate(found()):
            c = choice(i, r)
            r = r[c.keep] if train and not exchanged else r
            own = image_rows(batch.records[i], sizes[i], r, c, batch.objects[i])
            out.append(with_stages(own, r, batch.records[i], sizes[i], batch.objects[i], sampling, background))
        return out

    return rows


@dataclass(frozen=True)
class Chosen:
    """Labels of all candidate proposals of an image, the positions kept, and where appended ground truth begins."""

    labels: Labels
    keep: NDArray[np.int64]
    appended_from: int


def _ratio(net_size: tuple[int, int], size: tuple[int, ...]) -> tuple[float, float]:
    return net_size[0] / size[0], net_size[1] / size[1]


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


def with_stages(
    first: ImageRows,
    rois: RoIs,
    record: dict[str, Any],
    size: tuple[int, ...],
    objects: GroundTruth,
    sampling: Sampling,
    background: int,
) -> ImageRows:
    """``first`` with the rows of a cascade's later stages, ``rois.next``, matched by the IoU of each.

    A ground-truth box that was appended has been moved by then: it is one no longer. Boxes that vanished are ignored,
    as in training.
    """
    later = []
    for k, (stage, iou) in enumerate(zip(rois.next, sampling.next_ious, strict=True), start=1):
        own = Sampling(iou, background_iou=iou)
        boxes = to_network(objects.boxes, _ratio(stage.net_size, size))
        found = assign(stage.proposals, boxes, objects.label, background, own)
        found.label[(stage.proposals[:, 2:] <= stage.proposals[:, :2]).any(axis=1)] = IGNORE
        n = len(stage.features)
        rows = image_rows(record, size, stage, Chosen(found, np.arange(n), n), objects)
        later.append(in_stage(rows, k, first))
    return replace(first, next=tuple(later))


def in_stage(rows: ImageRows, stage: int, first: ImageRows) -> ImageRows:
    """``rows`` as those of a later stage of the RoIs ``first``."""
    kept = {name: first.meta[name] for name in ("roi_id", "objectness")}
    rows.meta.update(kept, stage=np.full(len(rows.features), stage, np.int8))
    return rows
