"""An adapter proves itself: on the first images the rows it would write give what the detector itself detects.

An adapter sees where a detector's classifier stands, not what becomes of its logits: a subclass may multiply scores by
objectness, or classify by cosines. So the rows of an image are written into a cache of its own, read again and scored
with the detector's own head from features; after suppression that must be what the live model returns by its public
forward pass. All of it in float32, without autocast, one image at a time: half precision is rounding, which is known,
and would hide small differences.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calib.cache import Cache
from calib.cache.schema import Manifest
from calib.cache.write import CacheWriter
from calib.errors import NonFiniteError, ReplayError
from calib.extract.adapter import Adapter, Image, Own
from calib.extract.dataset import Dataset
from calib.extract.options import Extraction
from calib.extract.pictures import read_image
from calib.extract.plan import Batch, Records, task
from calib.extract.replay import Difference, Rows, compare
from calib.extract.rows import launch
from calib.heads.base import Head
from calib.heads.detector import detector_head
from calib.score import Scorer, detector_nms

LOOKED_AT = 8  # images for each one that is wanted, where some have no detections
UNPROVED = {"images": 0}
GO_ON = "--check-images 0 goes on without this comparison, and the cache says so; others as arrays: docs/raw.md"


@dataclass(frozen=True)
class Candidates:
    """What a proof looks at: the first images of an extraction, until ``wanted`` of them have detections."""

    dataset: Dataset
    records: Records
    folder: Path
    wanted: int

    @classmethod
    def of(cls, dataset: Dataset, shards: Sequence[tuple[str, Records]], folder: Path, wanted: int) -> "Candidates":
        """Those of ``shards``."""
        records = [r for _, own in shards[: LOOKED_AT * wanted] for r in own]
        return cls(dataset, records[: LOOKED_AT * wanted], folder, wanted)


def prove(adapter: Adapter, candidates: Candidates) -> dict[str, Any]:
    """What a manifest holds as ``proof``.

    Raises:
        ReplayError: the rows do not give the detector's own detections. Others as reading and running it.
    """
    exact = copy(adapter)
    exact.precision = "fp32"
    images, detections, found, largest = 0, 0, 0, 0.0
    for record in candidates.records:
        picture = read_image(record, candidates.folder)
        if not exact.accepts(*picture.shape[:2]):
            continue  # extraction says so when it comes to it
        own = exact.detections(picture)
        difference, wrong = compare(own, replayed(exact, candidates.dataset, record, picture))
        if wrong:
            raise _refused(exact, candidates.dataset, record, wrong, own)
        images, detections, largest = images + 1, detections + len(own.score), max(largest, difference)
        found += len(own.score) > 0
        if found == candidates.wanted:
            break
    return {"images": images, "detections": detections, "largest_difference": largest}


def replayed(
    adapter: Adapter, dataset: Dataset, record: dict[str, Any], picture: Image, head: Head | None = None
) -> Rows:
    """One image from the detector through a cache in float32 to detections of ``head``, or of the detector's own."""
    (own,) = [task("00000", [record], dataset)]
    batch = Batch(own.name, own.records, own.objects, is_last=True)
    manifest = Manifest("test", "float32", "none", adapter.detector, {})
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        with CacheWriter.create(path, manifest, dataset.categories, adapter.classifier()) as writer:
            writer.commit(own.name, launch(adapter, batch, [picture], Extraction("test", "float32", "none"))())
            writer.finish()
        cache = Cache(path)
        scorer, nms = Scorer(cache), detector_nms(cache)
        scores = scorer.scores(0, head or detector_head(cache))
        try:
            (found,) = scorer.image(0, [(head or detector_head(cache), nms)])
        except NonFiniteError as e:
            raise NonFiniteError(
                f"image {record['id']}: what the detector computes holds NaN or infinity",
                hint="are its weights finite?",
            ) from e
        kept = list(zip(found.detections.row.tolist(), found.detections.category.tolist(), strict=True))
        return Rows(scores, scorer.boxes(0), kept, nms, adapter.detector.min_box_side)


def _refused(
    adapter: Adapter, dataset: Dataset, record: dict[str, Any], wrong: list[Difference], found: Own
) -> ReplayError:
    worst, kind = wrong[0], type(adapter.model).__name__
    cause = found.remark or f"{kind} makes scores, boxes or detections in a way that calib does not know"
    name = dataset.categories.name[worst.category]
    own, ours = ("no detection" if s is None else f"a score of {s:.4f}" for s in (worst.own, worst.ours))
    return ReplayError(
        f"image {record['id']}: the detector itself gives {own} for '{name}' where the rows of a cache give {ours}; "
        f"{len(wrong)} differences at {len(found.score)} detections, the largest {worst.size:.3g}: {cause}",
        hint=GO_ON,
    )
