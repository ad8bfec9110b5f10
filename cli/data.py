"""``calib data``: data sets that calib makes itself, and parts of others."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import bar, cores, path_or_url, show, tell

app = typer.Typer(no_args_is_help=True, help="Make data sets to try calib on; divide annotation files.")


@app.callback()
def data() -> None:
    """Make data sets to try calib on; divide annotation files."""


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
    typer.echo(json.dumps({"out": str(out), **summary}) if as_json else _in_words(out, summary))


def _in_words(out: Path, s: dict[str, Any]) -> str:
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
    from calib.data.coco_lt import Profile, build, in_words, read_index
    from calib.errors import SettingError

    if (index is None) == (ratio is None):
        raise SettingError("give one of --index and --ratio", hint="calib data coco-lt --help")
    by = Profile(ratio, seed) if ratio is not None else read_index(index) if index else None
    assert by is not None
    summary = build(annotations, out, by, overwrite=overwrite)
    typer.echo(json.dumps({"out": str(out), **summary}) if as_json else in_words(summary, out))


@app.command(
    epilog="Examples: calib data split lvis_v1_val.json --into tune=0.4,test=0.6 --out splits. "
    "Videos stay whole: calib data split val.json --into tune=1/3,test=2/3 --group-by video_id --out splits. "
    "Scenes by the name of the file: --group-by 'file_name:^(scene\\d+)_'. "
    "For cross-fitting: calib data split val.json --folds 5 --rest --out folds"
)
def split(
    annotations: Annotated[
        Path, typer.Argument(parser=path_or_url, help="LVIS or COCO json to divide, .json or .json.gz.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write NAME.json of every part to.")],
    into: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=SHARE,...", help="Parts and their shares of the images, which sum to 1: tune=0.4,test=0.6."
        ),
    ] = None,
    folds: Annotated[
        int | None, typer.Option(help="Instead: so many parts of equal size, fold0.json, fold1.json, ...")
    ] = None,
    rest: Annotated[
        bool, typer.Option("--rest", help="Write NAME-rest.json too: all images that are not in the part.")
    ] = False,
    group_by: Annotated[
        str,
        typer.Option(
            metavar="FIELD[:REGEX]",
            help="Images with the same value in this field stay together, or with the same text where REGEX matches "
            "it (its groups in brackets, if it has some).",
        ),
    ] = "",
    counts_from: Annotated[
        Path | None,
        typer.Option(
            parser=path_or_url,
            help="TRAIN json: its counts are written into the parts and sort categories into bins (default: the "
            "counts that the file has).",
        ),
    ] = None,
    bins: Annotated[str, typer.Option(help="Edges of the bins of training instances in the table.")] = "10,100,1000",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same parts.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the parts hold as one JSON object.")] = False,
) -> None:
    """Divide an annotation file by image: a tune split out of val, or folds.

    Every image is in one part with all its annotations, and records stay as
    they are. Each part gets its share of every category, rare ones first: a
    category of two images is in both of two parts, as far as other categories
    and groups allow. Images without objects are spread like a category.
    """
    from calib.data.shares import fold_shares, parse_shares
    from calib.data.split import Division, split_file
    from calib.errors import SettingError

    from .evaluate import parse_bins

    if (into is None) == (folds is None):
        raise SettingError("give one of --into and --folds", hint="calib data split --help")
    shares = parse_shares(into) if into is not None else fold_shares(folds or 0)
    division = Division(shares, seed, group_by, counts_from, parse_bins(bins), rest)
    parts = split_file(annotations, out, division, overwrite=overwrite, progress=bar)
    for notice in parts.notices:
        tell(f"note: {notice}")
    show([parts], {"out": str(out), "seed": seed, **parts.record()}, as_json)
