"""``calib export``."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    head: Annotated[Path, typer.Argument(help="head folder, MODELS/NAME/VERSION")],
    to: Annotated[
        str,
        typer.Option(
            help="torchvision, detectron2, mmdet, transformers, ultralytics (a checkpoint), module, layer, onnx, "
            "torch, torchscript or triton"
        ),
    ],
    cache: Annotated[Path, typer.Option(help="a cache of the head's detector, on whose rows the export is compared")],
    out: Annotated[Path, typer.Option(help="file to write; triton: the model repository")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="the detector's own, which is read and left alone (.pth, .pkl, .safetensors; transformers: a folder)"
        ),
    ] = None,
    layer: Annotated[str, typer.Option(help="its classification layer [default: as the framework calls it]")] = "",
    part: Annotated[str, typer.Option(help="one head of a composed one: tail, rest, one, other")] = "",
    name: Annotated[str, typer.Option(help="triton: the model's name [default: the head's]")] = "",
    rows: Annotated[int, typer.Option(help="rows of the cache to compare on")] = 2048,
    tolerance: Annotated[float, typer.Option(help="largest difference of a score that is accepted")] = 1e-5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="triton: replace a version")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Write a head for use without calib, compared with the head on cached rows before it is left behind.

    Examples:

    calib export models/crt/1 --to torchvision --checkpoint detector.pth --cache caches/val --out crt.pth

    calib export models/bags/1 --to onnx --cache caches/val --out bags.onnx

    calib export models/simcal/1 --part tail --to mmdet --checkpoint epoch_12.pth --cache caches/val --out tail.pth
    """
    from calib.export.export import Export
    from calib.export.export import export as run
    from calib.extract.frameworks import checkpoint_reader

    from .console import report

    wanted = Export(to, checkpoint, layer, part, name, rows, tolerance, overwrite, checkpoint_reader(to))
    report(run(head, cache, out, wanted), as_json)
