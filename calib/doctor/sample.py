"""The detector on a sample of pictures: which objects its proposals cover, and which class it gives each of them.

Pictures are chosen so that as many categories as possible have objects in different pictures, and the best choice comes
first: the run may stop at any time. The classifier is asked about the proposal that covers an object best (IoU >= 0.5
with the box), and about foreground classes only: background wins on many rare objects, which is no matter of order.
This is ``calib.extract.pipeline`` in test mode, whose rows are looked at instead of written.

Letters: M objects, N proposals of an image, K foreground classes of the detector, C categories.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.special import softmax

from calib.annotations import Annotations, Floats, Integers
from calib.boxes import Boxes, pairwise_iou, rescale
from calib.cache.image_rows import ImageRows
from calib.cache.schema import PROPOSAL_BOX
from calib.doctor.boxes import Format
from calib.doctor.data import objects
from calib.doctor.pictures import Pictures, unsized
from calib.doctor.reading import Split
from calib.errors import CalibError, FormatError
from calib.extract import pipeline
from calib.extract.adapter import Adapter
from calib.extract.label import GroundTruth
from calib.extract.options import Extraction
from calib.extract.pictures import read_image
from calib.extract.plan import Task
from calib.progress import Progress, silent

IOU = 0.5
LEAST_IMAGES = 8  # are looked at, however long that takes
_NOTHING = GroundTruth(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Objects:
    """Of one picture: M objects, and their corners by the meaning of ``bbox``."""

    image: int
    category: Integers  # [M]
    corners: dict[str, Boxes]  # [M, 4] xyxy in pixels of the file


@dataclass(frozen=True)
class Answers:
    """What the detector has to say on the objects, with ``bbox`` read in one way."""

    iou: NDArray[np.float32]  # [M] of the best proposal
    predicted: Integers  # [M] that proposal's best foreground class
    probability: NDArray[np.float32]  # [M, K] of its foreground classes, background aside
    is_background: NDArray[np.bool_]  # [M] background scores higher

    @property
    def is_covered(self) -> NDArray[np.bool_]:
        """[M]"""
        return np.asarray(self.iou >= IOU)


@dataclass(frozen=True)
class Evidence:
    """M objects of the pictures that were looked at, and the answers by the meaning of ``bbox``."""

    image: Integers  # [M]
    category: Integers  # [M]
    answers: dict[str, Answers]
    images: int
    seconds: float
    unreadable: list[str]  # pictures
    too_narrow: list[str]
    not_finite: list[int]  # ids of images of which the detector gave NaN or infinity


def choose(read: Annotations, usable: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the images ``usable``, those first that show most categories not seen often before.

    An image is worth the sum over its categories of 1 / (1 + chosen images that show it).
    """
    shown = objects(read) & np.isin(read.image, np.asarray(usable, np.int64))
    pairs = np.unique(np.stack([read.image[shown], read.category[shown]]), axis=1)
    shape = (len(read.images.id), len(read.categories.id))
    table = csr_array((np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=shape)
    times, is_left, chosen = np.zeros(shape[1]), np.zeros(shape[0], np.bool_), []
    is_left[pairs[0]] = True
    for _ in range(min(most, int(is_left.sum()))):
        best = int(np.argmax(np.where(is_left, table @ (1 / (1 + times)), -1.0)))
        chosen.append(best)
        is_left[best] = False
        times[table.indices[table.indptr[best] : table.indptr[best + 1]]] += 1
    return chosen


@dataclass
class Observer:
    """Looks at the rows of pictures as the detector makes them."""

    split: Split
    pictures: Pictures
    adapter: Adapter
    formats: tuple[Format, ...]  # ``AS_IS`` and others that bbox may have
    _objects: dict[str, Objects] = field(default_factory=dict)
    _found: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    _seen: list[Objects] = field(default_factory=list)
    _faults: dict[str, list[Any]] = field(
        default_factory=lambda: {"unreadable": [], "too_narrow": [], "not_finite": []}
    )

    def observe(self, most: int, seconds: float, progress: Progress = silent) -> Evidence:
        """At most ``most`` pictures, for about ``seconds`` (0: as long as it takes)."""
        chosen = choose(self.split.read, self.pictures.usable(), most)
        start = time.monotonic()
        self._found = {f.meaning: [] for f in self.formats}
        with progress(f"detector on {self.split.name}", total=len(chosen), unit="images") as bar:

            def tasks() -> Iterator[Task]:
                for k, image in enumerate(chosen):
                    if k >= LEAST_IMAGES and 0 < seconds < time.monotonic() - start:
                        return
                    if (record := self._prepare(image)) is not None:
                        yield Task(str(image), [record], [_NOTHING])
                    else:
                        bar.advance()

            settings = Extraction("test", "float32", "full", batch_size=1)
            folder = self.split.folder
            assert folder is not None
            pipeline.run(self.adapter, tasks(), folder, settings, self._take, lambda n, rows: bar.advance(n))
        return self._evidence(time.monotonic() - start)

    def first(self, most: int) -> list[dict[str, Any]]:
        """The records of the first pictures that can be read."""
        records = []
        for image in choose(self.split.read, self.pictures.usable(), most):
            with suppress(CalibError):
                record, size = self._read(image)
                if self.adapter.accepts(*size):
                    records.append(record)
        return records

    def _read(self, image: int) -> tuple[dict[str, Any], tuple[int, int]]:
        """The record, of any size if the json's is not the file's, and the size of the picture."""
        record, folder = self.pictures.records[image], self.split.folder
        assert folder is not None
        try:
            pixels = read_image(record, folder)
        except FormatError:
            record = unsized(record)
            pixels = read_image(record, folder)
        return record, (pixels.shape[0], pixels.shape[1])

    def _prepare(self, image: int) -> dict[str, Any] | None:
        """The record of a picture that can be read and taken; its objects are noted."""
        try:
            record, size = self._read(image)
        except CalibError as e:
            self._faults["unreadable"].append(str(e))
            return None
        if not self.adapter.accepts(*size):
            self._faults["too_narrow"].append(f"image {record['id']}: {size[1]} x {size[0]}")
            return None
        self._objects[str(image)] = self._of(image, size)
        return record

    def _of(self, image: int, size: tuple[int, int]) -> Objects:
        """The objects of a picture, stretched with it where the json has it in another size."""
        read = self.split.read
        rows = np.flatnonzero((read.image == image) & objects(read) & (read.box[:, 2:] > 0).all(axis=1))
        listed = tuple(int(t) or s for t, s in zip(read.images.size[image].tolist(), size, strict=True))
        wide_high = np.asarray((size if listed == size[::-1] else listed)[::-1], np.float64)
        stretch: Floats = np.tile(size[::-1] / wide_high, 2)
        box, own = read.box[rows], np.tile(wide_high, (len(rows), 1))
        corners = {f.meaning: (f.corners(box, own) * stretch).astype(np.float32) for f in self.formats}
        return Objects(image, read.category[rows], corners)

    def _take(self, name: str, rows: Iterator[ImageRows]) -> None:
        """In place of writing a shard."""
        for one in rows:
            own = self._objects.pop(name)
            if not all(np.isfinite(stage.logits).all() for stage in one.stages):
                self._faults["not_finite"].append(one.image["image_id"])
                continue
            self._seen.append(own)
            classes = self.adapter.detector.num_classes
            logits = np.mean([stage.logits for stage in one.stages], axis=0)  # [N, K] and background
            is_background = np.zeros(len(logits), np.bool_)
            if logits.shape[1] == classes + 1:
                is_background = logits[:, classes] > logits[:, :classes].max(axis=1)
            boxes = _proposals(one)
            for meaning, corners in own.corners.items():
                self._found[meaning].append(_answers(boxes, corners, logits[:, :classes], is_background))

    def _evidence(self, seconds: float) -> Evidence:
        none = np.zeros(0, np.int64)
        for found in self._found.values():  # so that there is something to join where nothing was seen
            found.append(_answers(_NOTHING.boxes, _NOTHING.boxes, self._no_logits(), np.zeros(0, np.bool_)))
        return Evidence(
            np.concatenate([none, *(np.full(len(o.category), o.image, np.int64) for o in self._seen)]),
            np.concatenate([none, *(o.category for o in self._seen)]),
            {m: Answers(*map(np.concatenate, zip(*own, strict=True))) for m, own in self._found.items()},
            len(self._seen),
            seconds,
            **self._faults,
        )

    def _no_logits(self) -> NDArray[np.float32]:
        return np.zeros((0, self.adapter.detector.num_classes), np.float32)


def _proposals(one: ImageRows) -> Boxes:
    """[N, 4] in pixels of the picture."""
    boxes = np.stack([one.meta[name] for name in PROPOSAL_BOX], axis=1)
    sizes = [(one.image[f"{of}height"], one.image[f"{of}width"]) for of in ("net_", "")]
    return rescale(boxes, sizes[0], sizes[1])


def _answers(
    boxes: Boxes, corners: Boxes, logits: NDArray[np.float32], is_background: NDArray[np.bool_]
) -> tuple[NDArray[Any], ...]:
    """``Answers`` of one picture; boxes [N, 4], corners [M, 4], logits of foreground classes [N, K]."""
    m = len(corners)
    if not len(boxes):
        return (
            np.zeros(m, np.float32),
            np.zeros(m, np.int64),
            np.zeros((m, logits.shape[1]), np.float32),
            np.zeros(m, np.bool_),
        )
    iou = pairwise_iou(boxes, corners)  # [N, M]
    at = iou.argmax(axis=0)
    best = iou[at, np.arange(m)].astype(np.float32)
    z = logits[at]
    return best, z.argmax(axis=1), softmax(z, axis=1).astype(np.float32), is_background[at]
