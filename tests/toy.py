"""A small feature cache with every oddity in it, written by the real writer: no detector, no pictures."""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from calib.cache import Cache, Categories, Classifier, Manifest
from calib.cache.image_rows import ImageRows
from calib.cache.schema import META_SCHEMA, PROPOSAL_BOX, REFINED_BOX, Detector
from calib.cache.write import CacheWriter

MAP = (3, 2, 2)  # channels, height, width


@dataclass(frozen=True)
class Toy:
    """``counts``: training instances per class; a class with 0 has no row.

    Rows: 2 per instance up to ``most``, every other one marked as ground truth; as many background rows; three to
    ignore. The last image has background only. Of a cascade every stage has features of its own, and as many rows.
    """

    counts: tuple[int, ...] = (1500, 200, 40, 12, 5, 2, 0)
    feature_size: int = 8
    images: int = 12
    most: int = 12
    mode: str = "train"
    cosine: bool = False
    activation: str = "softmax"
    maps: bool = False
    stages: int = 1
    average: str = "probabilities"
    seed: int = 0

    def write(self, path: Path) -> Cache:
        """The cache, in two shards of float32."""
        rng = np.random.default_rng(self.seed)
        c, d = len(self.counts), self.feature_size
        centre, classifier = self._centres(rng)
        label = np.concatenate([np.repeat(k, min(2 * n, self.most)) for k, n in enumerate(self.counts)]).astype(
            np.int32
        )
        label = np.concatenate([label, np.full(max(len(label), 6), c), np.full(3, -1)]).astype(np.int32)
        image = rng.integers(0, self.images - 1, len(label))
        extra = np.full(4, c, np.int32)  # background of the last image
        label, image = np.concatenate([label, extra]), np.concatenate([image, np.full(4, self.images - 1)])
        order = np.argsort(image, kind="stable")
        label, image = label[order], image[order]
        x = (centre[label] + rng.normal(size=(len(label), d))).astype(np.float32)
        z = None
        if self.maps:  # features are then what the box head makes of the maps
            z = (x @ rng.normal(size=(d, prod(MAP))) + rng.normal(size=(len(label), prod(MAP)))).astype(np.float32)
            x = _box_head(z, classifier)
        rows = [
            self._image(k, label[image == k], x[image == k], None if z is None else z[image == k], classifier, rng)
            for k in range(self.images)
        ]
        for stage in range(1, self.stages):
            centre, own = self._centres(rng)
            x = (centre[label] + rng.normal(size=(len(label), d))).astype(np.float32)
            later = [
                self._image(k, label[image == k], x[image == k], None, own, rng, stage) for k in range(self.images)
            ]
            rows = [replace(one, next=(*one.next, other)) for one, other in zip(rows, later, strict=True)]
            classifier = replace(classifier, next=(*classifier.next, own))
        return self._commit(path, classifier, rows)

    def _centres(self, rng: np.random.Generator) -> tuple[NDArray[np.float32], Classifier]:
        shape = (len(self.counts) + 1, self.feature_size)
        centre = rng.normal(size=shape).astype(np.float32)
        weight = (0.3 * centre + 0.1 * rng.normal(size=shape)).astype(np.float32)
        return centre, self._classifier(weight, rng)

    def _image(
        self,
        number: int,
        label: NDArray[np.int32],
        x: NDArray[np.float32],
        maps: NDArray[np.float32] | None,
        classifier: Classifier,
        rng: np.random.Generator,
        stage: int = 0,
    ) -> ImageRows:
        n, c = len(label), len(self.counts)
        corner = rng.uniform(0, 60, (n, 2)).astype(np.float32)
        boxes = np.concatenate([corner, corner + rng.uniform(8, 40, (n, 2)).astype(np.float32)], axis=1)
        is_background = (label == c) | (label < 0)
        meta: dict[str, NDArray[Any]] = {
            "image_id": np.full(n, number + 1, np.int64),
            "roi_id": np.arange(n, dtype=np.int32),
            "stage": np.full(n, stage, np.int8),
            "objectness": rng.random(n).astype(np.float32),
            "label": label,
            "max_iou": np.where(is_background, rng.uniform(0, 0.5, n), rng.uniform(0.5, 1, n)).astype(np.float32),
            "gt_id": np.where(is_background, -1, np.arange(n)).astype(np.int64),
            "is_gt": ~is_background & (np.arange(n) % 2 == 0),
        }
        meta |= {name: boxes[:, k] for k, name in enumerate(PROPOSAL_BOX)}
        meta |= {name: boxes[:, k] for k, name in enumerate(REFINED_BOX)}
        sizes = {"height": 100, "width": 100, "net_height": 100, "net_width": 100}
        record = {"image_id": number + 1, **sizes, "neg_category_ids": [], "not_exhaustive_category_ids": []}
        return ImageRows(record, meta, x, classifier.logits(x), maps)

    def _classifier(self, weight: NDArray[np.float32], rng: np.random.Generator) -> Classifier:
        c, d, hidden = len(self.counts), self.feature_size, 6
        bias: NDArray[np.float32] | None = rng.normal(size=c + 1).astype(np.float32)
        scale = np.asarray([10.0], np.float32) if self.cosine else None
        bias = None if self.cosine else bias
        if self.activation == "seesaw":  # an objectness pair in place of the background
            weight = np.concatenate([weight, -weight[-1:]])
            bias = None if bias is None else np.append(bias, np.float32(0))
        if self.activation == "sigmoid":
            weight, bias = weight[:-1], None if bias is None else bias[:-1]
        if not self.maps:
            return Classifier(weight, bias, scale)
        sizes = {"box_weight": (4, d), "box_bias": (4,), "fc1_weight": (hidden, prod(MAP)), "fc1_bias": (hidden,)}
        sizes |= {"fc2_weight": (d, hidden), "fc2_bias": (d,)}
        layers = {k: (0.3 * rng.normal(size=size)).astype(np.float32) for k, size in sizes.items()}
        return Classifier(weight, bias, scale, **layers)

    def _commit(self, path: Path, classifier: Classifier, rows: list[ImageRows]) -> Cache:
        c = len(self.counts)
        counts = np.asarray(self.counts, np.int64)
        ids = 10 * np.arange(1, c + 1)
        names = tuple(f"kind {k}" for k in range(c))
        frequency = tuple("r" if n <= 10 else "c" if n <= 100 else "f" for n in counts)
        categories = Categories(ids, names, counts, np.minimum(counts, 300), frequency)
        detector = Detector("toy", classifier.digest(), c, self.feature_size, activation=self.activation)
        detector = replace(detector, stages=self.stages, average=self.average)
        maps = MAP if self.maps else ()
        manifest = Manifest(self.mode, "float32", "full", detector, {"seed": self.seed}, maps, style="lvis")
        path.parent.mkdir(parents=True, exist_ok=True)
        with CacheWriter.create(path, manifest, categories, classifier) as writer:
            writer.write_annotations(self._annotations(rows, ids))
            half = len(rows) // 2
            writer.commit("00000", rows[:half])
            writer.commit("00001", rows[half:])
            writer.finish()
        return Cache(path)

    def _annotations(self, rows: list[ImageRows], ids: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """One object per foreground row, where the row's box is."""
        meta = {n: np.concatenate([r.meta[n] for r in rows]) for n in META_SCHEMA.names}
        keep = (meta["label"] >= 0) & (meta["label"] < len(ids))
        x1, y1, x2, y2 = (meta[n][keep].astype(np.float64) for n in PROPOSAL_BOX)
        return {
            "id": np.arange(keep.sum()),
            "image_id": meta["image_id"][keep],
            "category_id": ids[meta["label"][keep]],
            "x1": x1,
            "y1": y1,
            "x2": x2,
            "y2": y2,
            "area": (x2 - x1) * (y2 - y1),
            "ignore": np.zeros(keep.sum(), np.bool_),
            "width": x2 - x1,
            "height": y2 - y1,
            "crowd": np.zeros(keep.sum(), np.bool_),
        }


def _box_head(maps: NDArray[np.float32], c: Classifier) -> NDArray[np.float32]:
    """relu(fc2(relu(fc1(map))))."""
    assert c.fc1_weight is not None and c.fc2_weight is not None
    hidden = np.maximum(maps @ c.fc1_weight.T + c.fc1_bias, 0)
    return np.maximum(hidden @ c.fc2_weight.T + c.fc2_bias, 0).astype(np.float32)


def permuted(cache: Cache, order: NDArray[np.integer[Any]]) -> Cache:
    """The same cache with its categories in another order, in memory: new class k is old class ``order[k]``."""
    other = Cache(cache.path)
    k, c = cache.categories, cache.classifier
    other.categories = Categories(
        k.category_id,  # must ascend
        tuple(k.name[i] for i in order),
        k.instance_count[order],
        k.image_count[order],
        tuple(k.frequency[i] for i in order),
    )
    rows = np.append(order, len(order))
    other.classifier = Classifier(c.weight[rows], None if c.bias is None else c.bias[rows], c.scale)
    inverse = np.append(np.argsort(order), [len(order), -1]).astype(np.int32)  # background, ignore (index -1)
    other.labels = inverse[cache.labels]
    table = cache.annotations()
    moved = k.category_id[inverse[k.index_of(table["category_id"].to_numpy())]]
    other.annotations = lambda: table.set_column(2, "category_id", pa.array(moved))  # type: ignore[method-assign]
    return other
