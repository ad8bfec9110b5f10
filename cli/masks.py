"""``calib masks``."""

from pathlib import Path
from typing import Annotated

import typer


def masks(
    detections: Annotated[Path, typer.Option(help="detections of calib score (.parquet, or results json)")],
    detector: Annotated[str, typer.Option(help="as for calib extract, with masks: torchvision:, detectron2:, mmdet:")],
    annotations: Annotated[Path, typer.Option(help="LVIS or COCO json of the split")],
    images: Annotated[Path, typer.Option(help="folder of pictures")],
    out: Annotated[Path, typer.Option(help="results json to write, with masks")],
    weights: Annotated[Path | None, typer.Option(help="of the detector (.safetensors or .pth)")] = None,
    detector_args: Annotated[str, typer.Option(help="JSON object, as for calib extract")] = "",
    counts_from: Annotated[
        Path | None, typer.Option(help="TRAIN json, whose order of categories mmdetection's classes have")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Run a detector's mask branch on rescored detections, for mask AP.

    Interrupted, the same command goes on behind the images that are done.

    Example: calib masks --detections bags.parquet --detector torchvision:maskrcnn_resnet50_fpn --weights w.pth
    --detector-args '{"num_classes": 1204}' --annotations lvis_v1_val.json --images val2017 --out bags_masks.json

    Example: calib masks --detections bags.parquet --detector detectron2:mask_rcnn.yaml --weights model_final.pth
    --annotations lvis_v1_val.json --images val2017 --out bags_masks.json

    Then: calib evaluate --iou-type segm --annotations lvis_v1_val.json --results bags_masks.json --out results/bags
    """
    from calib.extract.dataset import Dataset
    from calib.extract.frameworks import open_detector
    from calib.extract.masks import MaskRun, write_masks
    from calib.parallel.devices import choose_device

    from .console import bar, report, tell

    dataset = Dataset.read(annotations, counts_from=counts_from)
    adapter = open_detector(detector, choose_device(device), weights=weights, arguments=detector_args)
    count = write_masks(MaskRun(adapter, dataset, images, detections, out), progress=bar, tell=tell)
    report({"results": str(out), "masks": count, "images": len(dataset.images)}, as_json)
