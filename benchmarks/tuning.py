"""How many trials a search makes in a minute, beside the same search by the usual tools.

    calib demo                        # renders and extracts first
    python benchmarks/tuning.py       # about two minutes, one thread
    python benchmarks/tuning.py --quick --caches demo/caches

A trial trains a linear head with natural sampling (``--steps`` steps of 16 images, here 1,024 rows) and judges it on
the tune split at 300 detections per image. calib: ``calib.tune``'s own unit, eight trials of one reading of the cache,
judged on shared boxes. The usual way is put together from measured parts: steps of torch SGD over shuffled batches of a
DataLoader on the same Parquet files, detections as calib makes them, written as JSON, then evaluated by the ``lvis``
package. Metrics are CPU seconds of one process per trial, medians over rounds. A table goes to stderr, JSON to stdout.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional
from training import ParquetRows

from calib.artifact import load
from calib.cache import Cache
from calib.decide.assess import as_detections
from calib.decide.truth import ground_truth
from calib.evaluate import Detections, GroundTruth
from calib.evaluate.ground_truth import NEGATIVE, NOT_EXHAUSTIVE
from calib.evaluate.reference import reference
from calib.score import detector_nms, score
from calib.tune.runs import Run, Unit, do
from calib.tune.space import with_steps

ROWS = 1024
TRIALS = 8


def cpu(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of ``work`` and what it returned."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def ours(caches: Path, folder: Path, steps: int) -> tuple[float, Path]:
    """Seconds per trial, and one of the heads."""
    runs = []
    for k in range(TRIALS):
        settings = with_steps("natural", {"lr": 0.05 * (k + 1)}, steps)
        runs.append(Run(k, "natural", settings, steps, 0, folder / str(k) / "1"))
    unit = Unit(caches / "train", caches / "tune", tuple(runs), 300, "cpu")
    seconds, judged = cpu(lambda: do(unit))
    assert all(j.metrics for j in judged)
    return seconds / TRIALS, runs[0].out


def training(cache: Cache, steps: int) -> float:
    """Seconds per step of plain torch."""
    c, d = len(cache.categories), cache.manifest.detector.feature_size
    layer = torch.nn.Linear(d, c + 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    loader = torch.utils.data.DataLoader(ParquetRows(cache), batch_size=ROWS, shuffle=True)

    def run() -> None:
        for x, y in islice(loader, steps):
            optimizer.zero_grad()
            functional.cross_entropy(layer(x), y, ignore_index=-1).backward()
            optimizer.step()

    return cpu(run)[0] / steps


def document(truth: GroundTruth) -> dict[str, Any]:
    """``truth`` as an annotation file has it."""
    ids, names = truth.category_ids.tolist(), truth.names
    lists = {"neg_category_ids": NEGATIVE, "not_exhaustive_category_ids": NOT_EXHAUSTIVE}
    images = [
        {"id": i} | {key: truth.category_ids[(row & bit) > 0].tolist() for key, bit in lists.items()}
        for i, row in zip(truth.image_ids.tolist(), truth.labels, strict=True)
    ]
    columns = {"id": truth.annotation_id, "image_id": truth.image_ids[truth.image], "bbox": truth.box}
    columns |= {"category_id": truth.category_ids[truth.category], "area": truth.area, "ignore": truth.is_ignored}
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    categories = zip(ids, names, truth.frequency or (), strict=True)
    return {
        "images": images,
        "annotations": [dict(zip(columns, row, strict=True)) for row in rows],
        "categories": [dict(zip(("id", "name", "frequency"), row, strict=True)) for row in categories],
    }


def judging(cache: Cache, head: Path, folder: Path) -> tuple[float, float]:
    """Seconds of scoring to JSON, and of reading and evaluating it with the lvis package."""
    artifact, truth, path = load(head), document(ground_truth(cache)), folder / "results.json"

    def scoring() -> None:
        found = as_detections(cache, list(score(cache, artifact.head, detector_nms(cache))))
        columns = (found.image_id.tolist(), found.category_id.tolist(), found.score.tolist(), found.box.tolist())
        keys = ("image_id", "category_id", "score", "bbox")
        path.write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]))

    scored = cpu(scoring)[0]
    return scored, cpu(lambda: reference(truth, Detections.read(path), "lvis", "bbox", 300))[0]


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caches", type=Path, default=Path("demo/caches"), help="folder with train and tune")
    parser.add_argument("--steps", type=int, default=500, help="of a trial")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of a tenth of the steps")
    options = parser.parse_args()
    if not (options.caches / "train").is_dir():
        sys.exit(f"error: no caches at {options.caches}\nhint: run calib demo first, or name others with --caches")
    torch.set_num_threads(1)
    steps, rounds = (options.steps // 10, 1) if options.quick else (options.steps, options.rounds)
    train, tune = Cache(options.caches / "train"), Cache(options.caches / "tune")
    found: dict[str, list[float]] = {k: [] for k in ("calib", "training", "scoring", "lvis")}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            each, head = ours(options.caches, Path(folder), steps)
            scored, judged = judging(tune, head, Path(folder))
        parts = {"calib": each, "training": steps * training(train, min(steps, 20)), "scoring": scored, "lvis": judged}
        for key, value in parts.items():
            found[key].append(value)
    seconds = {k: round(median(v), 3) for k, v in found.items()}
    usual = seconds["training"] + seconds["scoring"] + seconds["lvis"]
    rates = {"calib": 60 / seconds["calib"], "usual": 60 / usual}
    ratio = usual / seconds["calib"]
    for name, value in seconds.items():
        print(f"{name:9} {value:8.2f} CPU s per trial", file=sys.stderr)
    print(
        f"trials per CPU minute: calib {rates['calib']:.1f}, usual {rates['usual']:.1f}; {ratio:.1f} x", file=sys.stderr
    )
    print(json.dumps({"steps": steps, "seconds": seconds, "trials_per_minute": rates, "ratio": ratio, "all": found}))


if __name__ == "__main__":
    main()
