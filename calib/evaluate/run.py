"""Evaluations from files to files: a result folder per set of detections.

``per_category.parquet`` and ``summary.json``, and ``matches.parquet`` if asked for. The ground truth is read and
prepared once for any number of results; results of the same boxes share their overlaps.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from calib.errors import FormatError, SettingError
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
        if self.engine not in (None, self.style):
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
    """Detections to evaluate, where their result folder goes, and what its summary shall hold besides.

    ``theirs`` are figures and arrays of the official evaluator to compare ours with.
    """

    name: str
    found: Detections | Rescored
    out: Path
    sources: dict[str, str]
    more: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] | None = None
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
            found = Detections.read(path, masks=masks)
            theirs = None
            if options.engine is not None:
                theirs = reference(document, found, options.engine, options.iou_type, options.limit)
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
        figures = _more_figures(evaluator, one.found, options)
        if options.bootstrap is not None:
            if first is not None:
                figures["difference"] = _difference(evaluator, first, one, options, progress)
            first = first or one
        if one.theirs is not None:
            figures["reference"] = _against(evaluation, one.theirs, options)
        if options.matches:
            if isinstance(one.found, Rescored):
                raise SettingError("matches are written of detections, not of heads", hint="calib score, then evaluate")
            _check_folder(one.out)
            write_matches(one.out / MATCHES, evaluator, one.found)
        summary = write_evaluation(one.out, evaluation, bins=options.bins, more=figures | one.more | one.sources)
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
