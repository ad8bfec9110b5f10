"""Heads judged on a labelled cache, without writing detections.

The boxes of a class-agnostic detector do not change with the head: their overlaps with the objects are found once for
all heads. Letters: N proposals, C foreground classes.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calib.boxes import rescale
from calib.cache import Cache
from calib.cache.schema import PROPOSAL_BOX, REFINED_BOX
from calib.decide.truth import ground_truth
from calib.errors import InputError, UnsupportedError
from calib.evaluate import BoxSet, Detections, Evaluator, GroundTruth, Rescored, bin_index
from calib.evaluate.bins import DEFAULT_BINS, mean_present
from calib.evaluate.evaluation import MAX_DETECTIONS, Evaluation
from calib.heads.base import Head
from calib.lookup import positions
from calib.progress import Progress, silent
from calib.score import ImageDetections, score
from calib.score.detect import Detections as ImageResult
from calib.score.detect import detect
from calib.score.inputs import LogitRows, as_tensor, exact_logits, scored_rows
from calib.settings import Nms


class Assessment:
    """A labelled cache of test mode, prepared for any number of heads."""

    def __init__(
        self, cache: Cache, truth: GroundTruth | None = None, instance_count: NDArray[np.int64] | None = None
    ) -> None:
        """Prepare ``cache``; ``truth`` is read from the cache unless given.

        Raises:
            MissingFileError, UnsupportedError: as ``check_test`` and ``ground_truth``. InputError: there is no object.
        """
        check_test(cache)
        self.cache = cache
        truth = ground_truth(cache) if truth is None else truth
        if not len(truth.annotation_id):
            raise InputError(f"cache {cache.path} has no object in any image: no head can be judged by it")
        self.evaluator = Evaluator(truth, instance_count=instance_count)
        # Index in the ground truth of each class of the cache, -1 for classes that it does not list. [C]
        self._category = positions(self.evaluator.truth.category_ids, cache.categories.category_id)
        # Class of the cache of each category of the ground truth, -1 for those that it does not have.
        order = np.argsort(cache.categories.category_id)
        at = positions(cache.categories.category_id[order], self.evaluator.truth.category_ids)
        self.class_of = np.where(at >= 0, order[at], -1)

    @cached_property
    def boxes(self) -> BoxSet | None:
        """Refined boxes of every proposal in the pixels of the original image; None for class-specific boxes."""
        return self._boxes(REFINED_BOX, -1) if self.cache.manifest.detector.class_agnostic else None

    @cached_property
    def proposals(self) -> BoxSet:
        """The proposals themselves, before refinement."""
        return self._boxes(PROPOSAL_BOX, 0)

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """Of the proposals: of a cascade those of its first stage. [N]"""
        return self.cache.stages[0].labels

    def _boxes(self, names: Sequence[str], stage: int) -> BoxSet:
        corners = np.stack(self.cache.stages[stage].meta(*names), axis=1)
        image_id = np.empty(len(corners), np.int64)
        for i, image in enumerate(self.cache.images.to_pylist()):
            rows = slice(int(self.cache.image_start[i]), int(self.cache.image_start[i + 1]))
            net, size = (image["net_height"], image["net_width"]), (image["height"], image["width"])
            corners[rows] = rescale(corners[rows], net, size)
            image_id[rows] = image["image_id"]
        return self.evaluator.boxes(image_id, corners)

    def limit(self, nms: Nms) -> int:
        """Detections that are judged of those that ``nms`` leaves: all; in COCO style 100 per image and category."""
        style = self.evaluator.truth.style
        return nms.max_detections if style == "lvis" else MAX_DETECTIONS[style]

    def evaluate(self, found: Detections | Rescored, nms: Nms) -> Evaluation:
        """AP of what was found with ``nms``."""
        return self.evaluator.evaluate(found, max_detections=self.limit(nms))

    def found(
        self, head: Head, nms: Nms, *, logits: LogitRows | None = None, progress: Progress = silent
    ) -> Detections | Rescored:
        """What ``head`` detects, as the evaluator takes it; it is given ``logits``, or those of the cache."""
        return self._taken(list(score(self.cache, head, nms, logits=logits, progress=progress)))

    def _taken(self, results: Sequence[ImageDetections]) -> Detections | Rescored:
        boxes = self.boxes
        if boxes is None:
            return as_detections(self.cache, results)
        start = self.cache.image_start[:-1].tolist()
        row = _joined([s + r.detections.row for s, r in zip(start, results, strict=True)], np.int64)
        category = _joined([r.detections.category for r in results], np.int64)
        scores = _joined([r.detections.score for r in results], np.float32)
        return Rescored(boxes, row, self._category[category], scores.astype(np.float64))

    def proposal_metrics(self, head: Head, nms: Nms, bins: Sequence[int] = DEFAULT_BINS) -> dict[str, Any]:
        """Accuracy of ``head`` on proposals, recall of proposals, and what AP right labels would give.

        Keys: ``ACC``, ``ACCbg``, ``ACC1`` ...: share of proposals classified as their label, over all, background and
        each bin of training instances, with their numbers ``nACC`` ... (Li et al., "Balanced Group Softmax", CVPR 2020,
        table 1). ``recall``, ``recall1`` ...: share of objects that a proposal covers with IoU >= 0.5, mean over the
        categories of a bin, with n. ``oracle``: AP with each proposal's label as its only class and its objectness as
        score (Wang et al., "The Devil is in Classification", ECCV 2020, section 3); of class-agnostic boxes only.
        """
        labels = self.labels
        known = labels >= 0
        metrics: dict[str, Any] = {}
        counts = self.evaluator.instance_count
        bin_of = np.full(len(self._category) + 1, -1)
        if counts is not None:
            bin_of[:-1] = np.where(self._category >= 0, bin_index(counts, bins)[self._category], -1)
        right = (self.predicted(head) == labels) & known
        groups = {"ACC": known, "ACCbg": labels == self.cache.background}
        groups |= {f"ACC{b + 1}": known & (bin_of[labels] == b) for b in range(len(bins) + 1)}
        for name, rows in groups.items():
            n = int(rows.sum())
            metrics[name], metrics[f"n{name}"] = (float(right[rows].sum() / n) if n else -1.0), n
        metrics |= self._recall(bins)
        return metrics if self.boxes is None else metrics | {"oracle": self._oracle(nms).summary(bins)}

    def predicted(self, head: Head) -> NDArray[np.int64]:
        """The class of the highest score of every proposal, C for background. [N]"""
        rows, stored = scored_rows(self.cache, head), exact_logits(self.cache)
        parts = []
        with torch.inference_mode():
            for start in range(0, self.cache.n_rows, 4096):
                stop = min(start + 4096, self.cache.n_rows)
                z = as_tensor(stored, start, stop)
                parts.append(head.full_scores(torch.from_numpy(rows.read(start, stop)), z).argmax(dim=1).numpy())
        return _joined(parts, np.int64)

    def _recall(self, bins: Sequence[int]) -> dict[str, float | int]:
        truth = self.evaluator.truth
        counts = ~truth.is_ignored
        _, covered, iou = self.proposals.overlaps()
        is_covered = np.zeros(len(truth.area), np.bool_)
        is_covered[covered[iou >= 0.5]] = True
        size = len(truth.category_ids)
        n = np.bincount(truth.category[counts], minlength=size)
        found = np.bincount(truth.category[counts & is_covered], minlength=size)
        recall = np.where(n > 0, found / np.maximum(n, 1), -1.0)
        metrics: dict[str, float | int] = {}
        metrics["recall"], metrics["nrecall"] = mean_present(recall)
        if self.evaluator.instance_count is not None:
            index = bin_index(self.evaluator.instance_count, bins)
            for b in range(len(bins) + 1):
                metrics[f"recall{b + 1}"], metrics[f"nrecall{b + 1}"] = mean_present(recall[index == b])
        return metrics

    def _oracle(self, nms: Nms) -> Any:
        """The evaluation of detections whose class is the proposal's label."""
        cache = self.cache
        labels, (objectness, roi) = self.labels, cache.stages[0].meta("objectness", "roi_id")
        # Suppression in the pixels in which the detector suppresses: the boxes as they are in the cache.
        corners = np.stack(cache.stages[-1].meta(*REFINED_BOX), axis=1)
        results = []
        for i, image_id in enumerate(cache.images["image_id"].to_pylist()):
            rows = slice(int(cache.image_start[i]), int(cache.image_start[i + 1]))
            scores = np.zeros((rows.stop - rows.start, len(self._category)), np.float32)
            is_object = (labels[rows] >= 0) & (labels[rows] != cache.background)
            at = np.flatnonzero(is_object)
            scores[at, labels[rows][at]] = np.maximum(objectness[rows][at], np.float32(1e-6))
            # Objectness is no probability of a class: no threshold.
            found = detect(scores, corners[rows], Nms(0.0, nms.nms_iou, nms.max_detections))
            results.append(ImageDetections(image_id, found, roi[rows][found.row]))
        return self.evaluate(self._taken(results), nms)


def check_test(cache: Cache) -> None:
    """
    Raises:
        UnsupportedError: ``cache`` was extracted with --mode train.
    """
    if cache.manifest.mode == "train":
        raise UnsupportedError(
            f"cache {cache.path} was extracted with --mode train: it holds sampled proposals",
            hint="evaluate on a cache extracted with --mode test",
        )


def as_detections(cache: Cache, results: Sequence[ImageDetections]) -> Detections:
    """Detections of every image of ``cache`` as one table."""
    parts: list[ImageResult] = [r.detections for r in results]
    image_id = np.repeat(np.array([r.image_id for r in results], np.int64), [len(p.score) for p in parts])
    category = _joined([p.category for p in parts], np.int64)
    boxes = np.concatenate([p.box for p in parts]) if parts else np.empty((0, 4), np.float32)
    scores = _joined([p.score for p in parts], np.float32)
    return Detections.from_arrays(image_id, cache.categories.category_id[category], scores, boxes, str(cache.path))


def _joined(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)
