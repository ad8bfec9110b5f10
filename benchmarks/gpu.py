"""calib on a CUDA device: what it reaches, and whether it gives the CPU's answers.

    python benchmarks/gpu.py                           everything; needs 16 GB of disk, most of it for 5 million rows
    python benchmarks/gpu.py --only extract train
    python benchmarks/gpu.py --device cpu --quick      the same steps in a reduced form, to try the script

| part | measures |
|---|---|
| tests | the tests marked ``gpu`` (left out on a CPU) |
| extract | images/s of extraction and of the bare forward pass, MB/s to disk: shipped detector, Mask R-CNN R50-FPN |
| train | rows/s of every learned head, all in one pass over files, beside those of a step's two matrix products alone |
| score | rows/s of features to scores on the device, transfers included |
| serve | milliseconds for a dense reply (300 x 1,203 scores) by the service's own compute, without HTTP |
| equal | largest difference between the device and the CPU: scores of a head, and a head trained on each |

What is compared alternates in one run; metrics are median, least and most. A table goes to stderr, one JSON object to
stdout. See docs/gpu.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from extraction import large, rendered, spread, timed
from methods import made_up

from calib import registry
from calib.artifact import Artifact
from calib.cache import Cache
from calib.data.resources import shipped
from calib.extract.dataset import Dataset
from calib.extract.pictures import read_image
from calib.extract.torchvision import open_detector
from calib.parallel.devices import choose_device
from calib.server.compute import Compute
from calib.training import train
from calib.training.preload import preload

ROOT = Path(__file__).parents[1]
Metrics = dict[str, Any]


def learned() -> list[str]:
    """Methods that learn from rows by steps, and need nothing but features and labels."""
    found = []
    for name, info in registry.METHODS.items():
        has_steps = hasattr(registry.load(info.target)(), "loop")
        if has_steps and "labels" in info.needs:
            found.append(name)
    return found


class Bench:
    """All parts, on one device, in one temporary folder."""

    def __init__(self, device: torch.device, precision: str, work: Path, *, quick: bool) -> None:
        self.device, self.precision, self.work, self.quick = device, precision, work, quick
        self.rounds = 1 if quick else 5
        self._cache: Cache | None = None

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Wall time with the device's work in it."""
        self.sync()
        start = time.perf_counter()
        run()
        self.sync()
        return time.perf_counter() - start

    def cache(self) -> Cache:
        """Features of LVIS's size with random content: 5 million rows, or few."""
        if self._cache is None:
            sizes = {"classes": 40, "size": 64, "images": 32, "rows": 64} if self.quick else {"images": 10_240}
            self._cache = made_up(self.work / "rows", **sizes)
        return self._cache

    def tests(self) -> Metrics:
        """The last line of pytest."""
        if self.device.type != "cuda":
            return {"gpu tests": "left out: no CUDA device"}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return {"gpu tests": done.stdout.strip().splitlines()[-1], "gpu tests exit code": done.returncode}

    def extract(self) -> Metrics:
        """Two detectors, each against its own forward pass."""
        data = rendered(self.work / "shapes", 1 if self.quick else 25)
        dataset = Dataset.read(data / "val.json")
        own = open_detector(str(shipped("shapes_detector.safetensors")), self.device)
        own.precision = self.precision
        pixels = [read_image(r, data / "images") for r in dataset.images]
        metrics = {"shipped": self._extracted(own, dataset, data / "images", pixels, batch=8)}
        images, size, kind = (1, 128, "fasterrcnn_mobilenet_v3_large_320_fpn") if self.quick else (128, 800, MASK)
        adapter, dataset, folder, pixels = large(images, size, self.device, self.work / "large", kind)
        adapter.precision = self.precision
        return metrics | {kind: self._extracted(adapter, dataset, folder, pixels, batch=4)}

    def _extracted(self, adapter: Any, dataset: Dataset, folder: Path, pixels: list[Any], batch: int) -> Metrics:
        out = self.work / f"speed-{adapter.detector.source.replace('/', '-')}"
        out.mkdir()
        metrics = timed(adapter, dataset, folder, pixels, out, self.rounds, batch)
        shards = [p.stat().st_size for p in (out / "speed-0").rglob("*.parquet")]
        rate = metrics["images_per_second"]["extract test float16"]["median"]
        return metrics | {"MB/s to disk, test mode": sum(shards) / len(pixels) * rate / 1e6}

    def train(self) -> Metrics:
        """Rows per second and head, all heads in one pass, and of the matrix products of a linear step."""
        cache, methods, rows = self.cache(), learned(), 8192
        steps = 2 if self.quick else cache.n_rows // rows
        settings = {"steps": steps, "warmup_steps": 0, "lr": 1e-4}
        held = self.seconds(lambda: preload(cache, self.device))
        run = partial(train, methods, cache, self.work / "heads", settings, device=self.device)
        taken = self.seconds(run)
        x = torch.randn(rows, cache.features.shape[1], device=self.device)
        w = torch.randn(cache.background + 1, x.shape[1], device=self.device)

        def products() -> None:
            z = x @ w.t()
            torch.mm(z.t(), x)

        limit = [rows / self.seconds(products) for _ in range(1 + 4 * self.rounds)][1:]
        return {
            "heads": len(methods),
            "seconds": taken,
            "seconds to bring the features to the device, before": held,
            "rows in the cache": cache.n_rows,
            "rows/s and head, about": len(methods) * steps * rows / taken,
            "rows/s of the two products": spread(limit),
        }

    def score(self) -> Metrics:
        """Features as stored to scores on the host."""
        compute, head, rows = *self._head(), min(self.cache().n_rows, 8192)
        x = torch.from_numpy(self.cache().features.read(0, rows)).half()
        rates = [rows / self.seconds(partial(compute.scores, head, x)) for _ in range(1 + 4 * self.rounds)][1:]
        return {"rows/s": spread(rates)}

    def serve(self) -> Metrics:
        """What a request for dense scores waits for; the network and the wire format are in benchmarks/serving.py."""
        compute, head = self._head()
        x = torch.from_numpy(self.cache().features.read(0, 300)).half()

        def reply() -> bytes:
            return compute.scores(head, x).tobytes()

        return {"ms": spread([1e3 * self.seconds(reply) for _ in range(1 + 20 * self.rounds)][1:])}

    def _head(self) -> tuple[Compute, Any]:
        compute = Compute(str(self.device), "bf16" if self.precision == "bf16" else "fp32")
        return compute, compute.prepare(self._trained(self.device, "natural").head)

    def _trained(self, device: torch.device, method: str) -> Artifact:
        out = self.work / f"{method}-{device.type}-{time.perf_counter_ns()}"
        return train(method, self.cache(), out, {"steps": 2 if self.quick else 20, "warmup_steps": 0}, device=device)

    def equal(self) -> Metrics:
        """In float32 without TensorFloat-32."""
        torch.backends.cudnn.allow_tf32 = False
        x = torch.from_numpy(self.cache().features.read(0, min(self.cache().n_rows, 4096)))
        heads = [self._trained(d, "natural") for d in (torch.device("cpu"), self.device)]
        places = [Compute("cpu"), Compute(str(self.device))]
        own = places[0].scores(places[0].prepare(heads[0].head), x).copy()
        there = places[1].scores(places[1].prepare(heads[0].head), x).copy()
        trained = places[1].scores(places[1].prepare(heads[1].head), x).copy()
        return {
            "scores of one head": float(np.abs(own - there).max()),
            "scores of heads trained on each": float(np.abs(own - trained).max()),
        }


MASK = "maskrcnn_resnet50_fpn"
PARTS = ("tests", "extract", "train", "score", "serve", "equal")


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--work", type=Path, help="folder for temporary files, on the disk to be measured")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    device = choose_device(given.device)
    if device.type == "cpu" and not given.quick:
        parser.error("there is no CUDA device; --device cpu --quick tries the script in a reduced form")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    with tempfile.TemporaryDirectory(dir=given.work) as folder:
        bench = Bench(device, given.precision, Path(folder), quick=given.quick)
        metrics: Metrics = {"device": name, "torch": torch.__version__, "precision": given.precision}
        for part in given.only:
            metrics[part] = getattr(bench, part)()
            print(f"{part}: {json.dumps(metrics[part], indent=1)}", file=sys.stderr)
    print(json.dumps(metrics))


if __name__ == "__main__":
    main()
