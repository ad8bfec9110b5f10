"""Scoring of LVIS-sized images: 1,000 proposals x 1,024 numbers (float16) -> 1,203 classes, one thread.

    python benchmarks/scoring.py [--images 64] [--rounds 7] [--quick] [--json FILE]

CPU milliseconds, alternating in one process, median (range) over rounds:

(a) the 300 best scores of an image: calib's ``best_scores``, a flat ``torch.topk``, threshold with nonzero and sort;
(b) detections: calib's lazy NMS, and torchvision's threshold, ``batched_nms`` over everything, the first 300;
(c) an image from the cache to detections, by stage: reading, matrix product with softmax, detection;
(d) six heads in one pass over a cache against six passes, files included.

Every answer is compared before it is timed: (a) and (b) are equal to the bit, order included; (d) writes equal files.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from _serving_work import CLASSES, FEATURE_SIZE, NMS, ROWS, TOPK, Work
from numpy.typing import NDArray

from calib.artifact import Artifact, load
from calib.cache import Cache, Categories, Classifier, Manifest
from calib.cache.schema import META_SCHEMA, PROPOSAL_BOX, REFINED_BOX, Detector
from calib.cache.write import CacheWriter, ImageRows
from calib.score import Scorer
from calib.score.detect import best_scores, detect
from calib.score.detections import Output, write_detections

HEADS = 6
Timed = dict[str, Callable[[], object]]


def alternate(work: Timed, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of each, one after the other in every round, after one that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            begun = time.process_time()
            run()
            if number:
                taken[name].append(1000 * (time.process_time() - begun))
    return taken


def spread(values: list[float]) -> list[float]:
    """Median, least, most."""
    return [round(v, 3) for v in (median(values), min(values), max(values))]


def flat_top(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """The best by one search through all scores."""
    return torch.from_numpy(scores).flatten().topk(TOPK).indices.numpy()


def thresholded_top(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """The best as detectors find them: what is above the threshold, sorted."""
    flat = torch.from_numpy(scores).flatten()
    at = (flat > NMS.score_threshold).nonzero()[:, 0]
    return at[flat[at].argsort(descending=True, stable=True)[:TOPK]].numpy()


def everything_suppressed(scores: NDArray[np.float32], boxes: NDArray[np.float32]) -> tuple[Any, Any]:
    """Detections as torchvision's detectors find them: rows and categories."""
    from torchvision.ops import batched_nms

    row, category = (torch.from_numpy(scores) > NMS.score_threshold).nonzero(as_tuple=True)
    flat = torch.from_numpy(scores)[row, category]
    kept = batched_nms(torch.from_numpy(boxes)[row], flat, category, NMS.nms_iou)[: NMS.max_detections]
    return row[kept].numpy(), category[kept].numpy()


def made_up_cache(folder: Path, work: Work, images: int) -> Cache:
    """A cache of test mode whose images hold the same proposals in other orders."""
    classifier = Classifier(work.weight, work.bias)
    counts = np.maximum(1, (20_000 / np.arange(1, CLASSES + 1)).astype(np.int64))
    ids = np.arange(1, CLASSES + 1)
    categories = Categories(ids, tuple(map(str, ids)), counts, np.minimum(counts, 2000), ("f",) * CLASSES)
    detector = Detector("made-up", classifier.digest(), CLASSES, FEATURE_SIZE)
    with CacheWriter.create(
        folder, Manifest("test", "float16", "none", detector, {}), categories, classifier
    ) as writer:
        for shard in range(0, images, 16):
            writer.commit(f"{shard:05d}", [_image(work, i) for i in range(shard, min(shard + 16, images))])
        writer.finish()
    return Cache(folder)


def _image(work: Work, number: int) -> ImageRows:
    order = np.random.default_rng(number).permutation(ROWS)
    meta: dict[str, Any] = {n: np.zeros(ROWS, META_SCHEMA.field(n).type.to_pandas_dtype()) for n in META_SCHEMA.names}
    meta |= {"image_id": np.full(ROWS, number), "roi_id": np.arange(ROWS, dtype=np.int32)}
    for names in (PROPOSAL_BOX, REFINED_BOX):
        meta |= {name: work.boxes[order, k] for k, name in enumerate(names)}
    image = {"image_id": number, "height": 800, "width": 1333, "net_height": 800, "net_width": 1333}
    image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    return ImageRows(image, meta, work.features[order].astype(np.float32), np.zeros((ROWS, CLASSES + 1), np.float32))


def of_one_image(work: Work, rounds: int) -> dict[str, dict[str, list[float]]]:
    """(a) and (b)."""
    scores = np.ascontiguousarray(work.scores)
    best = best_scores(scores, TOPK, NMS.score_threshold)[:TOPK]
    assert np.array_equal(scores.ravel()[best], scores.ravel()[flat_top(scores)])
    assert np.array_equal(best, thresholded_top(scores))
    found = detect(scores, work.boxes, NMS)
    rows, categories = everything_suppressed(scores, work.boxes)
    assert np.array_equal(found.row, rows) and np.array_equal(found.category, categories)
    top: Timed = {
        "calib": lambda: best_scores(scores, TOPK, NMS.score_threshold),
        "flat topk": lambda: flat_top(scores),
        "threshold, nonzero, sort": lambda: thresholded_top(scores),
    }
    detections: Timed = {
        "calib": lambda: detect(scores, work.boxes, NMS),
        "torchvision": lambda: everything_suppressed(scores, work.boxes),
    }
    return {"top 300": alternate(top, 5 * rounds), "detections": alternate(detections, rounds)}


def of_a_cache(cache: Cache, work: Work, rounds: int) -> dict[str, list[float]]:
    """(c) per image."""
    scorer, count, rng = Scorer(cache), len(cache.images), np.random.default_rng(0)
    x = torch.from_numpy(cache.features.read(0, ROWS))
    scores = np.ascontiguousarray(work.scores)

    def read() -> None:
        start = ROWS * int(rng.integers(count))
        cache.features.read(start, start + ROWS)

    def product() -> None:
        with torch.inference_mode():
            work.head.scores(x)

    stages: Timed = {
        "whole image": lambda: scorer.image(int(rng.integers(count)), [(work.head, NMS)]),
        "reading": read,
        "product and softmax": product,
        "detection": lambda: detect(scores, work.boxes, NMS),
    }
    return alternate(stages, 5 * rounds)


def in_one_pass(cache: Cache, folder: Path, rounds: int) -> dict[str, list[float]]:
    """(d) CPU milliseconds per image and head."""
    artifact: Artifact = load(folder / "models" / "head" / "1")
    outputs = [Output(artifact, NMS, folder / f"{k}.parquet") for k in range(HEADS)]

    def apart() -> None:
        for output in outputs:
            write_detections(cache, [output])

    apart()
    alone = [output.parquet.read_bytes() for output in outputs]
    write_detections(cache, outputs)
    assert alone == [output.parquet.read_bytes() for output in outputs]
    work: Timed = {"one pass": lambda: write_detections(cache, outputs), "six passes": apart}
    per_head = len(cache.images) * HEADS
    return {name: [v / per_head for v in values] for name, values in alternate(work, rounds).items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round of four images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all metrics")
    options = parser.parse_args()
    images, rounds = (4, 1) if options.quick else (options.images, options.rounds)
    torch.set_num_threads(1)
    work = Work.made_up()
    with tempfile.TemporaryDirectory() as name:
        work.save(Path(name))
        cache = made_up_cache(Path(name) / "cache", work, images)
        tables = of_one_image(work, rounds)
        tables["one image from the cache"] = of_a_cache(cache, work, rounds)
        tables["an image and head of six heads"] = in_one_pass(cache, Path(name), max(1, rounds // 2))
    metrics = {title: {k: spread(v) for k, v in rows.items()} for title, rows in tables.items()}
    for title, rows in metrics.items():
        first = next(iter(rows.values()))[0]
        print(f"\n{title}, CPU ms")
        for what, (middle, low, high) in rows.items():
            print(f"  {what:26} {middle:8.2f} ({low:.2f}-{high:.2f})   {middle / first:5.2f} x")
    if options.json:
        options.json.write_text(json.dumps(metrics))


if __name__ == "__main__":
    main()
