"""Offline scoring: a cache and a head to detections, one image at a time.

Letters: N proposals of one image, C foreground classes.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from calib.artifact import Artifact
from calib.boxes import Boxes, clip, decode, rescale
from calib.cache import Cache
from calib.cache.schema import PROPOSAL_BOX, REFINED_BOX
from calib.detect import Detections, detect
from calib.errors import ExistsError, InputError, NonFiniteError, UnsupportedError
from calib.files import is_calib_folder, replacing
from calib.heads.base import Head
from calib.heads.box_head import input_rows
from calib.progress import Progress, silent
from calib.settings import Nms

DETECTIONS_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("category_id", pa.int64(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        *(pa.field(n, pa.float32(), nullable=False) for n in ("x1", "y1", "x2", "y2")),  # original pixels
        pa.field("roi_id", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class ImageDetections:
    """Detections of one image; boxes in the pixels of the original image."""

    image_id: int
    detections: Detections
    roi_id: Any  # [K]


def score(cache: Cache, head: Head, nms: Nms, *, progress: Progress = silent) -> Iterator[ImageDetections]:
    """Yield the detections of every image of ``cache``, in its order.

    Stored logits are used where they are exact (float32, every row); otherwise heads compute them from features.

    Raises:
        UnsupportedError: the cache holds the sampled proposals of training mode, or lacks the RoI maps of the head.
    """
    manifest = cache.manifest
    if manifest.mode == "train":
        raise UnsupportedError(
            f"cache {cache.path} was extracted with --mode train: it holds sampled proposals and ground truth",
            hint="score a cache extracted with --mode test",
        )
    boxes, rows = _Boxes(cache), input_rows(cache, head)
    logits = cache.logits if cache.logits is not None and cache.logits.dtype == np.float32 else None
    roi_ids = cache.meta("roi_id")[0]
    with progress("score", total=len(boxes.images), unit="images") as bar, torch.inference_mode():
        for i, image in enumerate(boxes.images):
            start, stop = int(cache.image_start[i]), int(cache.image_start[i + 1])
            x = torch.from_numpy(rows.read(start, stop))
            z = None if logits is None else torch.from_numpy(logits.read(start, stop))
            scores = head.scores(x, z).numpy()
            try:
                found = detect(scores, boxes.of(i), nms, min_box_side=manifest.detector.min_box_side)
            except NonFiniteError as e:
                raise NonFiniteError(
                    f"image {image['image_id']} of cache {cache.path}: {e}", hint="extract the cache again"
                ) from e
            size, net = (image["height"], image["width"]), (image["net_height"], image["net_width"])
            found = Detections(found.row, found.category, found.score, rescale(found.box, net, size))
            yield ImageDetections(image["image_id"], found, roi_ids[start:stop][found.row])
            bar.advance()


class _Boxes:
    """Boxes of every image in network pixels: as stored, or decoded per class from the features."""

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


def write_detections(
    results: Iterator[ImageDetections],
    cache: Cache,
    artifact: Artifact,
    nms: Nms,
    parquet: Path,
    *,
    results_json: Path | None = None,
) -> int:
    """Write detections as Parquet, and as LVIS results json where ``results_json`` is given; returns their number.

    Both files appear whole or not at all.

    Raises:
        InputError: one name for both. ExistsError: a folder stands where a file is to be written, or the place is
            inside a head or a cache.
    """
    if results_json is not None and results_json.resolve() == parquet.resolve():
        raise InputError(f"detections and results json would both be written to {parquet}", hint="name two files")
    for path in (parquet, *([results_json] if results_json else [])):
        for folder in (parent for parent in path.resolve().parents if is_calib_folder(parent)):
            raise ExistsError(f"{path} lies inside the head or cache {folder}", hint="name a file outside it")
    origin = {
        "cache": cache.digest,
        "method": artifact.info.method,
        "seed": artifact.info.seed,
        "nms": asdict(nms),
    }
    schema = DETECTIONS_SCHEMA.with_metadata({"calib.detections": json.dumps(origin)})
    ids = cache.categories.category_id
    count = 0
    with ExitStack() as stack:
        writer = stack.enter_context(
            pq.ParquetWriter(stack.enter_context(replacing(parquet)), schema, compression="zstd")
        )
        json_file = stack.enter_context(_json_list(results_json)) if results_json else None
        for some in _grouped(results, 256):
            table = pa.concat_tables([_table(r, ids, schema) for r in some])
            writer.write_table(table)
            count += len(table)
            if json_file is not None:
                json_file.add(_records(table))
    return count


def _grouped(results: Iterator[ImageDetections], size: int) -> Iterator[list[ImageDetections]]:
    group = []
    for r in results:
        group.append(r)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _table(r: ImageDetections, category_ids: np.ndarray[Any, Any], schema: pa.Schema) -> pa.Table:
    d = r.detections
    box = [d.box[:, k] for k in range(4)]
    image_id = np.full(len(d.score), r.image_id, np.int64)
    return pa.table([image_id, category_ids[d.category], d.score, *box, r.roi_id.astype(np.int32)], schema=schema)


def _records(table: pa.Table) -> list[bytes]:
    """LVIS results: bbox is x, y, width, height."""
    c = {n: table[n].to_numpy() for n in table.column_names}
    x1, y1, x2, y2 = (c[n].astype(np.float64) for n in ("x1", "y1", "x2", "y2"))
    box = np.stack([x1, y1, x2 - x1, y2 - y1], axis=1).tolist()
    columns = zip(
        c["image_id"].tolist(),
        c["category_id"].tolist(),
        box,
        c["score"].astype(np.float64).tolist(),
        strict=True,
    )
    return [orjson.dumps({"image_id": i, "category_id": k, "bbox": b, "score": s}) for i, k, b, s in columns]


class _JsonList:
    def __init__(self, file: Any) -> None:
        self._file, self._first = file, True

    def add(self, records: list[bytes]) -> None:
        for r in records:
            self._file.write((b"\n" if self._first else b",\n") + r)
            self._first = False


@contextmanager
def _json_list(path: Path) -> Iterator[_JsonList]:
    """A JSON list written record by record."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(b"[")
        yield _JsonList(file)
        file.write(b"\n]\n")
