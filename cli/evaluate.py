"""``calib evaluate``: exact AP of results files, or of heads on a cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from .console import path_or_url

if TYPE_CHECKING:
    from calib.evaluate import GroundTruth
    from calib.evaluate.evaluate_files import Options, Outcome

EVERYTHING = 100_000  # detections per image
OPTIONAL_VALUES = {"--fixed-ap": "10000", "--pooled-ap": "10000", "--bootstrap": "1000"}
_Out = Annotated[
    str, typer.Option(metavar="<path or URL>", help="Folder to write per_category.parquet and summary.json to.")
]
_Annotations = Annotated[
    Path | None,
    typer.Option(parser=path_or_url, help="Ground truth of the split: LVIS v0.5 or v1, or COCO, .json or .json.gz."),
]
_Results = Annotated[
    list[Path] | None,
    typer.Option(
        parser=path_or_url,
        help="Results: a LVIS/COCO list, .json or .json.gz, Parquet of calib score, Detectron2's "
        "instances_predictions.pth, or mmdetection 3's results.pkl; repeatable.",
    ),
]
_Cache = Annotated[
    Path | None, typer.Option(parser=path_or_url, help="Judge heads on this cache (of --mode test) instead.")
]
_Head = Annotated[
    list[Path] | None,
    typer.Option(parser=path_or_url, help="With --cache: a head folder, MODELS/NAME/VERSION; repeatable."),
]
_Style = Annotated[
    str | None,
    typer.Option(
        metavar="lvis|coco",
        help="lvis (default), or coco (every category known in every image, crowds). Of a cache: its own.",
    ),
]
_IouType = Annotated[str, typer.Option(help="bbox, or segm for mask AP (results in JSON).")]
_Classes = Annotated[
    str,
    typer.Option(
        metavar="id|json|id-1|FILE",
        help="What class indices of .pth and .pkl results mean: categories by ascending id [Detectron2's rule], in the "
        "order of the ground truth (mmdetection's), id minus 1, or a file with a name per line.",
    ),
]
_Sizes = Annotated[
    str,
    typer.Option(
        metavar="box|mask",
        help="With segm: which size of a detection APs, APm, APl go by (default: as in the framework of the file).",
    ),
]
_MaxDetections = Annotated[
    int | None,
    typer.Option(
        help="Best results kept per image (300 unless given; coco: per image and category, 100); -1 keeps all."
    ),
]
_Bins = Annotated[str, typer.Option(help="Edges of the bins of training instances behind AP1, AP2, ...")]
_Counts = Annotated[
    Path | None,
    typer.Option(
        parser=path_or_url, help="Parquet with category_id and instance_count, instead of the ground truth's counts."
    ),
]
_FixedAp = Annotated[
    int | None,
    typer.Option(metavar="[K]", help="AP-fixed: K (10000) results per category, no cap per image."),
]
_PooledAp = Annotated[
    int | None,
    typer.Option(metavar="[K]", help="AP-pool: one curve over all categories, K (10000) results of each."),
]
_Calibration = Annotated[bool, typer.Option("--calibration", help="D-ECE, LaECE, LaACE, LRP and oLRP.")]
_Proposals = Annotated[
    bool, typer.Option("--proposals", help="With --cache: accuracy and recall of proposals, AP of right labels.")
]
_Matches = Annotated[bool, typer.Option("--matches", help="Write matches.parquet too: what became of every detection.")]
_Bootstrap = Annotated[
    int | None,
    typer.Option(metavar="[N]", help="Intervals of differences to the first result, N (1000) replicates."),
]
_Engine = Annotated[
    str, typer.Option(help="calib; or lvis or coco: run the official package too, and say how far we are from it.")
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]


def evaluate(
    out: _Out,
    annotations: _Annotations = None,
    results: _Results = None,
    cache: _Cache = None,
    head: _Head = None,
    style: _Style = None,
    iou_type: _IouType = "bbox",
    classes: _Classes = "",
    sizes: _Sizes = "",
    max_detections: _MaxDetections = None,
    bins: _Bins = "10,100,1000",
    counts: _Counts = None,
    fixed_ap: _FixedAp = None,
    pooled_ap: _PooledAp = None,
    calibration: _Calibration = False,
    proposals: _Proposals = False,
    matches: _Matches = False,
    bootstrap: _Bootstrap = None,
    engine: _Engine = "calib",
    as_json: _AsJson = False,
) -> None:
    """Evaluate detections: AP exactly as the LVIS and COCO APIs compute it, per category and per bin.

    Examples:

    calib evaluate --annotations val.json --results detections.parquet --out results/tau-norm

    calib evaluate --annotations val.json --results a.json --results b.json --bootstrap --out results

    calib evaluate --cache caches/val --head models/softmax/1 --head models/crt/1 --out results

    The training counts behind AP1, AP2, ... are those in the ground truth's
    categories; a training cache has them too: --counts
    caches/train/categories.parquet. Metrics in files and JSON are fractions,
    -1 where no category exists. Of several results each gets a folder of its
    name under --out, and JSON is an object by name. Compare runs with: calib
    analyze results/*
    """
    from calib.errors import SettingError
    from calib.evaluate.evaluate_files import Options
    from calib.evaluate.foreign import Reading
    from calib.storage import writing

    from .console import bar
    from .evaluation import tell

    options = Options(
        style=_one_of(style or "lvis", "--style", ("lvis", "coco")),
        iou_type=_one_of(iou_type, "--iou-type", ("bbox", "segm")),
        max_detections=max_detections,
        bins=parse_bins(bins),
        fixed_ap=fixed_ap,
        pooled_ap=pooled_ap,
        calibration=calibration,
        matches=matches,
        bootstrap=bootstrap,
        engine=None if engine == "calib" else _one_of(engine, "--engine", ("calib", "lvis", "coco")),
        reading=Reading(classes, sizes),
    )
    if (cache is None) == (not results) or (cache is None) != (not head):
        raise SettingError(
            "nothing to evaluate, or two kinds of it",
            hint="give --annotations with --results, or --cache with --head",
        )
    if bootstrap is not None and len(results or head or []) < 2:
        raise SettingError("--bootstrap compares results with the first one", hint="give at least two")
    if classes and cache is not None:
        raise SettingError("--classes is of results files", hint="a head knows the categories of its classes")
    if proposals and cache is None:
        raise SettingError("--proposals needs --cache and --head")
    if cache is None and annotations is None:
        raise SettingError("--results need --annotations", hint="the ground truth of the split")
    with writing(out, progress=bar) as place:
        if cache is not None:
            chosen = Truth(annotations, options.style if style or annotations else None, counts)
            outcomes = _of_heads(cache, head or [], place, options, chosen, proposals=proposals)
        elif annotations is not None:
            outcomes = _of_files(annotations, results or [], place, options, counts)
    tell(outcomes, out, as_json=as_json)


class Truth(NamedTuple):
    """What heads on a cache are judged by: the cache's own labels if there are no ``annotations``."""

    annotations: Path | None
    style: Any
    counts: Path | None

    def read(self) -> GroundTruth:
        """The labels of ``annotations``."""
        from calib.evaluate import GroundTruth

        assert self.annotations is not None
        return GroundTruth.read(self.annotations, style=self.style)


def _of_files(
    annotations: Path, results: list[Path], out: Path, options: Options, counts: Path | None
) -> dict[str, Outcome]:
    from calib.errors import InputError
    from calib.evaluate.evaluate_files import evaluate_files

    from .console import bar

    names = [path.name.removesuffix(".gz").rpartition(".")[0] or path.name for path in results]
    if len(set(names)) < len(names):
        raise InputError("two results files have one name", hint="their names tell the results apart: rename one")
    outs = [out] if len(results) == 1 else [out / name for name in names]
    outcomes = evaluate_files(annotations, results, outs, options, counts=counts, progress=bar)
    return dict(zip(names, outcomes, strict=True))


def _of_heads(
    cache: Path,
    heads: list[Path],
    out: Path,
    options: Options,
    chosen: Truth,
    *,
    proposals: bool,
) -> dict[str, Outcome]:
    from dataclasses import replace

    from calib.decide.assess import Assessment, check_test
    from calib.decide.truth import ground_truth
    from calib.errors import InputError, SettingError
    from calib.evaluate.evaluate_files import Judged, evaluate_all
    from calib.evaluate.folder import read_counts
    from calib.score.opened import open_heads

    from .console import bar, named

    if options.iou_type != "bbox" or options.matches or options.engine:
        raise SettingError(
            "heads on a cache have boxes only, and no file that others could read",
            hint="leave out --iou-type, --matches and --engine, or calib score first",
        )
    names = [_head_name(path, heads) for path in heads]
    if len(set(names)) < len(names):
        raise InputError("two heads have one name and version", hint="their names tell the results apart: copy one")
    on = open_heads(heads, cache)
    opened, artifacts = on.cache, on.artifacts
    check_test(opened)
    truth = ground_truth(opened, chosen.style) if chosen.annotations is None else chosen.read()
    counts = None if chosen.counts is None else read_counts(chosen.counts, truth)
    assessment, options = Assessment(opened, truth, counts), replace(options, style=truth.style)
    # The best 300 of an image hold its best 45; other caps (per category, or none) need everything that NMS leaves.
    capped = options.style == "lvis" and options.limit > 0 and not (options.fixed_ap or options.pooled_ap)
    nms = replace(on.nms, max_detections=options.limit if capped else EVERYTHING)
    judged = (
        Judged(
            name,
            assessment.found(artifact.head, nms, progress=bar),
            out if len(heads) == 1 else out / name,
            {"cache": named(cache), "head": named(path)},
            {"proposals": assessment.proposal_metrics(artifact.head, nms, options.bins)} if proposals else {},
        )
        for name, artifact, path in zip(names, artifacts, heads, strict=True)
    )
    outcomes = evaluate_all(assessment.evaluator, judged, options, progress=bar)
    return dict(zip(names, outcomes, strict=True))


def _head_name(path: Path, heads: list[Path]) -> str:
    """NAME of MODELS/NAME/VERSION, with the version where several of that name are given."""
    path = path.resolve()
    alone = sum(other.resolve().parent == path.parent for other in heads) == 1
    return path.parent.name if alone else f"{path.parent.name}-{path.name}"


def _one_of(value: str, option: str, choices: tuple[str, ...]) -> Any:
    from calib.errors import SettingError

    if value not in choices:
        raise SettingError(f"{option} must be {' or '.join(choices)}, got '{value}'")
    return value


def parse_bins(text: str) -> tuple[int, ...]:
    """Edges of bins, with commas between.

    Raises:
        SettingError: something else than whole numbers.
    """
    from calib.errors import SettingError

    try:
        return tuple(int(edge) for edge in text.split(","))
    except ValueError:
        raise SettingError(f"--bins must be whole numbers with commas between, got '{text}'") from None
