"""A cache from arrays that somebody else made: any detector, any framework, no pictures.

What is given is an iterable of ``RawImage`` and the classifier they were fed to; everything is checked, matched with
ground truth as ``calib extract`` does, and written shard by shard. ``raw_files.py`` reads such rows from files.
Letters: N proposals of one image, D feature size, C foreground classes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.boxes import Boxes, clip, decode
from calib.cache import Classifier
from calib.cache.image_rows import ImageRows
from calib.cache.schema import (
    ACTIVATIONS,
    AVERAGES,
    DTYPES,
    IGNORE,
    IMAGES_SCHEMA,
    LOGITS_KEPT,
    MODES,
    Detector,
    Manifest,
)
from calib.cache.tables import read_table
from calib.cache.write import CacheWriter
from calib.errors import FormatError, InputError, SettingError, ShapeError
from calib.extract.adapter import RoIs, Sampling
from calib.extract.dataset import Dataset
from calib.extract.label import GroundTruth, Labels, assign, choose, one_to_one
from calib.extract.raw_check import check_agreement, checked_boxes, checked_classifier, column, matrix
from calib.extract.rows import Chosen, image_rows, in_stage, to_network
from calib.layout import IMAGES
from calib.progress import Progress, silent
from calib.settings import at_least, one_of

_PROBED = 64  # rows of an image whose logits are compared with the classifier's


@dataclass(frozen=True)
class RawImage:
    """The proposals of one image, best first. Only the first three fields are needed.

    Boxes are x1, y1, x2, y2 in pixels of the original image, or of an image of ``net_size`` (height, width) where the
    detector saw another size; non-maximum suppression takes place in those pixels. ``label`` holds class indices
    (categories in ascending id from 0; C background, -1 ignore); without it proposals are matched by IoU.

    Of a cascade ``next`` are the same proposals in its later stages: as many rows, in the same order, with the boxes
    that each stage began with. A stage without ``refined`` ends where the next begins.
    """

    image_id: int
    boxes: NDArray[Any]  # [N, 4]
    features: NDArray[Any]  # [N, D], the classifier's input
    logits: NDArray[Any] | None = (
        None  # [N, C+1], of a sigmoid detector [N, C], of a seesaw one [N, C+2]; else computed
    )
    objectness: NDArray[Any] | None = None  # [N] in [0, 1]; else 1
    refined: NDArray[Any] | None = None  # [N, 4] after regression; else by the classifier's box_weight, or ``boxes``
    label: NDArray[Any] | None = None  # [N]
    is_gt: NDArray[Any] | None = None  # [N] the proposal is a ground-truth box that was appended; else none is
    net_size: tuple[int, int] | None = None
    next: "tuple[RawImage, ...]" = ()

    @property
    def where(self) -> str:
        """Names the image in errors."""
        return f"image {self.image_id}"


@dataclass(frozen=True)
class RawSettings:
    """What the arrays do not say of the detector, and how much of them is kept.

    ``background_first``: column 0 of classifier and logits is the background (it is moved last). ``nms_iou`` 1 means no
    suppression. In mode train, ``rows_per_image`` of each image are drawn, at most ``foreground_share`` of them
    foreground; 0 keeps all. ``one_to_one``: an object is matched with one row, for detectors without suppression. Of a
    cascade ``average`` says what is averaged over stages (probabilities or logits), ``next_ious`` are the IoU of
    foreground in the stages after the first (``foreground_iou`` where empty), ``box_weights`` are of its last stage.
    """

    mode: str = "test"
    dtype: str = "float16"
    logits: str = "full"
    activation: str = "softmax"
    background_first: bool = False
    box_weights: tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)
    score_threshold: float = 1e-4
    nms_iou: float = 0.5
    max_detections: int = 300
    foreground_iou: float = 0.5
    one_to_one: bool = False
    average: str = "probabilities"
    next_ious: tuple[float, ...] = ()
    rows_per_image: int = 0
    foreground_share: float = 0.25
    images_per_shard: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(self, "mode", MODES)
        one_of(self, "dtype", DTYPES)
        one_of(self, "logits", LOGITS_KEPT)
        one_of(self, "activation", ACTIVATIONS)
        one_of(self, "average", AVERAGES)
        at_least(self, 1, "max_detections", "images_per_shard")
        names = ("score_threshold", "nms_iou", "foreground_iou", "foreground_share", "rows_per_image", "seed")
        at_least(self, 0, *names)
        beyond = [n for n in names[:4] if getattr(self, n) > 1]
        if beyond:
            raise SettingError(f"{beyond[0]} is {getattr(self, beyond[0])}: expected a number in [0, 1]")
        if self.background_first and self.activation != "softmax":
            raise SettingError(f"a {self.activation} detector has no background column: leave out background_first")
        if any(not 0 <= iou <= 1 for iou in self.next_ious):
            raise SettingError(f"next_ious are {list(self.next_ious)}: expected numbers in [0, 1]")
        if len(self.box_weights) != 4 or min(self.box_weights) <= 0:
            raise SettingError(f"box_weights are {self.box_weights}: expected four numbers above 0")


@dataclass(frozen=True)
class Imported:
    """What was written; ``without_rows`` counts images of the annotation file that the rows do not have."""

    manifest: Manifest
    without_rows: int


def write_cache(
    images: Iterable[RawImage],
    classifier: Classifier,
    dataset: Dataset,
    out: Path,
    settings: RawSettings,
    *,
    name: str = "arrays",
    source: dict[str, Any] | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Imported:
    """Write a cache of ``images`` to ``out``. Interrupted, the same call with ``resume`` goes on, given the same rows
    in the same order; images of ``dataset`` that never come have no proposals.

    Args:
        images: each image once, in any order.
        classifier: weight [C+1, D], bias, scale of a cosine head, box_weight and box_bias [4 or C*4, D] where boxes
            are to be decoded; for class-specific boxes it is needed. Of a cascade with those of the next stages.
        dataset: ground truth and categories.
        name: of the detector, for reports.
        source: what identifies the rows: a resumed run must agree on it.

    Raises:
        ShapeError, NonFiniteError, InputError, FormatError: rows that cannot be right; name the image.
        ExistsError: ``out`` holds something else.
    """
    rows = _Rows(classifier, dataset, settings, name)
    if settings.mode == "train" and len(dataset.annotations["id"]) == 0:
        raise InputError(f"{dataset.annotations_file} has no annotations to label proposals with", hint="use mode test")
    kept = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in ("mode", "dtype", "logits")}
    lists = {name: list(getattr(settings, name)) for name in ("box_weights", "next_ious")}
    identity = {"annotations_xxh3": dataset.digest(), "import": kept | lists}
    whole = {"annotations": dataset.annotations_file.name, "images": len(dataset.images)} | identity | (source or {})
    how = settings.mode, settings.dtype, settings.logits
    manifest = Manifest(*how, rows.detector, whole, style=dataset.style)
    begin = CacheWriter.open if resume else CacheWriter.create
    with begin(out, manifest, dataset.categories, rows.classifier) as writer:
        if not writer.manifest.complete:
            writer.write_annotations(dataset.annotations)
            with progress(f"import {settings.mode}", total=len(dataset.images), unit="images") as bar:
                for number, shard in enumerate(_shards(rows.complete(images), settings.images_per_shard)):
                    if not writer.is_committed(f"{number:05d}"):
                        writer.commit(f"{number:05d}", [rows.of(image) for image in shard])
                    bar.advance(len(shard))
            writer.finish()
    n_rows = read_table(out / IMAGES, IMAGES_SCHEMA)["n_rows"].to_numpy()
    return Imported(writer.manifest, int((n_rows == 0).sum()))


def _shards(images: Iterator[RawImage], size: int) -> Iterator[list[RawImage]]:
    while shard := list(islice(images, size)):
        yield shard


class _Rows:
    """Checks rows and makes them rows of a cache."""

    def __init__(self, classifier: Classifier, dataset: Dataset, settings: RawSettings, name: str) -> None:
        self.settings, self._dataset = settings, dataset
        self._records = {int(r["id"]): r for r in dataset.images}
        self.classifier = checked_classifier(
            classifier, len(dataset.categories), settings.activation, background_first=settings.background_first
        )
        stages = self.classifier.stages
        box = stages[-1].box_weight
        self._specific = box is not None and len(box) > 4
        later = settings.next_ious or (settings.foreground_iou,) * (len(stages) - 1)
        if len(later) != len(stages) - 1:
            raise SettingError(f"next_ious are {list(later)}: the classifier has {len(stages)} stages")
        self._ious = (settings.foreground_iou, *later)
        self.detector = Detector(
            source=f"raw:{name}",
            digest=self.classifier.digest(),
            num_classes=len(dataset.categories),
            feature_size=self.classifier.weight.shape[1],
            head_type="linear" if self.classifier.scale is None else "cosine",
            activation=settings.activation,
            background_first=settings.background_first,
            class_agnostic=not self._specific,
            box_weights=settings.box_weights,
            score_threshold=settings.score_threshold,
            nms_iou=settings.nms_iou,
            max_detections=settings.max_detections,
            stages=len(stages),
            average=settings.average,
        )

    def complete(self, images: Iterable[RawImage]) -> Iterator[RawImage]:
        """``images``, each known and none twice, and then those that were left out, without rows."""
        left = dict(self._records)
        for image in images:
            if image.image_id not in self._records:
                raise InputError(
                    f"image {image.image_id} is not in {self._dataset.annotations_file}",
                    hint="rows of another split, or image ids of another numbering?",
                )
            if left.pop(image.image_id, None) is None:
                raise InputError(
                    f"the rows of image {image.image_id} come in two places", hint="rows of an image must be together"
                )
            yield image
        if len(left) == len(self._records):
            raise InputError("there is not one row to import", hint="is the file empty?")
        d, stages = self.detector.feature_size, self.detector.stages
        for image_id in left:
            none = RawImage(image_id, np.empty((0, 4), np.float32), np.empty((0, d), np.float32))
            yield replace(none, next=(none,) * (stages - 1))

    def of(self, image: RawImage) -> ImageRows:
        """Rows of one image."""
        record, settings = self._records[image.image_id], self.settings
        height, width = record.get("height"), record.get("width")
        if not height or not width:
            raise FormatError(
                f"{self._dataset.annotations_file}: image {image.image_id} has no height and width",
                hint="boxes without pictures need them",
            )
        size = image.net_size or (int(height), int(width))
        ratio, truth = (size[0] / height, size[1] / width), self._dataset.objects(image.image_id)
        given = (image, *image.next)
        rois = self._stages(given, size)
        labels = [self._labels(*stage, truth, ratio) for stage in zip(given, rois, self._ious, strict=True)]
        n, background = len(rois[0].features), self.detector.num_classes
        keep = np.arange(n)
        if settings.mode == "train":
            rng = np.random.default_rng([settings.seed, image.image_id % 2**64])
            wanted = (settings.rows_per_image, settings.foreground_share) if settings.rows_per_image else (n, 1.0)
            sampling = Sampling(settings.foreground_iou, settings.foreground_iou, *wanted)
            keep = choose(labels[0], background, sampling, rng)
        rows = []
        for stage, r, found in zip(given, rois, labels, strict=True):
            rows.append(image_rows(record, (height, width), r[keep], Chosen(found, keep, n), truth))
            if stage.is_gt is not None:
                rows[-1].meta["is_gt"] = column(stage.where, "is_gt", stage.is_gt, n).astype(np.bool_)[keep]
        return replace(rows[0], next=tuple(in_stage(r, k, rows[0]) for k, r in enumerate(rows[1:], start=1)))

    def _stages(self, given: tuple[RawImage, ...], size: tuple[int, int]) -> list[RoIs]:
        counts = [len(np.atleast_1d(stage.features)) for stage in given]
        if len(given) != self.detector.stages or len(set(counts)) > 1:
            raise ShapeError(
                f"{given[0].where} has {', '.join(map(str, counts))} rows in its stages: expected as many in each of "
                f"{self.detector.stages}, the stages of the classifier",
                hint="one row per proposal and stage, its number in the column 'stage' (0, 1, ...); classifiers of the "
                "next stages are stage1.weight, ...",
            )
        classifiers = self.classifier.stages
        rois = [self._checked(one, size, c) for one, c in zip(given, classifiers, strict=True)]
        for k, (one, after) in enumerate(pairwise(given)):
            if not self._specific and one.refined is None:
                rois[k] = replace(rois[k], refined=checked_boxes(after.where, "boxes", after.boxes, counts[0], size))
        return rois

    def _labels(
        self, image: RawImage, rois: RoIs, iou: float, truth: GroundTruth, ratio: tuple[float, float]
    ) -> Labels:
        background = self.detector.num_classes
        found = assign(
            rois.proposals, to_network(truth.boxes, ratio), truth.label, background, Sampling(iou, background_iou=iou)
        )
        if image.label is None:
            return one_to_one(found, rois.logits, background) if self.settings.one_to_one else found
        label = column(image.where, "label", image.label, len(rois.features))
        wrong = (label < IGNORE) | (label > background) | (label != np.floor(label))
        if wrong.any():
            raise InputError(
                f"{image.where}: label {label[wrong][0]} of row {int(np.argmax(wrong))} is no class index",
                hint=f"0 to {background - 1} by ascending category id, {background} background, -1 ignore",
            )
        return replace(found, label=label.astype(np.int32))

    def _checked(self, image: RawImage, size: tuple[int, int], classifier: Classifier) -> RoIs:
        d, outputs = self.detector.feature_size, self.detector.outputs
        features = matrix(image.where, "features", image.features, d)
        n = len(features)
        boxes = checked_boxes(image.where, "boxes", image.boxes, n, size)
        computed = classifier.logits(features[:_PROBED])
        if image.logits is None:
            logits = classifier.logits(features)
        else:
            logits = matrix(image.where, "logits", image.logits, outputs, n)
            if self.settings.background_first:
                logits = np.roll(logits, -1, axis=1)
            check_agreement(image.where, logits[:_PROBED], computed)
        objectness = np.ones(n, np.float32)
        if image.objectness is not None:
            objectness = column(image.where, "objectness", image.objectness, n).astype(np.float32)
            if n and not (objectness.min() >= 0 and objectness.max() <= 1):
                raise InputError(
                    f"{image.where}: objectness must lie in [0, 1], got {objectness.min():g} to {objectness.max():g}",
                    hint="apply the sigmoid first",
                )
        return RoIs(boxes, objectness, features, logits, self._refined(image, boxes, features, size, classifier), size)

    def _refined(
        self, image: RawImage, boxes: Boxes, features: NDArray[np.float32], size: tuple[int, int], c: Classifier
    ) -> Any:
        if self._specific:
            if image.refined is not None:
                raise InputError(
                    f"{image.where} has refined boxes, and the classifier has box_weight of every class",
                    hint="give one of the two",
                )
            return None
        if image.refined is not None:
            return checked_boxes(image.where, "refined", image.refined, len(boxes), size)
        if c.box_weight is None or c.box_bias is None:
            return boxes
        deltas = (features @ c.box_weight.T + c.box_bias).reshape(-1, 1, 4)
        return clip(decode(deltas, boxes, self.settings.box_weights)[:, 0], *size)
