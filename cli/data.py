"""``calib data``: data sets that calib makes itself, and parts of others."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import bar, cores, path_or_url, report, show, tell

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
    processes: Annotated[
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
    summary = build(out, settings, processes=processes or cores(), overwrite=overwrite, progress=bar)
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


@app.command(
    epilog="Examples: calib data tile train.json --images pages --size 512 --overlap 64 --empty 0.1 --recount "
    "--out tiles; calib data tile val.json --images pages --size 512 --overlap 64 --out tiles. "
    "At half the size: --scale 0.5. Then calib data untile puts detections of the tiles together again."
)
def tile(
    annotations: Annotated[
        Path, typer.Argument(parser=path_or_url, help="LVIS or COCO json to cut, .json or .json.gz.")
    ],
    images: Annotated[Path, typer.Option(help="Folder in which its pictures lie, as file_name says.")],
    size: Annotated[int, typer.Option(help="Side of the square tiles, in pixels of the scaled page.")],
    out: Annotated[Path, typer.Option(help="Folder to write NAME.json and images/NAME/ to.")],
    overlap: Annotated[int, typer.Option(help="Pixels that neighbouring tiles share at least.")] = 0,
    scale: Annotated[float, typer.Option(help="Scale the pages by this before they are cut.")] = 1.0,
    min_visible: Annotated[
        float, typer.Option(help="Share of a box's area that a tile must show to keep the object.")
    ] = 0.5,
    min_side: Annotated[float, typer.Option(help="Pixels that both sides of what is shown must have.")] = 0.0,
    empty: Annotated[float, typer.Option(help="Share of the tiles without objects that is kept, 0 to 1.")] = 1.0,
    fill: Annotated[int, typer.Option(help="Grey level, 0 to 255, beyond pages that are smaller than a tile.")] = 0,
    recount: Annotated[
        bool,
        typer.Option(
            "--recount",
            help="Write the counts of the tiles into the categories: for train, whose tiles the detector sees. Without "
            "it categories keep the counts that they have.",
        ),
    ] = False,
    name: Annotated[str | None, typer.Option(help="NAME of what is written. Default: that of the json.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw with --empty.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; the result is the same for any number. Default: all cores.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace tiles that are there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as one JSON object.")] = False,
) -> None:
    """Cut large pictures and their boxes into overlapping tiles: a data set of the same form, pictures as PNG.

    A tile keeps an object of which it shows enough, and its box is cut at the
    border. LVIS's lists say of a tile what its page says; a category of which
    a tile shows too little is not judged there. All or nothing is written.
    """
    from calib.tiles.cut import cut_file
    from calib.tiles.grid import Tiling

    tiling = Tiling(size, overlap, scale, min_visible, min_side, empty, fill, seed)
    found = cut_file(
        annotations,
        images,
        out,
        tiling,
        recount=recount,
        name=name,
        threads=threads or cores(),
        overwrite=overwrite,
        progress=bar,
    )
    for notice in found.notices:
        tell(f"note: {notice}")
    report(found.record(), as_json)


@app.command(
    epilog="Example: calib data untile detections/crt.parquet --tiles tiles/val.json --out pages/crt.parquet; then "
    "calib evaluate --annotations val.json --results pages/crt.parquet --max-detections 1000"
)
def untile(
    detections: Annotated[
        Path,
        typer.Argument(parser=path_or_url, help="Detections of tiles: Parquet of calib score, or results json."),
    ],
    tiles: Annotated[Path, typer.Option(parser=path_or_url, help="Json of the tiles, from calib data tile.")],
    out: Annotated[Path, typer.Option(help="Detections of the pages to write (.parquet).")],
    nms_iou: Annotated[
        float, typer.Option(help="Of a category's boxes from different tiles, suppress those that overlap by more.")
    ] = 0.5,
    metric: Annotated[
        str, typer.Option(help="Overlap: iou, or ios, intersection over the smaller box, which finds cut objects too.")
    ] = "iou",
    max_detections: Annotated[int | None, typer.Option(help="Per page, the best. Default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as one JSON object.")] = False,
) -> None:
    """Put detections of tiles together again as detections of their pages, to be evaluated with the json of the pages.

    Boxes are moved and scaled back. What several tiles found of one object is
    suppressed but for the best, by class-wise NMS between tiles.
    """
    from dataclasses import asdict

    from calib.tiles.merge import Merging
    from calib.tiles.merge import untile as merge

    found = merge(detections, tiles, out, Merging(nms_iou, metric, max_detections), progress=bar)
    report({"detections": str(out), **asdict(found)}, as_json)
