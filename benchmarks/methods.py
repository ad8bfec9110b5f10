"""Training throughput of every learned head, as a ratio to the plain softmax linear head (`natural`).

    python benchmarks/methods.py [--cache demo/caches/train] [--rounds 3] [--steps 200]

Rows per second through sampler, cache, loss and update, one thread. Every method is timed between two runs of
`natural` in the same process; the ratio is to their mean. Without a cache one of LVIS size is made up (1,203 classes,
1,024 numbers per feature). Prints a table, or JSON with --json.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calib.cache import Cache, Categories, Classifier, Manifest
from calib.cache.image_rows import ImageRows
from calib.cache.schema import ANNOTATIONS_SCHEMA, META_SCHEMA, Detector
from calib.cache.write import CacheWriter
from calib.registry import METHODS, load
from calib.settings import known_keys, with_overrides
from calib.training.context import FitContext
from calib.training.stages import fit_alone

REFERENCE = "natural"


class _Counting:
    """The features of a cache, with the number of rows of every batch; batches are read ahead of their steps."""

    def __init__(self, rows: Any) -> None:
        self._rows, self.batches = rows, list[int]()

    def checked(self, rows: Any, out: Any = None) -> Any:
        self.batches.append(len(rows))
        return self._rows.checked(rows, out)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)


def rows_per_second(method: str, cache: Cache, steps: int) -> float:
    """One training of ``steps`` steps without its start: the clock runs from the first step."""
    settings = load(METHODS[method].target)()
    short = {k: steps for k in known_keys(settings) if k.endswith(".steps")}
    counting = _Counting(cache.features)
    cache.__dict__["features"] = counting
    started: list[float] = []

    @contextmanager
    def progress(label: str, *, total: int, unit: str) -> Iterator[Any]:
        class Bar:
            def advance(self, n: int = 1, **metrics: float) -> None:
                if n and not started:
                    started.append(time.perf_counter())

        yield Bar()

    fit_alone(with_overrides(settings, short), cache, FitContext(progress=progress))
    cache.__dict__["features"] = counting._rows
    return sum(counting.batches[1:]) / (time.perf_counter() - started[0])


def made_up(folder: Path, *, classes: int = 1203, size: int = 1024, images: int = 64, rows: int = 512,
            foreground: float = 0.25) -> Cache:  # fmt: skip
    """A cache of LVIS proportions with random content: a quarter of the rows of an image are foreground, as detectors
    sample them (another share with ``foreground``), of 3 or 4 categories (the mean
    is 3.4: Gupta et al., LVIS, CVPR 2019)."""
    rng = np.random.default_rng(0)
    classifier = Classifier(rng.normal(size=(classes + 1, size)).astype(np.float32), np.zeros(classes + 1, np.float32))
    counts = np.maximum(1, (20_000 / np.arange(1, classes + 1)).astype(np.int64))
    names = tuple(str(i) for i in range(classes))
    categories = Categories(np.arange(1, classes + 1), names, counts, np.minimum(counts, 2000), ("f",) * classes)
    detector = Detector("made-up", classifier.digest(), classes, size)
    manifest = Manifest("train", "float16", "none", detector, {})
    folder.mkdir(parents=True)
    with CacheWriter.create(folder, manifest, categories, classifier) as writer:
        annotations: dict[str, NDArray[Any]] = {n: np.empty(0) for n in ANNOTATIONS_SCHEMA.names}
        writer.write_annotations(annotations)
        for shard in range(images // 32):
            writer.commit(
                f"{shard:05d}", [_image(rng, 32 * shard + i, classes, size, rows, foreground) for i in range(32)]
            )
        writer.finish()
    return Cache(folder)


def _image(rng: np.random.Generator, number: int, classes: int, size: int, rows: int, foreground: float) -> ImageRows:
    there = rng.choice(classes, rng.integers(3, 5), replace=False)
    label = np.where(rng.random(rows) < foreground, rng.choice(there, rows), classes).astype(np.int32)
    meta: dict[str, Any] = {n: np.zeros(rows, META_SCHEMA.field(n).type.to_pandas_dtype()) for n in META_SCHEMA.names}
    meta |= {
        "label": label,
        "max_iou": np.where(label < classes, 0.8, 0.3).astype(np.float32),
        "is_gt": label < classes,
    }
    image = {"image_id": number, "height": 100, "width": 100, "net_height": 100, "net_width": 100}
    image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    x = rng.standard_normal((rows, size), np.float32)
    return ImageRows(image, meta, np.maximum(x, 0), np.zeros((rows, classes + 1), np.float32))


def measure(cache: Cache, rounds: int, steps: int) -> list[dict[str, Any]]:
    """A line per learned method: rows per second and ratios to `natural`, median and range over rounds."""
    learned = [m for m, info in METHODS.items() if info.trains]
    lines = []
    for method in learned:
        ratios, speeds = [], []
        for _ in range(rounds):
            before = rows_per_second(REFERENCE, cache, steps)
            speed = rows_per_second(method, cache, steps)
            after = rows_per_second(REFERENCE, cache, steps)
            speeds.append(speed)
            ratios.append(speed / ((before + after) / 2))
        lines.append(
            {
                "method": method,
                "rows_per_second": round(median(speeds)),
                "ratio": round(median(ratios), 3),
                "range": [round(min(ratios), 3), round(max(ratios), 3)],
            }
        )
        print(f"{method:18} {lines[-1]}", file=sys.stderr)
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="a cache extracted with --mode train [default: made up, LVIS size]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="one round of three steps")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds, steps = (1, 3) if options.quick else (options.rounds, options.steps)
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(options.cache) if options.cache else made_up(Path(folder) / "cache")
        lines = measure(cache, rounds, steps)
    if options.json:
        print(json.dumps(lines))
        return
    for line in lines:
        print(f"{line['method']:18} {line['rows_per_second']:>9,} rows/s  x {line['ratio']}  {line['range']}")


if __name__ == "__main__":
    main()
