"""Evaluations from files to result folders: the ground truth is read and prepared once for any number of results."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from calib.errors import SettingError
from calib.files import read_json, require
from calib.layout import MATCHES
from calib.progress import Progress, silent

from .bins import DEFAULT_BINS, check_bins
from .bootstrap import check_replicates, compare
from .calibration import calibration, reliability
from .evaluation import MAX_DETECTIONS, Evaluation, Evaluator, Rescored
from .folder import check_folder, read_counts, write_evaluation
from .foreign import Reading, read_results
from .ground_truth import GroundTruth, Style
from .matches_table import write_matches
from .outcome import outcomes
from .overlaps import BoxSet
from .pooled import pooled_ap
from .reference import Engine, largest_difference, reference
from .results import Detections
from .select import NO_CAP, Caps

IouType = Literal["bbox", "segm"]


@dataclass(frozen=True)
class Options:
    """What is evaluated, and which metrics besides AP are wanted.

    ``max_detections`` None means the style's own (300 per image; COCO: 100 per image and category). ``fixed_ap`` and
    ``pooled_ap`` are detections kept per category over the split (papers: 10,000). ``bootstrap`` is the number of
    replicates behind the intervals of differences to the first of several results. ``reading``: how results of other
    frameworks are read.
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
    reading: Reading = field(default_factory=Reading)

    def __post_init__(self) -> None:
        check_bins(self.bins)
        for name in ("fixed_ap", "pooled_ap"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1 detection per category, got {value}")
        if self.bootstrap is not None:
            check_replicates(self.bootstrap)
        if self.matches and self.iou_type == "segm":
            raise SettingError("matches are those of boxes", hint="leave out matches, or evaluate bbox")
        if self.reading.sizes and self.iou_type != "segm":
            raise SettingError("sizes are chosen where masks are evaluated", hint="add --iou-type segm")
        if self.engine not in (None, self.style):
            raise SettingError(
                f"the {self.engine} engine does not evaluate in {self.style} style", hint=f"add --style {self.engine}"
            )

    @property
    def limit(self) -> int:
        """Detections kept per image (COCO: and category)."""
        return MAX_DETECTIONS[self.style] if self.max_detections is None else self.max_detections


@dataclass(frozen=True)
class Outcome:
    """What one evaluation gave: the metrics, their summary as written, and notices about the input."""

    evaluation: Evaluation
    summary: dict[str, Any]
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Judged:
    """Detections to evaluate, where their result folder goes, and what its summary shall hold besides.

    ``theirs`` are metrics and arrays of the official evaluator to compare ours with.
    """

    name: str
    found: Detections | Rescored
    out: Path
    sources: dict[str, str]
    more: dict[str, Any] = field(default_factory=dict)
    theirs: Callable[[], dict[str, Any]] | None = None  # run after ours, whose errors say more
    notices: tuple[str, ...] = ()


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

    Results are read one after the other; those with the boxes of the first one share its overlaps.

    Args:
        counts: a Parquet file with TRAIN counts (``categories.parquet`` of a cache), used instead of those in
            ``annotations``.

    Raises:
        InputError: a file is missing, damaged, or does not fit the others.
        SettingError: ``options`` out of range.
    """
    for path in results:
        require(path, "results")  # before the first of them is evaluated
    masks = options.iou_type == "segm"
    document = read_json(annotations, "ground truth")
    truth = GroundTruth.from_document(document, annotations, style=options.style, masks=masks)
    if options.engine is None:
        document = None  # several times the size of what is needed of it
    evaluator = Evaluator(truth, instance_count=None if counts is None else read_counts(counts, truth))
    sharing = _Sharing(evaluator)

    def judged() -> Iterator[Judged]:
        for path, out in zip(results, outs, strict=True):
            found = read_results(path, truth, masks=masks, reading=options.reading)
            theirs = None
            if options.engine is not None:
                theirs = partial(reference, document, found, options.engine, options.iou_type, options.limit)
            shared = found if options.matches else sharing.of(found)
            sources = {"annotations": str(annotations), "results": str(path)}
            yield Judged(out.name, shared, out, sources, theirs=theirs, notices=found.notices(truth))

    return evaluate_all(evaluator, judged(), options, progress=progress)


class _Sharing:
    """Results with the boxes of the first one become scores of these boxes, whose overlaps are found once."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._first: Detections | None = None
        self._boxes: dict[bytes, BoxSet] = {}  # by the categories of the rows

    def of(self, found: Detections) -> Detections | Rescored:
        """``found``, or its scores on the first one's boxes."""
        truth = self._evaluator.truth
        if self._first is None or truth.masks is not None:
            self._first = found
            return found
        if not all(np.array_equal(getattr(self._first, key), getattr(found, key)) for key in ("image_id", "box")):
            return found
        rows = found.rows(truth)
        key = xxhash.xxh3_128(rows.category.tobytes()).digest()
        if key not in self._boxes:
            # Many category columns for the same boxes are rare: one set of overlaps is kept.
            self._boxes = {key: BoxSet(truth, rows.image, found.box, self._evaluator.thresholds, rows.category)}
        return Rescored(self._boxes[key], np.arange(len(found)), rows.category, found.score)


def evaluate_all(
    evaluator: Evaluator, judged: Iterable[Judged], options: Options, *, progress: Progress = silent
) -> list[Outcome]:
    """Evaluate every one of ``judged`` and write its result folder, the summary last.

    Raises:
        InputError: detections of other images than the ground truth's. FormatError: a result folder is a file.
    """
    done: list[Outcome] = []
    first: Judged | None = None
    for one in judged:
        evaluation = evaluator.evaluate(one.found, max_detections=options.limit, full=one.theirs is not None)
        metrics = _more_metrics(evaluator, one.found, options)
        if options.bootstrap is not None:
            if first is not None:
                metrics["difference"] = _difference(evaluator, first, one, options, progress)
            first = first or one
        if one.theirs is not None:
            metrics["reference"] = _against(evaluation, one.theirs(), options)
        if options.matches:
            if isinstance(one.found, Rescored):
                raise SettingError("matches are written of detections, not of heads", hint="calib score, then evaluate")
            check_folder(one.out)
            write_matches(one.out / MATCHES, evaluator, one.found)
        summary = write_evaluation(one.out, evaluation, bins=options.bins, more=metrics | one.more | one.sources)
        done.append(Outcome(evaluation, summary, (*evaluator.truth.notices, *one.notices)))
    return done


def _difference(
    evaluator: Evaluator, first: Judged, one: Judged, options: Options, progress: Progress
) -> dict[str, Any]:
    assert options.bootstrap is not None
    intervals = compare(
        evaluator,
        first.found,
        one.found,
        replicates=options.bootstrap,
        max_detections=options.limit,
        bins=options.bins,
        progress=progress,
    )
    return {"to": first.name, **{key: asdict(value) for key, value in intervals.items()}}


def _more_metrics(evaluator: Evaluator, found: Detections | Rescored, options: Options) -> dict[str, Any]:
    metrics: dict[str, Any] = {"style": options.style, "iou_type": options.iou_type}
    if options.fixed_ap is not None:
        fixed = evaluator.evaluate(found, max_detections=NO_CAP, per_category=options.fixed_ap)
        metrics["fixed"] = {"per_category": options.fixed_ap, **fixed.summary(options.bins)}
    if options.pooled_ap is not None:
        metrics["pooled"] = {"per_category": options.pooled_ap}
        metrics["pooled"] |= pooled_ap(evaluator, found, per_category=options.pooled_ap)
    if options.calibration:
        metrics["calibration"] = calibration(evaluator, found, max_detections=options.limit)
        at = outcomes(evaluator, found, Caps(options.limit), 0.5)
        metrics["reliability"] = reliability(at, evaluator.objects.n[:, 0]).records()
    if options.style == "coco":
        # Of the best 1 and 10 of an image and category, as pycocotools lists them beside AR.
        for limit in (1, 10):
            metrics[f"AR{limit}"] = evaluator.evaluate(found, max_detections=limit).summary(options.bins)["AR"]
    return metrics


def _against(evaluation: Evaluation, theirs: dict[str, Any], options: Options) -> dict[str, Any]:
    """The reference's own metrics, and how far ours are from them."""
    own = evaluation.summary(options.bins)
    return {
        "engine": options.engine,
        "metrics": theirs["metrics"],
        "largest_difference": largest_difference(evaluation, theirs),
        "largest_difference_of_metrics": max(abs(own[k] - v) for k, v in theirs["metrics"].items() if k in own),
    }
