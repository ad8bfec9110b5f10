"""A split with the statistics of LVIS v1 val, and detections for it, for timing evaluators.

Per category as many images and instances per image as the counts of LVIS v1 train say, scaled to the number of images
(the whole val split has 19,809 images, 3.6 categories and 12.7 objects per image); four further categories per image
are known to be absent, one image in five has a category that is not exhaustively annotated. Detections: 300 per image,
for each object up to four boxes around it, most of the right category, the rest boxes anywhere of likely categories.
Scores are random with a margin for good boxes. A second head is the same boxes and categories with other scores.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.data.resources import shipped

TRAIN_IMAGES = 100_170
VAL_IMAGES = 19_809
SIDE = (480, 640)


@dataclass(frozen=True)
class Split:
    """Ground truth as an LVIS document, and N detections as arrays (boxes are corners, float32)."""

    document: dict[str, Any]
    image_id: NDArray[np.int64]  # [N]
    category_id: NDArray[np.int64]  # [N]
    corners: NDArray[np.float32]  # [N, 4]
    score: NDArray[np.float32]  # [N]


def simulate(n_images: int, *, per_image: int = 300, seed: int = 0) -> Split:
    """The split and its detections, 300 per image unless said otherwise."""
    rng = np.random.default_rng(seed)
    instances, images = _train_counts()
    image, category = _objects(rng, n_images, instances, images)
    box = _boxes(rng, len(image))
    document = _document(rng, n_images, image, category, box, instances, images)
    likely = np.sqrt(images) / np.sqrt(images).sum()
    rows = [_around(rng, image, category, box, likely), _anywhere(rng, n_images, per_image, likely)]
    where, what, xywh, score = (np.concatenate([r[k] for r in rows]) for k in range(4))
    order = np.lexsort((rng.random(len(where)), where))
    rank = np.arange(len(order)) - np.searchsorted(where[order], where[order])
    # The boxes around objects come first: they are dropped only where there are too many of them.
    by_kind = np.lexsort((np.arange(len(where)), where))
    keep = np.sort(by_kind[rank < per_image])
    keep = keep[np.argsort(where[keep], kind="stable")]
    corners = np.concatenate([xywh[keep, :2], xywh[keep, :2] + xywh[keep, 2:]], axis=1)
    return Split(document, where[keep] + 1, what[keep] + 1, corners.astype(np.float32), score[keep].astype(np.float32))


def simulate_document(n_images: int, *, seed: int = 0) -> dict[str, Any]:
    """The ground truth of ``simulate`` alone."""
    rng = np.random.default_rng(seed)
    counts = _train_counts()
    image, category = _objects(rng, n_images, *counts)
    return _document(rng, n_images, image, category, _boxes(rng, len(image)), *counts)


def _train_counts() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Instances and images of every category in LVIS v1 train."""
    with np.load(shipped("lvis_counts.npz")) as counts:
        return counts["v1_instance_count"].astype(float), counts["v1_image_count"].astype(float)


def another_head(split: Split, seed: int) -> NDArray[np.float32]:
    """Scores of another head for the same boxes and categories, [N]."""
    noise = np.random.default_rng(seed).normal(0, 0.1, len(split.score))
    return np.clip(split.score + noise, 1e-4, 1).astype(np.float32)


def _objects(
    rng: np.random.Generator, n_images: int, instances: NDArray[np.float64], images: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Image index and category index of every object."""
    expected = images * n_images / TRAIN_IMAGES
    n = np.floor(expected + rng.random(len(images))).astype(int)
    image = np.concatenate([rng.choice(n_images, min(k, n_images), replace=False) for k in n])
    category = np.repeat(np.arange(len(n)), np.minimum(n, n_images))
    each = rng.geometric(np.minimum(1.0, images / np.maximum(instances, 1))[category])
    return np.repeat(image, each), np.repeat(category, each)


def _boxes(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """x, y, width, height inside the image, as small as objects of LVIS are (a third below 32 x 32). [n, 4]"""
    side = np.exp(rng.normal(3.6, 1.0, (n, 1)) + rng.normal(0, 0.3, (n, 2)))
    side = np.clip(side, 4, np.array(SIDE[::-1]) - 1)
    corner = rng.random((n, 2)) * (np.array(SIDE[::-1]) - side)
    return np.round(np.concatenate([corner, side], axis=1), 2)


def _document(
    rng: np.random.Generator,
    n_images: int,
    image: NDArray[np.int64],
    category: NDArray[np.int64],
    box: NDArray[np.float64],
    instances: NDArray[np.float64],
    images: NDArray[np.float64],
) -> dict[str, Any]:
    positive: list[set[int]] = [set() for _ in range(n_images)]
    for i, c in zip(image.tolist(), category.tolist(), strict=True):
        positive[i].add(c)
    records = []
    for i, known in enumerate(positive):
        absent = [c for c in rng.choice(len(images), 4, p=images / images.sum()).tolist() if c not in known]
        unfinished = [min(known) + 1] if known and rng.random() < 0.2 else []
        records.append(
            {
                "id": i + 1,
                "height": SIDE[0],
                "width": SIDE[1],
                "neg_category_ids": sorted({c + 1 for c in absent}),
                "not_exhaustive_category_ids": unfinished,
            }
        )
    area = np.round(box[:, 2] * box[:, 3] * rng.uniform(0.4, 1.0, len(box)), 2)
    annotations = [
        {"id": k + 1, "image_id": i + 1, "category_id": c + 1, "bbox": b, "area": a}
        for k, (i, c, b, a) in enumerate(
            zip(image.tolist(), category.tolist(), box.tolist(), area.tolist(), strict=True)
        )
    ]
    categories = [
        {
            "id": c + 1,
            "name": f"category {c + 1}",
            "frequency": "r" if images[c] <= 10 else "c" if images[c] <= 100 else "f",
            "instance_count": int(instances[c]),
            "image_count": int(images[c]),
        }
        for c in range(len(images))
    ]
    return {"images": records, "categories": categories, "annotations": annotations}


Rows = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]


def _around(
    rng: np.random.Generator,
    image: NDArray[np.int64],
    category: NDArray[np.int64],
    box: NDArray[np.float64],
    likely: NDArray[np.float64],
) -> Rows:
    """Zero to four boxes around every object; one in four is taken for another category."""
    which = np.repeat(np.arange(len(image)), rng.integers(0, 5, len(image)))
    jitter = rng.normal(0, 0.12, (len(which), 4))
    size = box[which, 2:] * np.exp(jitter[:, 2:])
    corner = box[which, :2] + jitter[:, :2] * box[which, 2:]
    what = np.where(rng.random(len(which)) < 0.25, rng.choice(len(likely), len(which), p=likely), category[which])
    score = np.clip(rng.beta(2, 3, len(which)) - np.abs(jitter).sum(1) / 4, 1e-4, 1)
    return image[which], what, np.concatenate([corner, size], axis=1), score


def _anywhere(rng: np.random.Generator, n_images: int, per_image: int, likely: NDArray[np.float64]) -> Rows:
    n = n_images * per_image
    what = rng.choice(len(likely), n, p=likely)
    return np.repeat(np.arange(n_images), per_image), what, _boxes(rng, n), np.clip(rng.beta(1, 12, n), 1e-4, 1)
