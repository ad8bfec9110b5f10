"""Train a small detector on a LVIS or COCO json, as the shipped shapes_detector.safetensors was trained.

The whole network is trained first. Its last layer is then trained on alone, on the cached features of the train split,
until it has converged; the weight decay with the best AP on the tune split is taken. So the detector's own classifier
is what plain training can reach, and what a method adds to it is not training time. Without a tune split that is left
out. Killed, the same command goes on: what it has lies in OUT.training until OUT is written.

Needs calib with its torchvision extra installed. On the procedural set about six minutes on two CPU cores. The run is a
function of its settings, but not bit for bit across machines, thread counts and numbers of processes.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from calib.artifact import Artifact, load
from calib.cache import Cache
from calib.cli.console import bar, exit_code
from calib.data.anchors import fit_anchors
from calib.data.detector import BACKBONES, SMALL, save_detector, shapes_detector
from calib.data.detector_training import Store, TrainSettings, train_model
from calib.data.plan import ShapesSettings
from calib.data.shapes import build
from calib.data.train_set import TrainSet, box_sides
from calib.errors import ExistsError, InputError, SettingError
from calib.evaluate.evaluate_files import Options, evaluate_files
from calib.export.export import Export, export
from calib.extract.dataset import Dataset, read_image
from calib.extract.extraction import extract
from calib.extract.options import Extraction
from calib.extract.torchvision import open_detector
from calib.files import hash_file, read_json, rename_durably, require, write_json
from calib.layout import SUMMARY
from calib.parallel.distributed import ALONE, World, joined, launch
from calib.score.detections import Output, write_detections
from calib.settings import Nms
from calib.training import train

HELD_BYTES = 4 << 30  # of pictures in memory, beyond which they are read for every batch


@dataclass(frozen=True)
class Source:
    """A json and the folder of its pictures; ``tune`` is the json that the last layer's weight decay is chosen on."""

    annotations: Path
    images: Path
    tune: Path | None = None

    @classmethod
    def of_folder(cls, data: Path) -> "Source":
        """What ``calib data shapes`` wrote."""
        return cls(data / "train.json", data / "images", data / "tune.json")


@dataclass(frozen=True)
class NetworkSettings:
    """The detector that is trained; None stands for ``shapes_detector``'s default.

    ``anchors``: of its defaults, or fitted to the data with ``anchor_sizes`` per level and ``anchor_ratios``.
    ``image_size``: None for the longest side of all pictures.
    """

    anchors: str = "default"
    anchor_sizes: int = 1
    anchor_ratios: int = 3
    proposals: int | None = None
    rois: int | None = None
    image_size: int | None = None
    backbone: str = SMALL
    backbone_weights: Path | None = None

    def __post_init__(self) -> None:
        if self.anchors not in ("default", "data"):
            raise SettingError(f"anchors are '{self.anchors}': expected default or data")
        if self.backbone_weights is not None and self.backbone == SMALL:
            raise SettingError("there are no weights for the small backbone", hint="--backbone efficientnet-lite0")
        for name in ("proposals", "rois", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} is {value}: expected at least 1")


@dataclass(frozen=True)
class LastLayerSettings:
    """Settings of the method ``natural``, and the weight decays that are tried. AP on tune is of ``detections`` per
    image, LVIS's own ratio to the number of proposals. 0 steps leave the layer as it is."""

    steps: int = 15_000
    learning_rate: float = 0.4
    weight_decays: tuple[float, ...] = (1e-5, 3e-5, 1e-4)
    detections: int = 45


@dataclass
class Pictures:
    """Pictures by number: held in memory up to a size, the others read when they are asked for. Grey ones are kept as
    one plane."""

    records: list[dict[str, Any]]
    folder: Path
    _held: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)
    _bytes: int = 0

    def __getitem__(self, i: int) -> npt.NDArray[np.uint8]:
        if i in self._held:
            return self._held[i]
        pixels = read_image(self.records[i], self.folder)
        if (pixels[..., :1] == pixels[..., 1:]).all():
            pixels = np.ascontiguousarray(pixels[..., 0])
        if self._bytes + pixels.nbytes <= HELD_BYTES:
            self._held[i] = pixels
            self._bytes += pixels.nbytes
        return pixels

    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of all, which are all looked at: a damaged picture is found before the training begins."""
        return [(self[i].shape[0], self[i].shape[1]) for i in range(len(self.records))]


def load_train_set(dataset: Dataset, images: Path) -> TrainSet:
    """The pictures of ``dataset`` that have objects.

    Raises:
        InputError: no picture has objects.
    """
    found = [(record, dataset.objects(record["id"])) for record in dataset.images]
    found = [(record, objects) for record, objects in found if len(objects.boxes)]
    if not found:
        raise InputError(
            f"{dataset.annotations_file} holds no picture with objects", hint="give the json of a train split"
        )
    targets = [
        {"boxes": torch.from_numpy(o.boxes), "labels": torch.from_numpy(np.asarray(o.label, np.int64) + 1)}
        for _, o in found
    ]
    pictures = Pictures([record for record, _ in found], require(images, "folder of pictures"))
    return TrainSet(pictures, targets, len(dataset.categories), dataset.categories.name)


def network_arguments(train_set: TrainSet, sizes: list[tuple[int, int]], n: NetworkSettings) -> dict[str, Any]:
    """Arguments of ``shapes_detector``, those that are not its defaults. Fitted anchors are printed on stderr."""
    size = n.image_size or max(map(max, sizes))
    found: dict[str, Any] = {"num_classes": train_set.classes + 1, "image_size": size}
    if n.anchors == "data":
        anchors = fit_anchors(*box_sides(train_set, sizes, size), per_level=n.anchor_sizes, ratios=n.anchor_ratios)
        print("anchors", anchors.record(), file=sys.stderr)
        found |= {"anchor_sizes": anchors.sizes, "anchor_ratios": anchors.ratios, "roi_levels": 3}
    if n.proposals is not None:
        found |= {"proposals": n.proposals, "train_proposals": max(1, 4 * n.proposals // 5)}
    if n.rois is not None:
        found |= {"rois_per_image": n.rois, "anchors_per_image": max(128, n.rois)}
    if n.backbone != SMALL:
        found["backbone"] = n.backbone
    return found


def converge(
    checkpoint: Path, source: Source, out: Path, scratch: Path, s: LastLayerSettings, seed: int = 0
) -> list[dict[str, float]]:
    """Train the last layer of the detector ``checkpoint`` on, and write the checkpoint with it to ``out``; ``scratch``
    is a folder for caches and heads, from which it goes on.

    Returns the AP on tune of the layer as it was (weight decay -1) and of every weight decay.

    Raises:
        CalibError: a split is missing or damaged, or the checkpoint is none of this script.
    """
    assert source.tune is not None
    adapter = open_detector(str(checkpoint), torch.device("cpu"))
    for name, path, mode in (("train", source.annotations, "train"), ("tune", source.tune, "test")):
        dataset, to = Dataset.read(path, counts_from=source.annotations), scratch / name
        extract(adapter, dataset, source.images, to, Extraction(mode=mode), resume=to.exists(), progress=bar)
    common = {"steps": s.steps, "lr": s.learning_rate, "schedule": "cosine", "warmup_steps": 100}
    tried = {-1.0: _head("softmax", scratch, "as-it-was", {}, seed)}
    for decay in s.weight_decays:
        tried[decay] = _head("natural", scratch, str(decay), {**common, "weight_decay": decay}, seed)
    tune, names = Cache(scratch / "tune"), [scratch / f"{k}.parquet" for k in range(len(tried))]
    nms = Nms(max_detections=s.detections)
    write_detections(tune, [Output(head, nms, to) for head, to in zip(tried.values(), names, strict=True)])
    results = [path.with_suffix("") for path in names]
    style = "coco" if tune.manifest.style == "coco" else "lvis"
    evaluate_files(source.tune, names, results, Options(style=style, max_detections=s.detections))
    found = [read_json(path / SUMMARY, "summary")["AP"] for path in results]
    aps = dict(zip(tried, found, strict=True))
    best = max(s.weight_decays, key=lambda decay: aps[decay])
    export(scratch / str(best), scratch / "train", out, Export("torchvision", checkpoint))
    return [{"weight_decay": decay, "tune_AP": round(ap, 4)} for decay, ap in aps.items()]


def _head(method: str, scratch: Path, name: str, settings: dict[str, Any], seed: int) -> Artifact:
    """Trained on the cache of train, or as it was left."""
    if (scratch / name / "head.json").is_file():
        return load(scratch / name)
    return train(method, scratch / "train", scratch / name, settings, seed=seed, progress=bar)


def run(
    source: Source,
    out: Path,
    log: Path | None,
    s: TrainSettings,
    last: LastLayerSettings,
    start: Path | None = None,
    *,
    network: NetworkSettings | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """Train on ``source``, write the checkpoint to ``out`` and the log to ``log``; returns the log. With ``start``, a
    checkpoint of this script, only its last layer is trained on."""
    record: dict[str, Any] = {"last_layer": asdict(last), "torch": torch.__version__}
    wall, cpu = time.perf_counter(), time.process_time()
    network = network or NetworkSettings()
    files = [hash_file(require(path, "file")) for path in (source.annotations, source.tune, start) if path is not None]
    asked = {"files": files, "settings": asdict(s), "last": asdict(last), "network": asdict(network)}
    work = _work(out.with_name(f"{out.name}.training"), asked | {"processes": processes})
    if start is None:
        start, done = work / out.name, work / "network.json"
        if not done.exists():
            arguments = (source, start, s, network)
            write_json(done, launch(processes, _rank, *arguments)[0] if processes > 1 else train_network(*arguments))
        record |= read_json(done, "log")
    if source.tune is not None and last.steps:
        record["tried"] = converge(start, source, out, work, last, s.seed)
    else:
        shutil.copyfile(start, work / "whole")
        rename_durably(work / "whole", out)
    record |= {
        "wall_s": round(time.perf_counter() - wall, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "bytes": out.stat().st_size,
    }
    if log is not None:
        write_json(log, record)
    shutil.rmtree(work)
    return record


def _work(folder: Path, asked: dict[str, Any]) -> Path:
    """The folder to go on from, if what is asked for is what it was begun for."""
    about, asked = folder / "asked.json", json.loads(json.dumps(asked, default=str))
    if about.exists() and read_json(about, "settings") != asked:
        raise ExistsError(
            f"{folder} is of a training with other options or data",
            hint="give the same options to go on, or remove it to begin anew",
        )
    write_json(about, asked)
    return folder


def _rank(*arguments: Any) -> dict[str, Any]:
    """One of several processes."""
    with joined(torch.device("cpu")) as world:
        return train_network(*arguments, world=world)


def train_network(
    source: Source, out: Path, s: TrainSettings, network: NetworkSettings, *, world: World = ALONE
) -> dict[str, Any]:
    """Train all layers and write the checkpoint to ``out``; returns what the log says of it. Weights are random at
    first, but for a backbone's that are given."""
    dataset = Dataset.read(source.annotations)
    for notice in dataset.notices:
        print(f"note: {notice}", file=sys.stderr)
    train_set = load_train_set(dataset, source.images)
    assert isinstance(train_set.pixels, Pictures)
    kwargs = network_arguments(train_set, train_set.pixels.sizes(), network)
    torch.manual_seed(s.seed)
    model: Any = shapes_detector(**kwargs)
    if network.backbone_weights is not None:
        model.backbone.load_imagenet(network.backbone_weights)
    model = model.to(memory_format=torch.channels_last)
    identity = {"data": dataset.digest(), "settings": asdict(s), "kwargs": kwargs}
    identity["weights"] = str(network.backbone_weights)
    curve = train_model(model, train_set, s, world=world, store=Store(out.with_suffix(".state"), identity))
    if world.rank == 0:
        save_detector(model, out, kwargs, classes=train_set.names)
    return {
        "settings": asdict(s),
        "kwargs": kwargs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "pictures": len(train_set.targets),
        "threads": torch.get_num_threads(),
        "processes": world.size,
        "loss_curve": curve,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    d, n, last = TrainSettings(), NetworkSettings(), LastLayerSettings()
    p = argparse.ArgumentParser(
        description="Train a small detector, on the procedural set or on any LVIS or COCO json.",
        epilog="examples: python data/train_detector.py --data demo/data --out demo/detector.safetensors; "
        "python data/train_detector.py --annotations tiles/train.json --tune tiles/tune.json --images tiles/images "
        "--proposals 300 --rois 192 --no-mirror --out detector.safetensors",
    )
    p.add_argument("--data", type=Path, help="a folder that `calib data shapes` wrote; default: render the demo set")
    p.add_argument("--annotations", type=Path, help="instead: the LVIS or COCO json of the train split")
    p.add_argument("--images", type=Path, help="the folder of its pictures, and of those of --tune")
    p.add_argument("--tune", type=Path, help="the json that the last layer's weight decay is chosen on")
    p.add_argument("--out", type=Path, required=True, help="the checkpoint to write, for example det.safetensors")
    p.add_argument("--log", type=Path, help="write settings, times and the loss curve here as JSON")
    p.add_argument("--start", type=Path, help="a checkpoint of this script, whose last layer alone is trained on")
    p.add_argument("--epochs", type=float, default=d.epochs, help="passes over the train pictures (%(default)s)")
    p.add_argument("--batch", type=int, default=d.batch, help="pictures per step (%(default)s)")
    p.add_argument("--learning-rate", type=float, default=d.learning_rate, help="peak (%(default)s)")
    p.add_argument("--warmup-steps", type=int, default=d.warmup_steps, help="until the peak (%(default)s)")
    p.add_argument("--no-mirror", action="store_true", help="do not mirror pictures: for text, scores, maps")
    p.add_argument("--seed", type=int, default=d.seed, help="of weights, order and mirroring (%(default)s)")
    p.add_argument(
        "--anchors", choices=("default", "data"), help="fit anchors to the boxes (default with --annotations)"
    )
    p.add_argument("--anchor-sizes", type=int, default=n.anchor_sizes, help="fitted sizes per level (%(default)s)")
    p.add_argument("--anchor-ratios", type=int, default=n.anchor_ratios, help="fitted ratios (%(default)s)")
    p.add_argument("--proposals", type=int, help="per picture (150)")
    p.add_argument("--rois", type=int, help="sampled per picture in training (64)")
    p.add_argument("--image-size", type=int, help="to which the longer side is scaled (the longest side of all)")
    p.add_argument("--backbone", choices=tuple(BACKBONES), default=n.backbone, help="(%(default)s)")
    p.add_argument("--backbone-weights", type=Path, help="ImageNet weights of it, a .pth file")
    p.add_argument("--last-layer-steps", type=int, default=last.steps, help="0: leave the layer (%(default)s)")
    p.add_argument("--detections", type=int, default=last.detections, help="per image, of AP on tune (%(default)s)")
    p.add_argument("--processes", type=int, default=1, help="that share every batch (%(default)s)")
    p.add_argument(
        "--save-every", type=int, default=d.save_every, help="steps between states to go on from (%(default)s)"
    )
    p.add_argument("--threads", type=int, help="CPU threads; default: as torch decides")
    p.add_argument("--float32", action="store_true", help="train in float32 instead of bfloat16 autocast")
    return p


def _settings(args: argparse.Namespace) -> tuple[TrainSettings, LastLayerSettings, NetworkSettings]:
    settings = TrainSettings(
        epochs=args.epochs,
        batch=args.batch,
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup_steps,
        bf16=not args.float32,
        seed=args.seed,
        mirror=not args.no_mirror,
        save_every=args.save_every,
    )
    last = LastLayerSettings(steps=args.last_layer_steps, detections=args.detections)
    anchors = args.anchors or ("data" if args.annotations else "default")
    sizes = (args.anchor_sizes, args.anchor_ratios, args.proposals, args.rois, args.image_size)
    return settings, last, NetworkSettings(anchors, *sizes, args.backbone, args.backbone_weights)


def _source(args: argparse.Namespace, stack: ExitStack) -> Source:
    if args.annotations is not None:
        if args.data is not None or args.images is None:
            raise SettingError("--annotations goes with --images, and not with --data", hint="see --help")
        return Source(args.annotations, args.images, args.tune)
    if args.data is None:
        args.data = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "shapes"
        print("rendering the demo set", file=sys.stderr)
        build(args.data, ShapesSettings())
    return Source.of_folder(args.data)


def main() -> int:
    """Exit code 0, or 2 with one line on stderr that says what to mend."""
    args = parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return exit_code(lambda: _train(args))


def _train(args: argparse.Namespace) -> None:
    with ExitStack() as stack:
        settings, last, network = _settings(args)
        source = _source(args, stack)
        log = run(source, args.out, args.log, settings, last, args.start, network=network, processes=args.processes)
    print(f"{args.out}: {log['bytes'] / 1e6:.1f} MB after {log['wall_s']:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
