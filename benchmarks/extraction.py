"""Does the feature cache hold what the detector computed, and what does writing it cost?

Four questions, answered with the shipped detector (or another one of the same file format) on the val split of a set:

(a) Do cached features times the cached classifier give the cached logits?
(b) Does the unchanged head, scored from a float16 cache, reach the detector's own AP?
(c) Does a float32 cache give the detector's own detections, bit for bit and in order?
(d) How fast is extraction beside the bare detector, and how large is a row? Overhead is the time, wall and CPU of all
    threads, above that of the bare forward pass from pictures in memory up to the classifier; extraction also reads
    and decodes the pictures, labels, converts, checks and writes durably.

    python benchmarks/extraction.py                        renders its own pictures
    python benchmarks/extraction.py --set demo/data        uses a set of calib data shapes
    python benchmarks/extraction.py --quick                a few pictures
    python benchmarks/extraction.py --large 8              (d) only, of an untrained Faster R-CNN R50-FPN with 1,203
                                                           classes on 8 pictures of 800 x 800

A table goes to stderr, one JSON object to stdout. Speeds are taken in alternation and given as median, least and most.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from calib.cache import Cache
from calib.data.plan import ShapesSettings
from calib.data.resources import shipped
from calib.data.shapes import build
from calib.evaluate import Detections as Results
from calib.evaluate import GroundTruth, evaluate
from calib.extract.dataset import Dataset
from calib.extract.extraction import extract
from calib.extract.options import Extraction
from calib.extract.pictures import read_image
from calib.extract.staging import to_device
from calib.extract.torchvision import TorchvisionAdapter, open_detector
from calib.heads.detector import detector_head
from calib.score import ImageDetections, detector_nms, score
from calib.score.detect import Detections

BATCH = 8


def reproduction(cache: Cache) -> dict[str, float]:
    """(a) features x classifier against the logits that the cache holds, over all rows."""
    assert cache.logits is not None
    worst, largest = 0.0, 0.0
    for start in range(0, cache.n_rows, 4096):
        stop = min(start + 4096, cache.n_rows)
        stored = cache.logits.read(start, stop)
        again = cache.classifier.logits(cache.features.read(start, stop))
        worst = max(worst, float(np.abs(again - stored).max()))
        largest = max(largest, float(np.abs(stored).max()))
    return {"max_abs_difference": worst, "max_abs_logit": largest, "rows": cache.n_rows}


def bare_detections(model: Any, pixels: list[NDArray[np.uint8]], batch: int = BATCH) -> list[Detections]:
    """The unmodified torchvision model with its own postprocessing; ``row`` is unknown to it and stays 0."""
    found = []
    for start in range(0, len(pixels), batch):
        with torch.no_grad():
            outputs = model([_tensor(p) for p in pixels[start : start + batch]])
        for out in outputs:
            category = out["labels"].numpy() - 1  # torchvision's background is 0
            row = np.zeros(len(category), np.int64)
            found.append(Detections(row, category, out["scores"].numpy(), out["boxes"].numpy()))
    return found


def _tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)


def cached_detections(cache: Cache) -> list[Detections]:
    """The unchanged head over the cache, with the detector's own thresholds."""
    return [found.detections for found in _scored(cache)]


def _scored(cache: Cache) -> list[ImageDetections]:
    return list(score(cache, detector_head(cache), detector_nms(cache)))


def differences(ours: list[Detections], theirs: list[Detections]) -> dict[str, float]:
    """(c) On how many images both lists are the same numbers in the same order (or another among equal scores)."""
    same = [_equal(a, b) for a, b in zip(ours, theirs, strict=True)]
    alike = [_equal(_canonical(a), _canonical(b)) for a, b in zip(ours, theirs, strict=True)]
    return {
        "images": len(same),
        "identical_images": sum(same),
        "identical_but_for_order_of_equal_scores": sum(alike),
        "detections": sum(len(d.score) for d in theirs),
    }


def _equal(a: Detections, b: Detections) -> bool:
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("category", "score", "box"))


def _canonical(d: Detections) -> Detections:
    order = np.lexsort((*d.box.T, d.category, -d.score))
    return Detections(d.row[order], d.category[order], d.score[order], d.box[order])


def average_precision(truth: GroundTruth, dataset: Dataset, found: list[Detections]) -> dict[str, float]:
    """(b) LVIS AP and its bins, in percent."""
    images = np.repeat([int(r["id"]) for r in dataset.images], [len(d.score) for d in found])
    categories = dataset.categories.category_id[np.concatenate([d.category for d in found])]
    scores, boxes = (np.concatenate([getattr(d, n) for d in found]) for n in ("score", "box"))
    summary = evaluate(truth, Results.from_arrays(images, categories, scores, boxes)).summary()
    return {k: 100 * float(v) for k, v in summary.items() if k.startswith("AP") and v >= 0}


def speeds(runs: dict[str, Callable[[], None]], images: int, repeats: int) -> dict[str, Any]:
    """(d) Images per second of every run, taken in turn ``repeats`` times after one untimed round, and the time of
    each above that of the first within a round."""
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter(), time.process_time()
            run()
            if round_ > 0:
                wall[name].append(time.perf_counter() - start[0])
                cpu[name].append(time.process_time() - start[1])
    first, *others = runs
    return {
        "images_per_second": {n: spread([images / t for t in v]) for n, v in wall.items()},
        "overhead_percent": {
            f"{n}, {kind}": spread([100 * (t / b - 1) for t, b in zip(taken[n], taken[first], strict=True)])
            for n in others
            for kind, taken in (("wall", wall), ("CPU", cpu))
            if n.startswith("extract")
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": float(np.median(values)), "least": min(values), "most": max(values)}


def first_images(annotations: Path, count: int | None, out: Path) -> Path:
    """A json with the first ``count`` images of ``annotations`` and what belongs to them."""
    data = json.loads(annotations.read_bytes())
    images = sorted(data["images"], key=lambda r: r["id"])[:count]
    ids = {r["id"] for r in images}
    kept = [a for a in data["annotations"] if a["image_id"] in ids]
    out.write_text(json.dumps({**data, "images": images, "annotations": kept}))
    return out


class Proof:
    """One detector, one split, and the caches that are made of it in ``work``."""

    def __init__(self, annotations: Path, images: Path, detector: Path, work: Path) -> None:
        self.dataset = Dataset.read(annotations)
        self.truth = GroundTruth.read(annotations)
        self.folder, self.work = images, work
        self.adapter: TorchvisionAdapter = open_detector(str(detector), torch.device("cpu"))
        self.pixels = [read_image(r, images) for r in self.dataset.images]
        self._runs = 0

    def cache(self, mode: str, dtype: str) -> Cache:
        """A fresh cache."""
        self._runs += 1
        out = self.work / f"{mode}-{dtype}-{self._runs}"
        extract(self.adapter, self.dataset, self.folder, out, Extraction(mode, dtype, batch_size=BATCH))
        return Cache(out)

    def exactness(self) -> dict[str, Any]:
        """(a), (b), (c) and the bytes per row of (d)."""
        caches = {dtype: self.cache("test", dtype) for dtype in ("float32", "float16")}
        bare = bare_detections(self.adapter.model, self.pixels)
        own = average_precision(self.truth, self.dataset, bare)
        half = average_precision(self.truth, self.dataset, cached_detections(caches["float16"]))
        return {
            "reproduction": {dtype: reproduction(cache) for dtype, cache in caches.items()},
            "ap": {
                "detector": own,
                "float16_cache": half,
                "largest_difference_points": max(abs(own[k] - half[k]) for k in own),
                "difference_points": half["AP"] - own["AP"],
            },
            "detections": differences(cached_detections(caches["float32"]), bare),
            "bytes_per_row": {dtype: _bytes(cache) / cache.n_rows for dtype, cache in caches.items()},
        }

    def speed(self, repeats: int) -> dict[str, Any]:
        """Images per second of the bare detector and of extraction."""
        return timed(self.adapter, self.dataset, self.folder, self.pixels, self.work, repeats)


def timed(
    adapter: TorchvisionAdapter,
    dataset: Dataset,
    folder: Path,
    pixels: list[NDArray[np.uint8]],
    work: Path,
    repeats: int,
    batch: int = BATCH,
) -> dict[str, Any]:
    """(d): the detector alone, and extraction of the same pictures."""
    numbers = count()

    def to_classifier() -> None:
        for start in range(0, len(pixels), batch):
            adapter.launch(pixels[start : start + batch])
        if adapter.device.type == "cuda":
            torch.cuda.synchronize()

    def extracted(mode: str) -> None:
        extract(adapter, dataset, folder, work / f"speed-{next(numbers)}", Extraction(mode, batch_size=batch))

    runs: dict[str, Callable[[], None]] = {
        "detector up to its classifier": to_classifier,
        "extract test float16": lambda: extracted("test"),
        "detector": lambda: _whole(adapter, pixels, batch),
        "extract train float16": lambda: extracted("train"),
    }
    return speeds(runs, len(pixels), repeats)


def _whole(adapter: TorchvisionAdapter, pixels: list[NDArray[np.uint8]], batch: int) -> None:
    with torch.no_grad():
        for start in range(0, len(pixels), batch):
            adapter.model([to_device(p, adapter.device) for p in pixels[start : start + batch]])


def large(images: int, size: int, device: torch.device, work: Path, kind: str = "fasterrcnn_resnet50_fpn") -> Any:
    """An untrained detector with the classes of LVIS, and noise to look at: adapter, data set, folder, pictures."""
    from torchvision.models import detection

    torch.manual_seed(0)
    model = getattr(detection, kind)(weights=None, weights_backbone=None, num_classes=1204, min_size=size)
    rng = np.random.default_rng(0)
    (work / "images").mkdir(parents=True)
    records, annotations = [], []
    for i in range(1, images + 1):
        small = Image.fromarray(rng.integers(0, 256, (size // 16, size // 16, 3), np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(work / "images" / f"{i}.jpg")
        records.append({"id": i, "file_name": f"{i}.jpg", "height": size, "width": size})
        annotations.append({"id": i, "image_id": i, "category_id": i, "bbox": [40, 40, 200, 300], "area": 60_000})
    categories = [{"id": c, "name": str(c)} for c in range(1, 1204)]
    document = {"images": records, "annotations": annotations, "categories": categories}
    (work / "large.json").write_text(json.dumps(document))
    dataset = Dataset.read(work / "large.json")
    pixels = [read_image(r, work / "images") for r in dataset.images]
    return TorchvisionAdapter(model, "untrained", device), dataset, work / "images", pixels


def _bytes(cache: Cache) -> int:
    return sum(f["bytes"] for s in cache.manifest.shards for f in s.files.values())


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run everything; returns what is printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", type=Path, help="folder with val.json and images/ (default: rendered anew)")
    parser.add_argument("--images", type=int, help="use only the first of them")
    parser.add_argument("--detector", type=Path, default=shipped("shapes_detector.safetensors"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--quick", action="store_true", help="24 images, one round")
    parser.add_argument("--large", type=int, metavar="N", help="(d) of an untrained R50-FPN at 800 pixels")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if given.large:
            adapter, dataset, pictures, pixels = large(given.large, 800, torch.device("cpu"), work)
            metrics = {"images": given.large, "threads": given.threads, "batch": 2}
            metrics |= timed(adapter, dataset, pictures, pixels, work, given.repeats, batch=2)
            print("\n".join(_speed_lines(metrics)), file=sys.stderr)
            print(json.dumps(metrics))
            return metrics
        data = given.set or rendered(work / "set", per_category=1 if given.quick else 4)
        annotations = first_images(data / "val.json", 24 if given.quick else given.images, work / "val.json")
        proof = Proof(annotations, data / "images", given.detector, work)
        metrics = {"images": len(proof.pixels), "threads": given.threads, "batch": BATCH, **proof.exactness()}
        metrics |= proof.speed(1 if given.quick else given.repeats)
    print(_table(metrics), file=sys.stderr)
    print(json.dumps(metrics))
    return metrics


def rendered(out: Path, per_category: int) -> Path:
    """A small set of the shipped detector's categories."""
    build(out, ShapesSettings(images=72, tune_per_category=1, val_per_category=per_category))
    return out


def _table(f: dict[str, Any]) -> str:
    ap, same = f["ap"], f["detections"]
    rows = [f"{f['images']} images, {f['threads']} thread(s), batches of {f['batch']}"]
    for dtype, r in f["reproduction"].items():
        rows.append(
            f"(a) {dtype}: features x classifier differ from the logits by at most {r['max_abs_difference']:.2e} "
            f"(largest logit {r['max_abs_logit']:.1f}, {r['rows']:,} rows)"
        )
    rows.append(
        f"(b) AP of the detector {ap['detector']['AP']:.3f}, of the float16 cache {ap['float16_cache']['AP']:.3f}: "
        f"{ap['difference_points']:+.4f} points (any bin: {ap['largest_difference_points']:.4f})"
    )
    rows.append(
        f"(c) float32 cache: {same['identical_images']} of {same['images']} images have the detector's own detections "
        f"({same['detections']:,}), bit for bit and in order"
    )
    rows += _speed_lines(f)
    rows += [f"(d) {dtype}: {b:.0f} bytes per row" for dtype, b in f["bytes_per_row"].items()]
    return "\n".join(rows)


def _speed_lines(f: dict[str, Any]) -> list[str]:
    rows = []
    for name, s in f["images_per_second"].items():
        rows.append(f"(d) {name:30} {s['median']:8.2f} images/s   ({s['least']:.2f} to {s['most']:.2f})")
    for name, s in f["overhead_percent"].items():
        told = f"{s['median']:+7.1f} % over the forward pass   ({s['least']:+.1f} to {s['most']:+.1f})"
        rows.append(f"(d) {name:30} {told}")
    return rows


if __name__ == "__main__":
    main()
