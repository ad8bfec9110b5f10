"""CPU seconds and memory of evaluators, side by side on a simulated split with the statistics of LVIS v1 val.

    python benchmarks/evaluation.py                 1,000 images: the lvis package, faster-coco-eval, calib
    python benchmarks/evaluation.py --full          19,809 images x 300 detections: calib only
    python benchmarks/evaluation.py --images 5000 --engines lvis calib
    python benchmarks/evaluation.py --quick         100 images

Each engine runs in its own process with one thread and reads the same files. ``per head`` is what one more set of
scores costs when the ground truth is loaded: for the packages, building their results and evaluating; for calib,
standalone (detections from Parquet) and with the boxes shared by all heads, the median of several heads. ``first`` is
everything from the files to the metrics. All AP are compared. faster-coco-eval (extra ``bench``) is left
out where it is not installed. A table goes to stderr, one JSON object to stdout.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _simulated_split import VAL_IMAGES, Split, another_head, simulate

from calib.evaluate import Detections, Evaluator, GroundTruth, Rescored
from calib.evaluate.reference import reference

HEADS = 5
Metrics = dict[str, float]


def prepare(folder: Path, split: Split, *, with_json: bool) -> None:
    """Ground truth, detections of the first head (Parquet, and JSON for the packages), scores of the others."""
    (folder / "gt.json").write_text(json.dumps(split.document))
    x1, y1, x2, y2 = split.corners.T
    columns = {"image_id": split.image_id, "category_id": split.category_id, "score": split.score}
    pq.write_table(pa.table(columns | {"x1": x1, "y1": y1, "x2": x2, "y2": y2}), folder / "head.parquet")
    np.save(folder / "scores.npy", np.stack([another_head(split, k) for k in range(HEADS)]))
    if with_json:
        found = Detections.read(folder / "head.parquet")
        columns = zip(found.image_id, found.category_id, found.box.tolist(), found.score, strict=True)
        rows = [{"image_id": int(i), "category_id": int(c), "bbox": b, "score": float(s)} for i, c, b, s in columns]
        (folder / "head.json").write_text(json.dumps(rows))


def cpu() -> float:
    """CPU seconds of this process so far, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def spent(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of ``work``, and what it returned."""
    start = cpu()
    result = work()
    return cpu() - start, result


def run_lvis(folder: Path) -> Metrics:
    """The lvis package."""
    start = cpu()
    document = json.loads((folder / "gt.json").read_text())
    found = Detections.from_document(json.loads((folder / "head.json").read_text()))
    seconds, theirs = spent(lambda: reference(document, found, "lvis", "bbox", 300))
    return {"AP": theirs["metrics"]["AP"], "per head": seconds, "first": cpu() - start}


def run_faster_coco_eval(folder: Path) -> Metrics:
    """faster-coco-eval in its LVIS mode."""
    from faster_coco_eval import COCO, COCOeval_faster

    def one(truth: Any, rows: Any) -> float:
        judged = COCOeval_faster(truth, truth.loadRes(rows), "bbox", lvis_style=True)
        judged.params.maxDets = [300]
        judged.evaluate()
        judged.accumulate()
        precision = judged.eval["precision"][:, :, :, 0, -1]
        return float(precision[precision > -1].mean())

    start = cpu()
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "gt.json"))
        rows = json.loads((folder / "head.json").read_text())
        seconds, ap = spent(lambda: one(truth, rows))
    return {"AP": ap, "per head": seconds, "first": cpu() - start}


def run_calib(folder: Path) -> Metrics:
    """calib, each head on its own."""
    start = cpu()
    evaluator = Evaluator(GroundTruth.read(folder / "gt.json"))
    found = Detections.read(folder / "head.parquet")
    evaluation = evaluator.evaluate(found)
    first = cpu() - start

    def again() -> None:
        evaluator.evaluate(Detections.read(folder / "head.parquet"))

    seconds = median(spent(again)[0] for _ in range(HEADS))
    return {"AP": evaluation.summary()["AP"], "per head": seconds, "first": first}


def run_calib_shared(folder: Path) -> Metrics:
    """calib, all heads on one set of boxes; also on two threads."""
    start = cpu()
    evaluator = Evaluator(GroundTruth.read(folder / "gt.json"))
    columns = pq.read_table(folder / "head.parquet")
    corners = np.stack([columns[name].to_numpy() for name in ("x1", "y1", "x2", "y2")], axis=1)
    boxes = evaluator.boxes(columns["image_id"].to_numpy(), corners)
    category = np.searchsorted(evaluator.truth.category_ids, columns["category_id"].to_numpy())
    row = np.arange(len(category))
    scores = [columns["score"].to_numpy().astype(float), *np.load(folder / "scores.npy").astype(float)]
    del columns, corners

    def one(score: Any) -> float:
        return float(evaluator.evaluate(Rescored(boxes, row, category, score)).summary()["AP"])

    ap = one(scores[0])
    first = cpu() - start
    each = [spent(lambda s=s: one(s))[0] for s in scores[1:]]
    walls = []
    for threads in (1, 2, 1, 2):
        begun = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, scores[1:] * 2))
        walls.append(time.perf_counter() - begun)
    return {
        "AP": ap,
        "per head": median(each),
        "least": min(each),
        "most": max(each),
        "first": first,
        "two threads": (walls[0] + walls[2]) / (walls[1] + walls[3]),
    }


ENGINES: dict[str, Callable[[Path], Metrics]] = {
    "lvis": run_lvis,
    "faster-coco-eval": run_faster_coco_eval,
    "calib": run_calib,
    "calib-shared": run_calib_shared,
}


def measure(engine: str, folder: Path) -> Metrics | None:
    """Run ``engine`` in its own process; None if it is not installed."""
    command = [sys.executable, __file__, "--child", engine, "--folder", str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        print(f"{engine} is left out: {last}", file=sys.stderr)
        return None
    return dict(json.loads(done.stdout))


def child(engine: str, folder: Path) -> None:
    """Print the metrics of one engine as JSON."""
    metrics = ENGINES[engine](folder)
    metrics["peak GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps(metrics))


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int)
    parser.add_argument("--engines", nargs="*", choices=[*ENGINES], default=None)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", choices=[*ENGINES], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder)
        return
    images = options.images or (VAL_IMAGES if options.full else 100 if options.quick else 1000)
    engines = options.engines or (["calib", "calib-shared"] if options.full else [*ENGINES])
    with tempfile.TemporaryDirectory() as name:
        split = simulate(images)
        packages = {"lvis", "faster-coco-eval"} & set(engines)
        prepare(Path(name), split, with_json=bool(packages))
        size = {"images": images, "objects": len(split.document["annotations"]), "detections": len(split.score)}
        del split
        found = {engine: metrics for engine in engines if (metrics := measure(engine, Path(name)))}
    print(json.dumps({**size, "engines": found}))
    print(f"{size}", file=sys.stderr)
    base = found.get("lvis", {}).get("per head")
    for engine, metrics in found.items():
        ratio = f"{base / metrics['per head']:8.0f} x lvis" if base else ""
        more = f"   two threads: {metrics['two threads']:.2f} x" if "two threads" in metrics else ""
        print(
            f"{engine:18} per head {metrics['per head']:9.3f} CPU s   first {metrics['first']:8.2f}   "
            f"peak {metrics['peak GB']:5.2f} GB   AP {metrics['AP']:.6f} {ratio}{more}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
