"""Masks for detections: the detector's own mask branch, run on boxes that a head has rescored.

He et al., Mask R-CNN, ICCV 2017, Sec. 3: at inference the mask branch works on the detections, whatever scored them.
Masks are written as LVIS results json with compressed run lengths, which ``calib evaluate --iou-type segm`` reads.
Finished pieces wait beside the file, so that an interrupted run goes on. Letters: K detections of one image.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from calib.annotations import boxes_outside
from calib.boxes import clip
from calib.errors import ExistsError, InputError, UnsupportedError
from calib.evaluate import Detections
from calib.extract.adapter import Adapter, MaskBranch
from calib.extract.classes import in_class_order
from calib.extract.dataset import Dataset
from calib.extract.pictures import image_path, read_image
from calib.files import is_calib_folder, replacing
from calib.lookup import positions
from calib.parallel.pieces import Pieces
from calib.progress import Progress, silent

IMAGES_PER_PIECE = 16


def run_length(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """[height, width] -> compressed run lengths as JSON has them."""
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(n) for n in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


@dataclass(frozen=True)
class MaskRun:
    """``detections``: of ``calib score``; ``out``: results json to write."""

    adapter: Adapter
    dataset: Dataset
    images: Path
    detections: Path
    out: Path

    def pieces(self) -> Pieces:
        """Where finished pieces wait for the others."""
        weights = xxhash.xxh3_64()
        for name, tensor in self.adapter.model.state_dict().items():
            weights.update(name.encode())
            weights.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
        request = {
            "detector": weights.hexdigest(),
            "annotations": self.dataset.digest(),
            "detections": xxhash.xxh3_64(self.detections.read_bytes()).hexdigest(),
            "images_per_piece": IMAGES_PER_PIECE,
        }
        return Pieces(self.out, request, -(-len(self.dataset.images) // IMAGES_PER_PIECE), ".jsonl")


def write_masks(run: MaskRun, *, progress: Progress = silent, tell: Callable[[str], Any] = str) -> int:
    """Write a mask for every detection, in the order of images; returns their number. ``tell`` takes what is odd.

    Raises:
        UnsupportedError: the detector makes no masks. ShapeError: the data set has other categories than the detector.
            InputError: detections of images or categories that the data set does not list. ExistsError: another
            process writes the file, or it would lie in a head or cache. FormatError, MissingFileError: detections or
            pictures.
    """
    if any(is_calib_folder(parent) for parent in run.out.resolve().parents):
        raise ExistsError(f"{run.out} lies inside a head or a cache", hint="name a file outside it")
    branch = run.adapter.mask_branch
    if branch is None:
        raise UnsupportedError(
            f"{run.adapter.detector.source} has no mask branch that calib knows",
            hint="masks are made by Mask R-CNN and its cascades, unchanged, of torchvision, detectron2 and mmdet",
        )
    run = replace(run, dataset=in_class_order(run.adapter, run.dataset))
    found = _Found.of(Detections.read(run.detections), run.dataset, run.detections)
    for notice in found.notices(run.dataset):
        tell(f"note: {run.detections}: {notice}")
    image_path(run.dataset.images[0], run.images)  # a wrong folder is noticed before anything is begun
    records = run.dataset.images
    pieces = run.pieces()
    with pieces.held():
        todo = {k: records[k * IMAGES_PER_PIECE : (k + 1) * IMAGES_PER_PIECE] for k in pieces.missing()}
        with progress("masks", total=len(records), unit="images") as bar:
            bar.advance(len(records) - sum(map(len, todo.values())))
            for number, part in todo.items():
                with pieces.written(number) as temporary, open(temporary, "wb") as file:
                    for record in part:
                        file.writelines(_rows(branch, found, record, run.images))
                        bar.advance()
        count = _join(pieces.all(), run.out)
        pieces.remove()
    return count


@dataclass(frozen=True)
class _Found:
    """Detections, their categories as class indices, and the rows of every image."""

    detections: Detections
    category: NDArray[np.int64]
    rows: dict[int, NDArray[np.int64]]

    @classmethod
    def of(cls, d: Detections, dataset: Dataset, path: Path) -> "_Found":
        for what, given, known in (
            ("image", d.image_id, np.asarray([r["id"] for r in dataset.images], np.int64)),
            ("category", d.category_id, dataset.categories.category_id),
        ):
            strange = ~np.isin(given, known)
            if strange.any():
                raise InputError(
                    f"{path}: {what} {given[np.argmax(strange)]} is not in {dataset.annotations_file}",
                    hint="detections of another split or data set?",
                )
        turned = (d.box[:, 2:] < 0).any(axis=1)
        if turned.any():
            i = int(np.argmax(turned))
            raise InputError(f"{path}: the box of detection {i} has a negative side: {d.box[i].tolist()}")
        order = np.argsort(d.image_id, kind="stable")
        ids, starts = np.unique(d.image_id[order], return_index=True)
        rows = dict(zip(ids.tolist(), np.split(order, starts[1:]), strict=True)) if len(ids) else {}
        return cls(d, dataset.categories.index_of(d.category_id), rows)

    def notices(self, dataset: Dataset) -> tuple[str, ...]:
        """What is odd about the boxes."""
        ids = np.asarray([r["id"] for r in dataset.images], np.int64)
        size = np.asarray([(r["height"] or 0, r["width"] or 0) for r in dataset.images], np.int64)
        d = self.detections
        return boxes_outside(d.box, positions(ids, d.image_id), size, "boxes") if len(ids) else ()


def _rows(branch: MaskBranch, found: _Found, record: dict[str, Any], images: Path) -> Iterator[bytes]:
    """JSON lines of one image."""
    rows = found.rows.get(int(record["id"]))
    if rows is None:
        return
    d, box, picture = found.detections, found.detections.box[rows], read_image(record, images)
    corners = np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1).astype(np.float32)
    masks = branch(picture, clip(corners, *picture.shape[:2]), found.category[rows])
    for row, own, mask in zip(rows.tolist(), box.tolist(), masks, strict=True):
        plain = {"image_id": int(record["id"]), "category_id": int(d.category_id[row]), "bbox": own}
        yield orjson.dumps(plain | {"score": float(d.score[row]), "segmentation": run_length(mask)}) + b"\n"


def _join(pieces: list[Path], out: Path) -> int:
    """Lines of all pieces as one JSON list."""
    count = 0
    with replacing(out) as temporary, open(temporary, "wb") as file:
        file.write(b"[")
        for piece in pieces:
            with open(piece, "rb") as lines:
                for line in lines:
                    file.write((b",\n" if count else b"\n") + line.rstrip(b"\n"))
                    count += 1
        file.write(b"\n]\n")
    return count
