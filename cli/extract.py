"""``calib extract``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import path_or_url, tell
from .engine import Address, Cpus, Engine, check_shared
from .engine import engine as chosen

if TYPE_CHECKING:
    from calib.cache import Manifest
    from calib.extract.adapter import Adapter
    from calib.extract.dataset import Dataset

_Detector = Annotated[
    str,
    typer.Option(
        help="torchvision:CHECKPOINT.safetensors, torchvision:NAME, torchvision:package.module:factory, "
        "transformers:FOLDER, detectron2:CONFIG (.yaml, .py), detectron2:package.module:factory, mmdet:CONFIG.py"
    ),
]
_Annotations = Annotated[Path, typer.Option(parser=path_or_url, help="LVIS or COCO json (.json or .json.gz)")]
_Images = Annotated[Path, typer.Option(help="folder of pictures")]
_Out = Annotated[str, typer.Option(metavar="<path or URL>", help="cache folder to write; s3:// and gs:// work too")]
_Mode = Annotated[str, typer.Option(help="train: proposals labelled and sampled as in training; test: every proposal")]
_Weights = Annotated[Path | None, typer.Option(help="state dict for a factory (.safetensors or .pth)")]
_DetectorArgs = Annotated[str, typer.Option(help="JSON object of arguments for a factory")]
_CountsFrom = Annotated[
    Path | None,
    typer.Option(
        parser=path_or_url, help="TRAIN json to take category counts from (default: the annotation file's own)"
    ),
]
_ById = Annotated[
    bool,
    typer.Option(
        "--classes-by-id",
        help="output k of the detector is category id k, as in torchvision's COCO detectors; ids that the annotation "
        "file leaves out become categories without objects",
    ),
]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
_Precision = Annotated[str, typer.Option(help="of the detector's forward pass: fp32, or bf16 and fp16 by autocast")]
_Dtype = Annotated[str, typer.Option(help="float16 or float32")]
_Logits = Annotated[str, typer.Option(help="full, probe (a few rows per shard) or none")]
_RoiMaps = Annotated[
    bool, typer.Option("--roi-maps", help="keep pooled RoI maps too, for heads that train on them (large)")
]
_BatchSize = Annotated[int, typer.Option(help="images per forward pass")]
_ImagesPerShard = Annotated[int, typer.Option(help="images per committed shard: what a kill can cost")]
_MaxShardBytes = Annotated[
    str,
    typer.Option(
        help="fewer images per shard, so that none is larger unless one image is: 256MB, 1GiB, bytes; 0: no limit"
    ),
]
_Shard = Annotated[
    str,
    typer.Option(
        help="i/N: only part i (0 to N - 1) of the shards, into a cache of its own, for calib cache merge; env: "
        "the part of this process under torchrun or Slurm, whose number replaces {shard} in --out"
    ),
]
_Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="each with a detector; the cache is the same [default: 1; of --engine ray as many as find room]",
    ),
]
_CheckImages = Annotated[
    int,
    typer.Option(
        min=0,
        help="images on which the cache's rows must give the detector's own detections before anything is written; 0: "
        "go on unproved, and the cache says so",
    ),
]
_Seed = Annotated[int, typer.Option(help="of the choice of training proposals")]
_Resume = Annotated[bool, typer.Option("--resume", help="go on after the last committed shard")]
_AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]


def extract(
    detector: _Detector,
    annotations: _Annotations,
    images: _Images,
    out: _Out,
    mode: _Mode = "test",
    weights: _Weights = None,
    detector_args: _DetectorArgs = "",
    counts_from: _CountsFrom = None,
    classes_by_id: _ById = False,
    device: _Device = "auto",
    precision: _Precision = "fp32",
    dtype: _Dtype = "float16",
    logits: _Logits = "full",
    roi_maps: _RoiMaps = False,
    batch_size: _BatchSize = 8,
    images_per_shard: _ImagesPerShard = 256,
    max_shard_bytes: _MaxShardBytes = "0",
    shard: _Shard = "0/1",
    processes: _Processes = None,
    engine: Engine = "local",
    address: Address = None,
    cpus: Cpus = 1.0,
    check_images: _CheckImages = 4,
    seed: _Seed = 0,
    resume: _Resume = False,
    as_json: _AsJson = False,
) -> None:
    """Run a frozen detector once over a data set and write its feature cache.

    Examples:

    calib extract --detector torchvision:detector.safetensors --annotations train.json --images images
    --mode train --out caches/train

    calib extract --detector torchvision:fasterrcnn_resnet50_fpn --detector-args '{"num_classes": 1204}'
    --weights w.pth --annotations lvis_v1_val.json --images val2017 --counts-from lvis_v1_train.json
    --out caches/val

    calib extract --shard env --out 'caches/train-{shard}' ...   (under torchrun or srun; then)
    calib cache merge caches/train-* --out caches/train

    calib extract ... --engine ray --address auto   (--device cuda, or auto where the cluster has GPUs: one per worker)

    An interrupted run goes on with the same command and --resume.
    """
    import time
    from dataclasses import replace

    from calib.extract.dataset import Dataset
    from calib.extract.extraction import Division
    from calib.extract.extraction import extract as run
    from calib.extract.opener import Opener, local_rank
    from calib.extract.options import Extraction
    from calib.parallel.part import Part
    from calib.settings import parse_bytes
    from calib.storage import parse

    from .console import bar, report

    most = parse_bytes(max_shard_bytes)
    settings = Extraction(mode, dtype, logits, batch_size, images_per_shard, seed, roi_maps, most, check_images)
    part = Part.parse(shard)
    gpus = None if device == "auto" else float(device.startswith("cuda"))
    cluster = chosen(engine, address, None if engine == "local" else processes, cpus, gpus)
    if cluster is not None:
        check_shared(out)
    place = parse(out.replace("{shard}", str(part.index)))
    opener = Opener(detector, device, weights, detector_args, precision)
    dataset = Dataset.read(annotations, counts_from=counts_from)
    alone = (
        processes or 1
    ) == 1 and cluster is None  # else this process computes nothing: no room is taken on the device
    adapter = opener(local_rank() if shard == "env" else 0) if alone else replace(opener, device="cpu")(0)
    dataset = _in_order(adapter, dataset, classes_by_id)
    start = time.perf_counter()
    more = Division(part, processes or 1, opener, cluster)
    manifest = run(adapter, dataset, images, place, settings, more, resume=resume, progress=bar)
    report(_metrics(place, manifest, time.perf_counter() - start), as_json)


def _in_order(adapter: "Adapter", dataset: "Dataset", classes_by_id: bool) -> "Dataset":
    """The data set with its categories in the order of the detector's classes. Notes say what is odd about it,
    and which order that is, if it is not by ascending category id."""
    from calib.extract.classes import by_id, in_class_order

    for notice in dataset.notices:
        tell(f"note: {notice}")
    dataset = by_id(dataset, adapter.detector.num_classes) if classes_by_id else in_class_order(adapter, dataset)
    ids = dataset.categories.category_id.tolist()
    if ids != sorted(ids):
        by_name = adapter.classes.order == "names"
        source = "its names" if by_name else "the TRAIN json (--counts-from, else --annotations)"
        tell(f"note: classes are not in ascending category id: the detector's are in the order of {source}")
    return dataset


def _metrics(out: object, manifest: "Manifest", seconds: float) -> dict[str, Any]:
    images = sum(s.images for s in manifest.shards)
    return {
        "cache": str(out),
        "digest": manifest.digest,
        "proof": manifest.proof_text(),
        "images": images,
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "bytes": sum(f["bytes"] for s in manifest.shards for f in s.files.values()),
        "seconds": round(seconds, 2),
        "images_per_second": round(images / seconds, 1),
    }
