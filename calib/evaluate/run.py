"""Evaluations from files to files: a result folder per set of detections.

``per_category.parquet`` and ``summary.json``, and ``matches.parquet`` if asked for. The ground truth is read and
prepared once for any number of results; results of the same boxes share their overlaps.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from calib.errors import FormatError, InputError, SettingError
from calib.files import is_calib_folder, read_json, replacing, require, write_json
from calib.progress import Progress, silent

from .bins import DEFAULT_BINS, check_bins
from .bootstrap import compare
from .calibration import calibration, reliability
from .evaluation import MAX_DETECTIONS, Evaluation, Evaluator, Rescored
from .ground_truth import GroundTruth, Style
from .lookup import positions
from .matches_table import MATCHES, write_matches
from .outcome import outcomes
from .overlaps import BoxSet
from .pooled import pooled_ap
from .reference import Engine, largest_difference, reference
from .results import Detections
from .select import NO_CAP, Caps

PER_CATEGORY = "per_category.parquet"
SUMMARY = "summary.json"
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR", "ARs", "ARm", "ARl")
IouType = Literal["bbox", "segm"]


@dataclass(frozen=True)
class Options:
    """What is evaluated, and which figures besides AP are wanted.

    ``max_detections`` None means the style's own (300 per image; COCO: 100 per image and category). ``fixed_ap`` and
    ``pooled_ap`` are detections kept per category over the split (papers: 10,000). ``bootstrap`` is the number of
    replicates behind the intervals of differences to the first of several results.
    """

    style: Style = "lvis"
    iou_type: IouType = "bbox"
    max_detections: int | None = None
    bins: tuple[int, ...] = DEFAULT_BINS
    fixed_ap: int | None = None
    pooled_ap: int | None = None
    calibration: bool = False
    matches: bool = False
    bootstrap: int | None = None
    engine: Engine | None = None

    def __post_init__(self) -> None:
        check_bins(self.bins)
        for name in ("fixed_ap", "pooled_ap"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1 detection per category, got {value}")
        if self.matches and self.iou_type == "segm":
            raise SettingError("matches are those of boxes", hint="leave out matches, or evaluate bbox")
        if self.engine is not None and self.engine != {"lvis": "lvis", "coco": "coco"}[self.style]:
            raise SettingError(f"the {self.engine} engine does not evaluate in {self.style} style")

    @property
    def limit(self) -> int:
        """Detections kept per image (COCO: and category)."""
        return MAX_DETECTIONS[self.style] if self.max_detections is None else self.max_detections


@dataclass(frozen=True)
class Outcome:
    """What one evaluation gave: the figures, their summary as written, and notices about the input."""

    evaluation: Evaluation
    summary: dict[str, Any]
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Judged:
    """Detections to evaluate, what they are called and where their result folder goes."""

    name: str
    found: Detections | Rescored
    out: Path
    sources: dict[str, str]
    more: dict[str, Any] = field(default_factory=dict)  # figures that the summary shall hold too


def evaluate_files(
    annotations: Path,
    results: Sequence[Path],
    outs: Sequence[Path],
    options: Options,
    *,
    counts: Path | None = None,
    progress: Progress = silent,
) -> list[Outcome]:
    """Evaluate each of ``results`` (JSON or Parquet) against ``annotations`` and write a result folder for each.

    Args:
        counts: a Parquet file with TRAIN counts (``categories.parquet`` of a cache), used instead of those in
            ``annotations``.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others.
        SettingError: ``options`` out of range.
    """
    masks = options.iou_type == "segm"
    document = read_json(annotations, "ground truth")
    truth = GroundTruth.from_document(document, annotations, style=options.style, masks=masks)
    if options.engine is None:
        del document  # several times the size of what is needed of it
    evaluator = Evaluator(truth, instance_count=None if counts is None else read_counts(counts, truth))
    read = [Detections.read(path, masks=masks) for path in results]
    judged = [
        Judged(out.name, found, out, {"annotations": str(annotations), "results": str(path)})
        for path, found, out in zip(results, share_boxes(evaluator, read), outs, strict=True)
    ]
    extra = {}
    if options.engine is not None:
        for one, found in zip(judged, read, strict=True):
            extra[one.name] = reference(document, found, options.engine, options.iou_type, options.limit)
    return evaluate_all(evaluator, judged, options, references=extra, progress=progress)


def share_boxes(evaluator: Evaluator, read: Sequence[Detections]) -> list[Detections | Rescored]:
    """Several results of one set of boxes as scores of it, so that overlaps are found once; others as they are."""
    first = read[0]
    same = len(read) > 1 and evaluator.truth.masks is None
    for other in read[1:]:
        same = same and all(np.array_equal(getattr(first, k), getattr(other, k)) for k in ("image_id", "box"))
    if not same:
        return list(read)
    truth = evaluator.truth
    categories = [positions(truth.category_ids, found.category_id) for found in read]
    one_category = all(np.array_equal(categories[0], other) for other in categories)
    image = first.image_index(truth)
    boxes = BoxSet(truth, image, first.box, evaluator.thresholds, categories[0] if one_category else None)
    row = np.arange(len(first))
    return [Rescored(boxes, row, category, one.score) for category, one in zip(categories, read, strict=True)]


def evaluate_all(
    evaluator: Evaluator,
    judged: Sequence[Judged],
    options: Options,
    *,
    references: dict[str, dict[str, Any]] | None = None,
    progress: Progress = silent,
) -> list[Outcome]:
    """Evaluate every one of ``judged`` and write its result folder, the summary last.

    Raises:
        InputError: detections of other images than the ground truth's. FormatError: a result folder is a file.
    """
    if len({one.name for one in judged}) < len(judged):
        raise InputError("two results have one name", hint="their names tell them apart: rename one")
    done: list[Outcome] = []
    for one in judged:
        evaluation = evaluator.evaluate(one.found, max_detections=options.limit, full=options.engine is not None)
        figures = _more_figures(evaluator, one.found, options)
        if options.bootstrap is not None and done:
            intervals = compare(
                evaluator,
                judged[0].found,
                one.found,
                replicates=options.bootstrap,
                max_detections=options.limit,
                bins=options.bins,
                progress=progress,
            )
            figures["difference"] = {"to": judged[0].name, **{key: asdict(value) for key, value in intervals.items()}}
        if references and one.name in references:
            figures["reference"] = _against(evaluation, references[one.name], options)
        if options.matches:
            if isinstance(one.found, Rescored):
                raise SettingError("matches are written of detections, not of heads", hint="calib score, then evaluate")
            _check_folder(one.out)
            write_matches(one.out / MATCHES, evaluator, one.found)
        summary = write_evaluation(one.out, evaluation, bins=options.bins, more=figures | one.more | one.sources)
        told = () if isinstance(one.found, Rescored) else one.found.notices(evaluator.truth)
        done.append(Outcome(evaluation, summary, (*evaluator.truth.notices, *told)))
    return done


def _more_figures(evaluator: Evaluator, found: Detections | Rescored, options: Options) -> dict[str, Any]:
    figures: dict[str, Any] = {"style": options.style, "iou_type": options.iou_type}
    if options.fixed_ap is not None:
        fixed = evaluator.evaluate(found, max_detections=NO_CAP, per_category=options.fixed_ap)
        figures["fixed"] = {"per_category": options.fixed_ap, **fixed.summary(options.bins)}
    if options.pooled_ap is not None:
        figures["pooled"] = {"per_category": options.pooled_ap}
        figures["pooled"] |= pooled_ap(evaluator, found, per_category=options.pooled_ap)
    if options.calibration:
        figures["calibration"] = calibration(evaluator, found, max_detections=options.limit)
        at = outcomes(evaluator, found, Caps(options.limit), 0.5)
        figures["reliability"] = reliability(at, evaluator.objects.n[:, 0]).records()
    if options.style == "coco":
        # Of the best 1 and 10 of an image and category, as pycocotools lists them beside AR.
        for limit in (1, 10):
            figures[f"AR{limit}"] = evaluator.evaluate(found, max_detections=limit).summary(options.bins)["AR"]
    return figures


def _against(evaluation: Evaluation, theirs: dict[str, Any], options: Options) -> dict[str, Any]:
    """The reference's own figures, and how far ours are from them."""
    own = evaluation.summary(options.bins)
    return {
        "engine": options.engine,
        "figures": theirs["figures"],
        "largest_difference": largest_difference(evaluation, theirs),
        "largest_difference_of_figures": max(abs(own[k] - v) for k, v in theirs["figures"].items() if k in own),
    }


def write_evaluation(
    out: Path,
    evaluation: Evaluation,
    *,
    bins: Sequence[int] = DEFAULT_BINS,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write ``per_category.parquet`` and ``summary.json`` into the folder ``out``; return the summary.

    Each file is replaced in one step, the summary last. Besides ``Evaluation.summary`` it holds
    ``max_detections``, ``bins``, ``never_detected`` (ids of categories with objects and without detections) and
    ``more``.

    Raises:
        SettingError: ``bins`` are not ascending positive counts.
        FormatError: ``out`` is a file, a head or a cache.
    """
    edges = check_bins(bins)
    _check_folder(out)
    summary = evaluation.summary(edges) | {
        "max_detections": evaluation.max_detections,
        "bins": list(edges),
        "never_detected": evaluation.never_detected.tolist(),
        **(more or {}),
    }
    _write_per_category(out / PER_CATEGORY, evaluation)
    write_json(out / SUMMARY, summary)
    return summary


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise FormatError(f"{out} is a file, expected a folder for the results", hint="choose another --out")
    if is_calib_folder(out):
        raise FormatError(f"{out} is a head or a cache, expected a folder for the results", hint="choose another --out")


def _write_per_category(path: Path, evaluation: Evaluation) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    e, n = evaluation, len(evaluation.category_ids)
    table = pa.table(
        {
            "index": pa.array(np.arange(n, dtype=np.int32)),
            "category_id": pa.array(e.category_ids),
            "name": pa.array(e.names, pa.string()),
            "frequency": pa.nulls(n, pa.string()) if e.frequency is None else pa.array(e.frequency, pa.string()),
            "instance_count": _counts(e.instance_count, n),
            "image_count": _counts(e.image_count, n),
            "n_gt": pa.array(e.n_gt),
            "n_det": pa.array(e.n_det),
            **{name: pa.array(getattr(e, name)) for name in COLUMNS},
        }
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def _counts(counts: NDArray[np.int64] | None, n: int) -> Any:
    import pyarrow as pa

    return pa.nulls(n, pa.int64()) if counts is None else pa.array(counts, pa.int64())


def read_counts(path: Path, truth: GroundTruth) -> NDArray[np.int64]:
    """TRAIN instances of ``truth``'s categories, [C], from a Parquet file (category_id, instance_count).

    Raises:
        MissingFileError: no such file.
        FormatError: not Parquet, without these columns, or without one of the categories.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    require(path, "file of counts")
    try:
        table = pq.read_table(path, columns=["category_id", "instance_count"])
        ids, counts = (table.column(i).cast(pa.int64()).to_numpy() for i in (0, 1))
    except (pa.ArrowException, OSError, KeyError, IndexError) as e:
        raise FormatError(
            f"{path} does not hold whole numbers in columns category_id and instance_count: {e}",
            hint="give the categories.parquet of a training cache",
        ) from e
    order = np.argsort(ids)
    at = positions(ids[order], truth.category_ids)
    if (at < 0).any():
        raise FormatError(
            f"{path} has no counts for category {truth.category_ids[at < 0][0]} "
            f"({int((at < 0).sum())} of {len(at)} categories are missing)",
            hint="counts of another data set?",
        )
    return np.asarray(counts[order][at], np.int64)
