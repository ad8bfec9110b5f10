"""``calib import``."""

from pathlib import Path
from typing import Annotated

import typer


def import_(
    rows: Annotated[list[Path], typer.Option(help="rows: .npz, .parquet, .arrow, or a folder of them; repeatable")],
    classifier: Annotated[
        Path, typer.Option(help="weight [C+1, D], bias, ... of the last layer: .safetensors or .npz")
    ],
    annotations: Annotated[Path, typer.Option(help="LVIS or COCO json (.json or .json.gz)")],
    out: Annotated[Path, typer.Option(help="cache folder to write")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="what arrays do not say, see below: key=value; repeatable")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="train: labelled, foreground first, ignored rows left out; test: every row as it is")
    ] = "test",
    name: Annotated[str, typer.Option(help="what to call the detector")] = "",
    counts_from: Annotated[
        Path | None,
        typer.Option(help="TRAIN json to take category counts from (default: the annotation file's own)"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on after the last committed shard")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")] = False,
) -> None:
    """Write a feature cache from arrays of any detector: no pictures, no framework.

    Rows have image_id, boxes (x1, y1, x2, y2 in pixels), features (the input of the detector's last layer) and, where
    there are, logits, objectness, refined, label, is_gt, net_height, net_width: docs/raw.md.

    Settings: activation=softmax, sigmoid or seesaw, background_first, nms_iou (1: no suppression), score_threshold,
    max_detections, box_weights, dtype=float16 or float32, logits=full, probe or none, foreground_iou, one_to_one,
    rows_per_image (of mode train; 0 keeps all), foreground_share, images_per_shard, seed; of a cascade average
    (probabilities or logits) and next_ious.

    Examples:

    calib import --rows val.npz --classifier head.npz --annotations lvis_v1_val.json --out caches/val

    calib import --rows train_rows --classifier head.safetensors --set background_first=true
    --annotations lvis_v1_train.json --mode train --out caches/train

    An interrupted run goes on with the same command and --resume.
    """
    from calib.extract.dataset import Dataset
    from calib.extract.raw import RawSettings, write_cache
    from calib.extract.raw_files import identity, read_classifier, read_rows, row_files
    from calib.settings import parse_assignments, with_overrides

    from .console import bar, report, tell

    settings = with_overrides(RawSettings(mode), parse_assignments(set_ or []))
    dataset = Dataset.read(annotations, counts_from=counts_from)
    for notice in dataset.notices:
        tell(f"note: {notice}")
    files = row_files(rows)
    written = write_cache(
        read_rows(files),
        read_classifier(classifier),
        dataset,
        out,
        settings,
        name=name or files[0].stem,
        source=identity(files),
        resume=resume,
        progress=bar,
    )
    manifest = written.manifest
    report(
        {
            "cache": str(out),
            "images": len(dataset.images),
            "images_without_rows": written.without_rows,
            "rows": manifest.rows,
            "bytes": sum(f["bytes"] for s in manifest.shards for f in s.files.values()),
        },
        as_json,
    )
