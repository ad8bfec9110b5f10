"""What the discriminant head costs at LVIS's size: 1,203 classes, 1,024 numbers per feature, a million foreground rows.

    python benchmarks/discriminant.py [--images 2048] [--threads 1] [--quick] [--json]

Times are CPU seconds of one process. ``measure`` reads every foreground row once and sums its mean and covariance in
float64; ``product`` is the one product of it that cannot be left out (X^T X in float64 over as many rows from memory),
so that product over measure is the share of the floor. ``solve`` is what another shrinkage, temperature or pool costs.
The last metrics carry measure to the 12 million foreground rows of LVIS v1 (512 sampled proposals of 100,170 images, a
quarter of them foreground). Memory is the greatest resident size beyond that before the fit.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from methods import made_up

from calib.cache import Cache
from calib.methods.discriminant import ROWS, Discriminant, discriminant, measured
from calib.training.context import FitContext
from calib.training.stages import fit_alone

LVIS_ROWS = 12_000_000


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU time of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def product(rows: int, size: int) -> Callable[[], None]:
    """X^T X of ``rows`` rows in float64, block by block from memory."""
    x = torch.randn(ROWS, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(size, size, dtype=torch.float64)

    def work() -> None:
        for start in range(0, rows, ROWS):
            part = x[: min(ROWS, rows - start)]
            total.addmm_(part.T, part)

    return work


def resident() -> float:
    """Greatest resident size so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(images: int, classes: int, size: int) -> dict[str, float]:
    """All metrics."""
    with tempfile.TemporaryDirectory() as folder:
        made_up(Path(folder) / "cache", classes=classes, size=size, images=images, foreground=1.0)
        cache = Cache(Path(folder) / "cache")
        rows, before = cache.n_rows, resident()
        reading = cpu_seconds(lambda: measured(cache, 0.5, FitContext()))
        found = measured(cache, 0.5, FitContext())
        solving = cpu_seconds(lambda: discriminant(found, 0.4))
        again = cpu_seconds(lambda: fit_alone(Discriminant(s=0.3), cache, FitContext()))
        peak = resident() - before
        floor = cpu_seconds(product(rows, size))
    return {
        "rows": rows,
        "measure (s)": reading,
        "product (s)": floor,
        "product over measure": floor / reading,
        "solve (s)": solving,
        "fit with other settings (s)": again,
        "peak memory (MB)": peak,
        "measure at 12 M rows (s)": reading * LVIS_ROWS / rows,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048, help="of 512 foreground rows each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small, to see that it works")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = (64, 20, 64) if options.quick else (options.images, 1203, 1024)
    metrics = measure(*size)
    if options.json:
        print(json.dumps(metrics))
        return
    for name, value in metrics.items():
        print(f"{name:30} {value:,.3g}" if name != "rows" else f"{name:30} {value:,}")


if __name__ == "__main__":
    main()
