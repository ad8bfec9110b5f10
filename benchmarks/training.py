"""What feeding a training costs, and what one step costs, side by side in one run.

    python benchmarks/training.py                327,680 rows x 1,024 float16, 1,204 outputs, one thread
    python benchmarks/training.py --quick        32,768 rows, one round
    python benchmarks/training.py --only feed bilevel

| line | compares |
|---|---|
| feed | steps fed from Parquet with the same steps fed from memory: rates, 1 is no cost (fp32, and bf16) |
| bilevel | preparing a bi-level (SimCal) and a class-balanced (cRT) batch on the training thread with their step |
| index | 5 million rows: seconds to index them, milliseconds per bi-level step |
| loader | rows per second of calib's feed with a torch DataLoader over the rows of the same Parquet files |
| hugging-face | the same with shuffled Hugging Face ``datasets`` (extra ``bench``; else left out) |
| one-pass | six heads in one pass with one of them, and with the six one by one |
| step | the hand-shaped bfloat16 step with torch autocast, and with its two matrix products alone |

What is compared alternates, round by round; metrics are medians over rounds with their range. Rates and ``feed`` are
wall time; ``bilevel``, ``one-pass`` and ``step`` compare CPU time, which other work on the machine moves less. The last
line carries rows per second to the 51 million rows of LVIS v1 train (100,000 images x 512). A table goes to stderr, one
JSON object to stdout. Everything is written to a temporary folder.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from methods import made_up
from torch.nn import functional

from calib.cache import Cache
from calib.cache.index import ClassIndex
from calib.heads.linear import LinearClassifier, LinearHead
from calib.layout import FEATURES
from calib.methods.crt import CRT
from calib.methods.simcal import SimCal
from calib.progress import silent
from calib.sampling import Sampler
from calib.sampling.bilevel import BilevelSampler
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches, Loop
from calib.training import train
from calib.training.batch import Batch
from calib.training.context import FitContext
from calib.training.fused_softmax import mean_over_chunks, mean_over_rows
from calib.training.loader import BatchLoader, BatchSource
from calib.training.loop import Training

PAPER_ROWS = 51_200_000
HF_ROWS = 131_072  # are copied twice
CPU = torch.device("cpu")
SIX = ("natural", "reweight", "focal", "class-margin", "balanced-softmax", "cosine")
Metrics = dict[str, list[float]]


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """Wall time."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def cpu_seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """CPU time of all threads: what does not depend on what else the machine does."""
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


def training(cache: Cache, precision: str, reduction: Any = mean_over_chunks) -> Training:
    """The plain linear head, at a rate that changes next to nothing."""
    head = LinearHead(LinearClassifier.of(cache.classifier))
    loop = Loop(steps=10**6, lr=1e-6, warmup_steps=0, precision=precision)
    sampler = InstanceSampler(cache, ImageBatches(), seed=0)
    return Training(head, reduction(head.classifier), sampler, cache, loop, FitContext(), label="bench")


def source_of(cache: Cache, seed: int = 0) -> BatchSource:
    """Natural sampling, 16 images of 512 rows per step."""
    return BatchSource(cache, cache.features, InstanceSampler(cache, ImageBatches(), seed=seed))


def learn(model: Training, batches: Iterator[Batch]) -> int:
    """One step per batch; the number of rows."""
    rows = 0
    with silent("", total=0, unit="") as bar:
        for batch in batches:
            model.step(batch, bar)
            rows += len(batch.labels)
    return rows


def in_memory(cache: Cache, n: int) -> list[Batch]:
    """``n`` batches in memory."""
    with BatchLoader(source_of(cache), 0, n, CPU) as loader:
        return [replace(b, features=b.features.clone()) for b in loader]


def bench_feed(cache: Cache, rounds: int, quick: bool) -> Metrics:
    """Rate from Parquet over rate from memory, per precision; rows per second from Parquet."""
    memory, steps, metrics = in_memory(cache, 2), 2 if quick else 6, {}
    for precision in ("fp32", "bf16"):
        model, ratios, rates = training(cache, precision), [], []
        learn(model, iter(memory))
        for k in range(rounds):
            with BatchLoader(source_of(cache, k), 0, steps + 1, CPU) as loader:
                batches = iter(loader)
                learn(model, islice(batches, 1))  # the first batch is waited for, once per training
                fed = seconds(learn, model, batches)
            ratios.append(seconds(learn, model, islice(cycle(memory), steps)) / fed)
            rates.append(steps * len(memory[0].labels) / fed)
        metrics |= {f"parquet over memory, {precision}": ratios, f"rows/s, {precision}": rates}
    return metrics


def prepare(cache: Cache, sampler: Sampler, step: int) -> None:
    """One batch, on this thread."""
    cache.features.take(sampler.step(step).rows)


def bench_bilevel(cache: Cache, rounds: int, quick: bool) -> Metrics:
    """Share of sampling and reading in the step, if both were done on the training thread."""
    index = ClassIndex.build(cache)
    simcal, crt = SimCal(), CRT()
    samplers: dict[str, Sampler] = {
        "bi-level": BilevelSampler(index, cache.meta("max_iou")[0], classes_per_step=simcal.classes_per_step, seed=0),
        "class-balanced": crt.sampler(cache, 0),
    }
    metrics = {}
    for name, sampler in samplers.items():
        model, shares, rates = training(cache, "fp32", mean_over_rows), [], []
        steps = 5 if quick else 40
        for k in range(rounds):
            drawing = median(cpu_seconds(prepare, cache, sampler, i) for i in range(k * steps, (k + 1) * steps))
            with BatchLoader(BatchSource(cache, cache.features, sampler), 0, steps, CPU) as loader:
                batches = [replace(b, features=b.features.clone()) for b in loader]
            stepping = [cpu_seconds(learn, model, iter([p])) for p in batches]
            shares.append(drawing / median(stepping))
            with BatchLoader(BatchSource(cache, cache.features, sampler), 0, steps, CPU) as loader:
                start = time.perf_counter()
                rates.append(learn(model, iter(loader)) / (time.perf_counter() - start))
        metrics |= {f"{name} batch over step": shares, f"{name} rows/s": rates}
    return metrics


def bench_index(cache: Cache, rounds: int, quick: bool) -> Metrics:
    """A long-tailed table of rows without features."""
    images, classes = 1_000 if quick else 10_000, cache.background
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, classes + 1)
    label = np.where(
        rng.random(images * 512) < 0.25, rng.choice(classes, images * 512, p=share / share.sum()), classes
    ).astype(np.int32)
    label = np.sort(label.reshape(images, 512), axis=1).ravel()
    image = np.repeat(np.arange(images), 512)
    iou = np.where(label < classes, 0.8, 0.5 * rng.random(len(label))).astype(np.float32)
    building, drawing = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        sampler = BilevelSampler(ClassIndex.of(label, image, classes), iou, classes_per_step=16, seed=0)
        building.append(time.perf_counter() - start)
        drawing.append(1e3 * median(seconds(sampler.step, i) for i in range(100)))
    return {f"s to index {len(label):,} rows": building, "ms per bi-level draw": drawing}


def feed_rate(cache: Cache, seed: int) -> float:
    """Rows per second of one pass without any training."""
    source, rows = source_of(cache, seed), 0
    start = time.perf_counter()
    with BatchLoader(source, 0, cache.n_rows // 8192, CPU) as loader:
        for batch in loader:
            rows += len(batch.labels)
    return rows / (time.perf_counter() - start)


class ParquetRows(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Row by row, the table opened by pyarrow: what one writes first."""

    def __init__(self, cache: Cache) -> None:
        files = sorted((cache.path / "shards").glob(f"*/{FEATURES}"))
        self._column = pa.concat_tables([pq.read_table(f, memory_map=True) for f in files]).combine_chunks().column(0)
        self._labels = cache.labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        row = np.frombuffer(self._column[i].as_buffer(), np.float16).astype(np.float32)
        return torch.from_numpy(row), int(self._labels[i])


def bench_loader(cache: Cache, rounds: int, quick: bool) -> Metrics:
    """calib's rows per second over those of a DataLoader (in the training process, as calib's thread is)."""
    data, ratios, ours, theirs = ParquetRows(cache), [], [], []
    for k in range(rounds):
        loader = torch.utils.data.DataLoader(
            data, batch_size=8192, shuffle=True, generator=torch.Generator().manual_seed(k)
        )
        start, rows = time.perf_counter(), 0
        for x, _ in islice(loader, 2 if quick else 8):
            rows += len(x)
        theirs.append(rows / (time.perf_counter() - start))
        ours.append(feed_rate(cache, k))
        ratios.append(ours[-1] / theirs[-1])
    return {"calib over DataLoader": ratios, "calib rows/s": ours, "DataLoader rows/s": theirs}


def bench_hugging_face(cache: Cache, rounds: int, quick: bool) -> Metrics:
    """calib's rows per second over those of a shuffled ``datasets`` table with a torch format."""
    try:
        from datasets import Dataset, Features, List, Value, disable_progress_bars
    except ImportError:
        print("hugging-face is left out: datasets is not installed", file=sys.stderr)
        return {}
    disable_progress_bars()
    size = cache.features.shape[1]
    table = Features({"features": List(Value("float16"), length=size), "label": Value("int32")})

    with tempfile.TemporaryDirectory(dir=cache.path.parent) as folder:
        with pq.ParquetWriter(Path(folder) / "rows.parquet", table.arrow_schema) as writer:
            for start in range(0, min(cache.n_rows, HF_ROWS), 8192):
                x = cache.features.read(start, min(start + 8192, cache.n_rows)).astype(np.float16)
                flat = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), size)
                labels = pa.array(cache.labels[start : start + 8192])
                writer.write_table(pa.table([flat, labels], schema=table.arrow_schema))
        data = Dataset.from_parquet(str(Path(folder) / "rows.parquet"), cache_dir=folder, features=table)
        ratios, theirs = [], []
        for k in range(rounds):
            shuffled = data.shuffle(seed=k, keep_in_memory=True).with_format("torch")
            start, rows = time.perf_counter(), 0
            for batch in islice(shuffled.iter(batch_size=8192), 2 if quick else 8):
                rows += len(batch["features"].float())
            theirs.append(rows / (time.perf_counter() - start))
            ratios.append(feed_rate(cache, k) / theirs[-1])
    return {"calib over Hugging Face, shuffled": ratios, "Hugging Face rows/s": theirs}


def bench_one_pass(cache: Cache, rounds: int, quick: bool) -> Metrics:
    """CPU time of six over that of one, and over the six one by one."""
    settings = {"steps": 2 if quick else 4, "warmup_steps": 0}
    over_one, over_six = [], []
    for k in range(rounds):
        out = cache.path.parent / f"heads-{k}"
        each = [cpu_seconds(train, m, cache, out / "alone" / m, settings) for m in SIX]
        together = cpu_seconds(train, SIX, cache, out, settings)
        over_one.append(together / (sum(each) / len(each)))
        over_six.append(together / sum(each))
    return {"six in one pass over one head": over_one, "six in one pass over six one by one": over_six}


def bench_step(cache: Cache, rounds: int, quick: bool) -> Metrics:
    """CPU times of autocast and of two matrix products over that of the shaped step."""
    batch = in_memory(cache, 1)[0]
    shaped = training(cache, "bf16")
    c = LinearClassifier.of(cache.classifier)
    optimizer = torch.optim.SGD(c.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4)
    x, w = batch.features.bfloat16(), c.weight.detach().bfloat16()
    z, product = torch.empty(len(x), len(w), dtype=torch.bfloat16), torch.empty_like(w)

    def autocast() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(c(batch.features), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def products() -> None:
        torch.mm(x, w.t(), out=z)
        torch.mm(z.t(), x, out=product)

    works = {"shaped": lambda: learn(shaped, iter([batch])), "autocast": autocast, "products": products}
    for work in works.values():
        work()
    ratios: Metrics = {"autocast over shaped": [], "two products over shaped": [], "shaped ms": []}
    for _ in range(rounds):
        times = {name: min(cpu_seconds(work) for _ in range(1 if quick else 3)) for name, work in works.items()}
        ratios["autocast over shaped"].append(times["autocast"] / times["shaped"])
        ratios["two products over shaped"].append(times["products"] / times["shaped"])
        ratios["shaped ms"].append(1e3 * times["shaped"])
    return ratios


BENCHES: dict[str, Callable[[Cache, int, bool], Metrics]] = {
    "feed": bench_feed,
    "bilevel": bench_bilevel,
    "index": bench_index,
    "loader": bench_loader,
    "hugging-face": bench_hugging_face,
    "one-pass": bench_one_pass,
    "step": bench_step,
}


def plan(metrics: dict[str, Metrics]) -> dict[str, float]:
    """Hours for one pass over 51 million rows at the measured rates, assuming that the disk keeps up with them."""
    rates = {k: median(v) for k, v in metrics.get("feed", {}).items() if k.startswith("rows/s")}
    hours = {f"hours for 51 M rows, {k[8:]}": PAPER_ROWS / rate / 3600 for k, rate in rates.items()}
    needed = {f"MB/s of disk, {k[8:]}": rate * 2048 / 1e6 for k, rate in rates.items()}
    return hours | needed


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=640, help="of 512 rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=[*BENCHES], default=[*BENCHES])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, rounds = (64, 1) if options.quick else (options.images, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        cache = made_up(Path(folder) / "cache", images=images)
        size = {"rows": cache.n_rows, "threads": options.threads, "rounds": rounds}
        metrics: dict[str, Metrics] = {}
        for name in options.only:
            metrics[name] = BENCHES[name](cache, rounds, options.quick)
            for what, values in metrics[name].items():
                spread = f"{min(values):,.4g} .. {max(values):,.4g}"
                print(f"{name:13} {what:38} {median(values):>12,.4g}   {spread}", file=sys.stderr)
    planned = plan(metrics)
    for what, value in planned.items():
        print(f"{'plan':13} {what:38} {value:>12,.4g}", file=sys.stderr)
    print(json.dumps({**size, "metrics": metrics, "plan": planned}))


if __name__ == "__main__":
    main()
