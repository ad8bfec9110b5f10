"""Pictures with what every head finds on them, chosen where the best head differs from the baseline.

Of each head the k best detections of a picture are shown, k its number of annotated objects: heads differ in the scale
of their scores, so no one threshold would be fair. Two thirds of the pictures are those in which the best head names
most more rare objects rightly among these than the baseline, the others those in which it loses most.
"""

import base64
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image as PillowImage

from calib.extract.dataset import Dataset
from calib.extract.pictures import read_image

from .runs import Runs

LONGEST_SIDE, QUALITY = 560, 80
_COLUMNS = ["image_id", "category_id", "score", "x", "y", "width", "height", "rank", "kind", "annotation_id"]


def examples(
    runs: Runs, annotations: Path, images: Path, wanted: int, baseline: int, best: int
) -> list[dict[str, Any]]:
    """``wanted`` pictures with objects and detections as plain values; boxes are [x, y, width, height] in [0, 1].

    Raises:
        InputError: annotations or pictures are missing, damaged, or of another split.
    """
    names = runs.names
    if not {names[baseline], names[best]} <= set(runs.matches):
        return []
    dataset = Dataset.read(annotations)
    counted = dataset.annotations["image_id"][~dataset.left_out]
    n_objects = Counter(counted.tolist())
    shown = {name: _shown(path, n_objects) for name, path in runs.matches.items()}
    after = shown[names[best]]
    before = after.slice(0, 0) if best == baseline else shown[names[baseline]]  # a head alone: what it finds
    chosen = _choose(runs, before, after, wanted)
    records = {int(r["id"]): r for r in dataset.images}
    return [_picture(runs, dataset, records[i], images, shown) for i in chosen]


def _shown(path: Path, n_objects: Counter[int]) -> pa.Table:
    """The k best detections of every picture."""
    most = max(n_objects.values(), default=0)
    table = pq.read_table(path, columns=_COLUMNS, filters=[("rank", "<=", most)])
    k = np.array([n_objects[i] for i in table["image_id"].to_pylist()], np.int64)
    return table.filter(pa.array(table["rank"].to_numpy() <= k))


def _choose(runs: Runs, before: pa.Table, after: pa.Table, wanted: int) -> list[int]:
    """Ids of the pictures with most gained, then of those with most lost; rare objects count before others."""
    table = runs.categories
    if runs.bin_of is not None:
        rare = runs.bin_of == runs.bin_of.min()
    else:
        rare = np.array([f == "r" for f in table["frequency"].to_pylist()], np.bool_)
    is_rare = dict(zip(table["category_id"].to_pylist(), rare.tolist(), strict=True))
    gain: Counter[int] = Counter()
    for found, sign in ((before, -1), (after, 1)):
        right = found.filter(pa.compute.equal(found["kind"], "true"))
        for image, category in zip(right["image_id"].to_pylist(), right["category_id"].to_pylist(), strict=True):
            gain[image] += sign * (100 if is_rare.get(category, False) else 1)
    order = sorted(gain, key=lambda i: (-gain[i], i))
    gained = [i for i in order if gain[i] > 0]
    lost = [i for i in order[::-1] if gain[i] < 0]
    n_lost = min(len(lost), max(wanted // 3, wanted - len(gained)))
    return gained[: wanted - n_lost] + lost[:n_lost]


def _picture(
    runs: Runs, dataset: Dataset, record: dict[str, Any], folder: Path, shown: dict[str, pa.Table]
) -> dict[str, Any]:
    pixels = read_image(record, folder)
    height, width = pixels.shape[:2]
    size = np.array([width, height, width, height])
    picture = PillowImage.fromarray(pixels)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    coded = io.BytesIO()
    picture.save(coded, "WEBP", quality=QUALITY)
    index = {c: i for i, c in enumerate(runs.categories["category_id"].to_pylist())}
    a = dataset.annotations
    rows = np.flatnonzero((a["image_id"] == int(record["id"])) & ~dataset.left_out)
    corners = np.stack([a[k][rows] for k in ("x1", "y1", "x2", "y2")], axis=1)
    corners[:, 2:] -= corners[:, :2]
    objects = [
        {"id": int(a["id"][r]), "category": index.get(int(a["category_id"][r])), "box": _box(box, size)}
        for r, box in zip(rows, corners, strict=True)
    ]
    found: list[list[dict[str, Any]] | None] = []
    for name in runs.names:
        if name not in shown:
            found.append(None)
            continue
        table = shown[name]
        here = table.filter(pa.compute.equal(table["image_id"], int(record["id"]))).sort_by("rank").to_pylist()
        found.append(
            [
                {
                    "category": index.get(d["category_id"]),
                    "kind": d["kind"],
                    "score": round(d["score"], 4),
                    "object": d["annotation_id"] if d["kind"] == "true" else None,
                    "box": _box(np.array([d[k] for k in ("x", "y", "width", "height")]), size),
                }
                for d in here
            ]
        )
    return {
        "id": int(record["id"]),
        "width": width,
        "height": height,
        "uri": "data:image/webp;base64," + base64.b64encode(coded.getvalue()).decode(),
        "objects": objects,
        "found": found,
    }


def _box(box: NDArray[Any], size: NDArray[Any]) -> list[float]:
    return [round(float(v), 4) for v in box / size]
