"""Train the small detector of the procedural set, as the shipped shapes_detector.safetensors was trained.

The whole network is trained first. Its last layer is then trained on alone, on the cached features of the train split,
until it has converged; the weight decay with the best AP on the tune split is taken. So the detector's own classifier
is what plain training can reach, and what a method adds to it is not training time.

Needs calib with its torchvision extra installed. About six minutes on two CPU cores. The run is a function
of its settings, but not bit for bit across machines and thread counts.
"""

import argparse
import math
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from calib.cache import Cache
from calib.cli.console import bar
from calib.data.detector import save_detector, shapes_detector
from calib.data.plan import ShapesSettings
from calib.data.shapes import build
from calib.errors import CalibError, FitError, FormatError, InputError
from calib.evaluate.evaluate_files import Options, evaluate_files
from calib.evaluate.folder import SUMMARY
from calib.export.export import Export, export
from calib.extract.dataset import Dataset
from calib.extract.extraction import extract
from calib.extract.options import Extraction
from calib.extract.torchvision import open_detector
from calib.files import read_json, require, write_json
from calib.score.detections import Output, write_detections
from calib.settings import Nms
from calib.training import train

Target = dict[str, Tensor]


@dataclass(frozen=True)
class TrainSettings:
    """SGD with Nesterov momentum, linear warm-up, cosine decay to 0; half of the pictures are mirrored."""

    epochs: float = 4.5
    batch: int = 8
    learning_rate: float = 0.04
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 100
    max_gradient_norm: float = 5.0
    bf16: bool = True
    seed: int = 0


@dataclass(frozen=True)
class LastLayerSettings:
    """Settings of the method ``natural``, and the weight decays that are tried. AP on tune is of ``detections`` per
    image, LVIS's own ratio to the number of proposals."""

    steps: int = 15_000
    learning_rate: float = 0.4
    weight_decays: tuple[float, ...] = (1e-5, 3e-5, 1e-4)
    detections: int = 45


@dataclass(frozen=True)
class TrainSet:
    """``pixels`` [M, S, S, 3] uint8, a target per picture; labels start at 1, in ascending category id."""

    pixels: npt.NDArray[np.uint8]
    targets: list[Target]
    classes: int


def load_train_set(data: Path) -> TrainSet:
    """Read train.json and its pictures; pictures without objects are left out.

    Raises:
        MissingFileError: train.json or a picture is missing.
        FormatError: train.json is not JSON or not in LVIS format, or a picture is damaged.
        InputError: no picture has objects, or the pictures differ in size.
    """
    path = data / "train.json"
    dataset = read_json(path, "annotations")
    try:
        labels = {i: n + 1 for n, i in enumerate(sorted(c["id"] for c in dataset["categories"]))}
        boxes: dict[int, list[list[float]]] = {r["id"]: [] for r in dataset["images"]}
        classes: dict[int, list[int]] = {r["id"]: [] for r in dataset["images"]}
        for a in dataset["annotations"]:
            x, y, w, h = a["bbox"]
            boxes[a["image_id"]].append([x, y, x + w, y + h])
            classes[a["image_id"]].append(labels[a["category_id"]])
        records = [(r["id"], r["file_name"]) for r in dataset["images"] if boxes[r["id"]]]
    except (KeyError, TypeError, ValueError) as e:
        raise FormatError(f"{path} is not in LVIS format: {e!r}") from e
    if not records:
        raise InputError(f"{path} holds no picture with objects", hint="render a set with calib data shapes")
    pixels = [_read_picture(data / "images" / name) for _, name in records]
    if len({p.shape for p in pixels}) != 1:
        raise InputError(f"{path}: the pictures must be of one size, got {sorted({p.shape for p in pixels})}")
    targets = [{"boxes": torch.tensor(boxes[i]), "labels": torch.tensor(classes[i])} for i, _ in records]
    return TrainSet(np.stack(pixels), targets, len(labels))


def _read_picture(path: Path) -> npt.NDArray[np.uint8]:
    try:
        return np.asarray(Image.open(require(path, "picture")).convert("RGB"))
    except (UnidentifiedImageError, OSError) as e:
        raise FormatError(f"picture {path} is truncated or not a picture: {e}") from e


def make_batch(
    train: TrainSet, chosen: npt.NDArray[np.int64], rng: np.random.Generator
) -> tuple[list[Tensor], list[Target]]:
    """Pictures [3, S, S] in [0, 1] and targets of ``chosen``, each mirrored with probability 0.5."""
    images, targets = [], []
    for i in chosen:
        image = torch.from_numpy(train.pixels[i]).permute(2, 0, 1).float() / 255
        target = train.targets[i]
        if rng.random() < 0.5:
            width, (x1, y1, x2, y2) = image.shape[2], target["boxes"].unbind(1)
            target = {**target, "boxes": torch.stack((width - x2, y1, width - x1, y2), 1)}
            image = image.flip(2)
        images.append(image)
        targets.append(target)
    return images, targets


def learning_rate(step: int, steps: int, s: TrainSettings) -> float:
    """Rate of ``step`` of ``steps``: linear warm-up times half a cosine."""
    return s.learning_rate * min(1.0, (step + 1) / s.warmup_steps) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def train_model(model: nn.Module, train: TrainSet, s: TrainSettings) -> list[dict[str, float]]:
    """Train in place; the loss curve, averaged over 50 steps, comes back and goes to stderr as it grows.

    Raises:
        FitError: the loss left the finite numbers.
    """
    rng = np.random.default_rng(s.seed)
    steps = max(1, int(s.epochs * len(train.targets) / s.batch))
    optimizer = torch.optim.SGD(
        model.parameters(), s.learning_rate, s.momentum, weight_decay=s.weight_decay, nesterov=True
    )
    queue = np.empty(0, np.int64)
    curve: list[dict[str, float]] = []
    sums: Counter[str] = Counter()
    model.train()
    for step in range(steps):
        if len(queue) < s.batch:
            queue = np.concatenate((queue, rng.permutation(len(train.targets))))
        chosen, queue = queue[: s.batch], queue[s.batch :]
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, s)
        losses = train_step(model, optimizer, make_batch(train, chosen, rng), s)
        if not all(map(math.isfinite, losses.values())):
            raise FitError(f"the loss is not finite at step {step}", hint="lower --learning-rate, or give --float32")
        sums.update(losses)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            n = (step % 50) + 1
            curve.append({"step": step + 1, **{name: round(total / n, 4) for name, total in sums.items()}})
            print(f"step {step + 1} of {steps}", curve[-1], file=sys.stderr)
            sums.clear()
    return curve


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[list[Tensor], list[Target]],
    s: TrainSettings,
) -> dict[str, float]:
    """One step of SGD; the four losses of torchvision's Faster R-CNN."""
    with torch.autocast("cpu", torch.bfloat16, enabled=s.bf16):
        losses: dict[str, Tensor] = model(*batch)
    optimizer.zero_grad()
    torch.stack([loss.float() for loss in losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), s.max_gradient_norm)
    optimizer.step()
    return {name.removeprefix("loss_"): float(loss.detach()) for name, loss in losses.items()}


def converge(checkpoint: Path, data: Path, out: Path, s: LastLayerSettings, seed: int = 0) -> list[dict[str, float]]:
    """Train the last layer of the detector ``checkpoint`` on, and write the checkpoint with it to ``out``.

    Returns the AP on tune of the layer as it was (weight decay -1) and of every weight decay.

    Raises:
        CalibError: a split is missing or damaged, or the checkpoint is none of this script.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        adapter = open_detector(str(checkpoint), torch.device("cpu"))
        for split, mode in (("train", "train"), ("tune", "test")):
            dataset = Dataset.read(data / f"{split}.json", counts_from=data / "train.json")
            extract(adapter, dataset, data / "images", scratch / split, Extraction(mode=mode), progress=bar)
        common = {"steps": s.steps, "lr": s.learning_rate, "schedule": "cosine", "warmup_steps": 100}
        tried = {-1.0: train("softmax", scratch / "train", scratch / "as-it-was", {})}
        for decay in s.weight_decays:
            settings = {**common, "weight_decay": decay}
            tried[decay] = train("natural", scratch / "train", scratch / str(decay), settings, seed=seed, progress=bar)
        tune, names = Cache(scratch / "tune"), [scratch / f"{k}.parquet" for k in range(len(tried))]
        nms = Nms(max_detections=s.detections)
        write_detections(tune, [Output(head, nms, to) for head, to in zip(tried.values(), names, strict=True)])
        results = [path.with_suffix("") for path in names]
        evaluate_files(data / "tune.json", names, results, Options(max_detections=s.detections))
        found = [read_json(path / SUMMARY, "summary")["AP"] for path in results]
        aps = dict(zip(tried, found, strict=True))
        best = max(s.weight_decays, key=lambda decay: aps[decay])
        export(scratch / str(best), scratch / "train", out, Export("torchvision", checkpoint))
    return [{"weight_decay": decay, "tune_AP": round(ap, 4)} for decay, ap in aps.items()]


def run(
    data: Path, out: Path, log: Path | None, s: TrainSettings, last: LastLayerSettings, start: Path | None = None
) -> dict[str, Any]:
    """Train on ``data``, write the checkpoint to ``out`` and the log to ``log``; returns the log. With ``start``, a
    checkpoint of this script, only its last layer is trained on."""
    record: dict[str, Any] = {"last_layer": asdict(last), "torch": torch.__version__}
    wall, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        if start is None:
            start = Path(folder) / out.name
            record |= train_network(data, start, s)
        record["tried"] = converge(start, data, out, last, s.seed)
    record |= {
        "wall_s": round(time.perf_counter() - wall, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "bytes": out.stat().st_size,
    }
    if log is not None:
        write_json(log, record)
    return record


def train_network(data: Path, out: Path, s: TrainSettings) -> dict[str, Any]:
    """Train all layers from random weights and write the checkpoint to ``out``; returns what the log says of it."""
    train_set = load_train_set(data)
    kwargs = {"num_classes": train_set.classes + 1, "image_size": train_set.pixels.shape[1]}
    torch.manual_seed(s.seed)
    model = shapes_detector(**kwargs).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    curve = train_model(model, train_set, s)
    save_detector(model, out, kwargs)
    return {
        "settings": asdict(s),
        "kwargs": kwargs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "pictures": len(train_set.targets),
        "threads": torch.get_num_threads(),
        "loss_curve": curve,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    d = TrainSettings()
    p = argparse.ArgumentParser(
        description="Train the small detector of the procedural set.",
        epilog="example: python data/train_detector.py --data demo/data --out demo/detector.safetensors",
    )
    p.add_argument("--data", type=Path, help="a folder that `calib data shapes` wrote; default: render the demo set")
    p.add_argument("--out", type=Path, required=True, help="the checkpoint to write, for example det.safetensors")
    p.add_argument("--log", type=Path, help="write settings, times and the loss curve here as JSON")
    p.add_argument("--start", type=Path, help="a checkpoint of this script, whose last layer alone is trained on")
    p.add_argument("--epochs", type=float, default=d.epochs, help="passes over the train pictures (%(default)s)")
    p.add_argument("--batch", type=int, default=d.batch, help="pictures per step (%(default)s)")
    p.add_argument("--learning-rate", type=float, default=d.learning_rate, help="peak (%(default)s)")
    p.add_argument("--seed", type=int, default=d.seed, help="of weights, order and mirroring (%(default)s)")
    p.add_argument("--threads", type=int, help="CPU threads; default: as torch decides")
    p.add_argument("--float32", action="store_true", help="train in float32 instead of bfloat16 autocast")
    return p


def main() -> int:
    """Exit code 0, or 2 with one line on stderr that says what to mend."""
    args = parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = TrainSettings(
        epochs=args.epochs,
        batch=args.batch,
        learning_rate=args.learning_rate,
        bf16=not args.float32,
        seed=args.seed,
    )
    try:
        with ExitStack() as stack:
            data = args.data
            if data is None:
                data = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "shapes"
                print("rendering the demo set", file=sys.stderr)
                build(data, ShapesSettings())
            log = run(data, args.out, args.log, settings, LastLayerSettings(), args.start)
    except CalibError as e:
        print(f"error: {e}" + (f"\nhint: {e.hint}" if e.hint else ""), file=sys.stderr)
        return 2
    print(f"{args.out}: {log['bytes'] / 1e6:.1f} MB after {log['wall_s']:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
