"""``calib extract``."""

from pathlib import Path
from typing import Annotated

import typer


def extract(
    detector: Annotated[
        str,
        typer.Option(
            help="torchvision:CHECKPOINT.safetensors, torchvision:NAME, torchvision:package.module:factory, "
            "transformers:FOLDER, detectron2:CONFIG.yaml, detectron2:package.module:factory, mmdet:CONFIG.py"
        ),
    ],
    annotations: Annotated[Path, typer.Option(help="LVIS or COCO json (.json or .json.gz)")],
    images: Annotated[Path, typer.Option(help="folder of pictures")],
    out: Annotated[Path, typer.Option(help="cache folder to write")],
    mode: Annotated[
        str, typer.Option(help="train: proposals labelled and sampled as in training; test: every proposal")
    ] = "test",
    weights: Annotated[Path | None, typer.Option(help="state dict for a factory (.safetensors or .pth)")] = None,
    detector_args: Annotated[str, typer.Option(help="JSON object of arguments for a factory")] = "",
    counts_from: Annotated[
        Path | None,
        typer.Option(help="TRAIN json to take category counts from (default: the annotation file's own)"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="float16 or float32")] = "float16",
    logits: Annotated[str, typer.Option(help="full, probe (a few rows per shard) or none")] = "full",
    roi_maps: Annotated[
        bool, typer.Option("--roi-maps", help="keep pooled RoI maps too, for heads that train on them (large)")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="images per forward pass")] = 8,
    images_per_shard: Annotated[int, typer.Option(help="images per committed shard: what a kill can cost")] = 256,
    seed: Annotated[int, typer.Option(help="of the choice of training proposals")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="go on after the last committed shard")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Run a frozen detector once over a data set and write its feature cache.

    Examples:

    calib extract --detector torchvision:detector.safetensors --annotations train.json --images images
    --mode train --out caches/train

    calib extract --detector torchvision:fasterrcnn_resnet50_fpn --detector-args '{"num_classes": 1204}'
    --weights w.pth --annotations lvis_v1_val.json --images val2017 --counts-from lvis_v1_train.json
    --out caches/val

    An interrupted run goes on with the same command and --resume.
    """
    import time

    from calib.devices import choose_device
    from calib.extract.dataset import Dataset
    from calib.extract.frameworks import open_detector
    from calib.extract.run import Extraction
    from calib.extract.run import extract as run

    from .console import bar, report

    settings = Extraction(mode, dtype, logits, batch_size, images_per_shard, seed, roi_maps)
    dataset = Dataset.read(annotations, counts_from=counts_from)
    adapter = open_detector(detector, choose_device(device), weights=weights, arguments=detector_args)
    start = time.perf_counter()
    manifest = run(adapter, dataset, images, out, settings, resume=resume, progress=bar)
    seconds = time.perf_counter() - start
    size = sum(f["bytes"] for s in manifest.shards for f in s.files.values())
    report(
        {
            "cache": str(out),
            "images": len(dataset.images),
            "rows": manifest.rows,
            "bytes": size,
            "seconds": round(seconds, 2),
            "images_per_second": round(len(dataset.images) / seconds, 1),
        },
        as_json,
    )
