"""``calib data``: data sets that calib makes itself."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import bar, cores

app = typer.Typer(no_args_is_help=True, help="Make data sets to try calib on.")


@app.callback()
def data() -> None:
    """Make data sets to try calib on."""


@app.command(
    epilog="Example: calib data shapes --out demo/data. A small set in seconds: "
    "calib data shapes --out small --categories 24 --images 100 --val-per-category 8"
)
def shapes(
    out: Annotated[Path, typer.Option(help="Folder to write; it appears complete or not at all.")],
    images: Annotated[
        int | None,
        typer.Option(
            "--images",
            "--train-images",
            min=1,
            help="Train images. Default: what the counts fill, 3,430 for the demo set. Another number "
            "scales the counts of instances, but none below --floor.",
        ),
    ] = None,
    categories: Annotated[int, typer.Option(min=1, help="Number of categories.")] = 192,
    families: Annotated[
        int | None,
        typer.Option(min=1, help="Groups of look-alikes. Default: one per twelve categories, at most 60."),
    ] = None,
    floor: Annotated[int, typer.Option(min=1, help="Least number of train objects per category.")] = 3,
    tune_per_category: Annotated[int, typer.Option(min=1, help="Objects per category in tune.json.")] = 13,
    val_per_category: Annotated[int, typer.Option(min=1, help="Objects per category in val.json.")] = 25,
    size: Annotated[int, typer.Option(help="Side of the square images in pixels, at least 68.")] = 144,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 2718,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that render; the result is the same for any number. Default: all cores."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a set that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Render a long-tailed detection set in LVIS v1 format: train.json, tune.json, val.json and images/.

    Families of look-alike shapes whose frequencies follow the LVIS curve, from three instances to more than
    a thousand. Tune and val hold equally many objects of every category. The shipped detector is trained on
    the default set; for other settings train one with data/train_detector.py.
    """
    from calib.data.plan import ShapesSettings
    from calib.data.render import Scene
    from calib.data.shapes import build

    settings = ShapesSettings(
        seed=seed,
        categories=categories,
        families=families,
        images=images,
        floor=floor,
        tune_per_category=tune_per_category,
        val_per_category=val_per_category,
        scene=Scene(size_px=size),
    )
    summary = build(out, settings, workers=workers or cores(), overwrite=overwrite, progress=bar)
    typer.echo(json.dumps({"out": str(out), **summary}) if as_json else _told(out, summary))


def _told(out: Path, s: dict[str, Any]) -> str:
    few, some, many, most = s["categories_per_instance_bin"]
    lines = [
        f"{split:5} {s['images'][split]:6,} images {s['annotations'][split]:7,} boxes  {out / split}.json"
        for split in ("train", "tune", "val")
    ]
    lines.append(
        f"{s['categories']} categories, by train instances: {few} below 10, {some} to 99, {many} to 999, {most} above"
    )
    return "\n".join(lines)


@app.command(
    "coco-lt",
    epilog="Examples: calib data coco-lt --annotations instances_train2017.json "
    "--index class_to_imageid_and_inscount_coco_sampled.pt --out coco_lt_train.json. "
    "Any COCO json by a profile: calib data coco-lt --annotations train.json --ratio 0.001 --out tail.json",
)
def coco_lt(
    annotations: Annotated[Path, typer.Option(help="COCO json, .json or .json.gz: instances_train2017.json.")],
    out: Annotated[Path, typer.Option(help="json to write.")],
    index: Annotated[
        Path | None,
        typer.Option(
            help="The index that COCO-LT's authors publish (twangnh/SimCal, "
            "class_to_imageid_and_inscount_coco_sampled.pt; read without running it), or an .npz of the same."
        ),
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Instead: an exponential profile, smallest class over largest.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw with --ratio.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Make a long-tailed part of COCO: rare classes lose annotations, not pictures.

    The json has the counts that methods and bins go by. Evaluate with calib evaluate --style coco --bins 20,400,8000.
    """
    from calib.data.coco_lt import Profile, build, read_index, told
    from calib.errors import SettingError

    if (index is None) == (ratio is None):
        raise SettingError("give one of --index and --ratio", hint="calib data coco-lt --help")
    by = Profile(ratio, seed) if ratio is not None else read_index(index) if index else None
    assert by is not None
    summary = build(annotations, out, by, overwrite=overwrite)
    typer.echo(json.dumps({"out": str(out), **summary}) if as_json else told(summary, out))
