"""The examination: annotation files, their pictures, the splits against each other, the detector against all of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from calib.cache import Categories
from calib.doctor import boxes, classes, data, proposals, splits
from calib.doctor.boxes import AS_IS, FORMATS, NORMALISED, Format, scaled
from calib.doctor.findings import EXAMPLES, Finding, Report, first, ordered
from calib.doctor.pictures import Pictures, look
from calib.doctor.reading import Split, read_split
from calib.doctor.sample import Evidence, Observer
from calib.errors import CalibError, MissingFileError
from calib.evaluate import DEFAULT_BINS
from calib.evaluate.bins import check_bins
from calib.extract.adapter import Adapter
from calib.extract.dataset import Dataset
from calib.extract.proof import LOOKED_AT, Candidates, prove
from calib.progress import Progress, silent
from calib.settings import at_least


@dataclass(frozen=True)
class Case:
    """What is examined: the TRAIN json, and what else there is. ``images`` holds the pictures of all splits that have
    no folder of their own."""

    annotations: Path
    val: Path | None = None
    tune: Path | None = None
    images: Path | None = None
    val_images: Path | None = None
    tune_images: Path | None = None
    detector: Adapter | None = None
    classes_by_id: bool = False


@dataclass(frozen=True)
class Examination:
    """How closely: the detector looks at ``sample`` pictures of TRAIN, and of val, for about ``seconds`` each (0: as
    long as it takes); its rows are proved on ``check_images`` (0: not at all). ``bins``: edges of training instances,
    the first of which ends the rare categories."""

    sample: int = 100
    seconds: float = 30.0
    check_images: int = 2
    bins: tuple[int, ...] = DEFAULT_BINS

    def __post_init__(self) -> None:
        at_least(self, 1, "sample")
        at_least(self, 0, "seconds", "check_images")
        check_bins(self.bins)


@dataclass
class _Seen:
    """What has been found so far."""

    findings: list[Finding] = field(default_factory=list)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    detector: dict[str, Any] = field(default_factory=dict)
    splits: dict[str, Split] = field(default_factory=dict)
    pictures: dict[str, Pictures] = field(default_factory=dict)
    formats: dict[str, Format] = field(default_factory=dict)

    def drop(self, where: str, codes: tuple[str, ...]) -> None:
        """Take findings back that later ones replace."""
        self.findings = [f for f in self.findings if f.where != where or f.code not in codes]


def examine(case: Case, how: Examination = Examination(), *, progress: Progress = silent) -> Report:
    """Look at data and detector. Nothing is written.

    Raises:
        MissingFileError, FormatError: a file or folder is not there, or no JSON object.
        Others as the framework of the detector, where it fails in a way that is no finding.
    """
    seen = _Seen()
    _read(case, how, seen)
    for split in seen.splits.values():
        _look_at(split, how, seen, progress)
    for one, other in splits.PAIRS:
        if one in seen.splits and other in seen.splits:
            found, details = splits.check_pair(seen.splits[one], seen.splits[other], seen.pictures, progress)
            seen.findings += found
            seen.data[one][f"in_{other}"] = details
    if case.detector is not None and "train" in seen.splits:
        _detector(case, how, seen, progress)
    return Report(ordered(seen.findings), seen.data, seen.detector)


def _read(case: Case, how: Examination, seen: _Seen) -> None:
    """All annotation files, and what they say by themselves."""
    given = [("train", case.annotations, case.images)]
    given += [("val", case.val, case.val_images)] if case.val else []
    given += [("tune", case.tune, case.tune_images)] if case.tune else []
    for name, path, folder in given:
        folder = folder or case.images
        if folder is not None and not folder.is_dir():
            raise MissingFileError(
                f"folder of pictures not found: {folder}", hint="--images names the folder of pictures"
            )
        split, found = read_split(name, path, folder)
        seen.findings += found
        if split is not None and not (len(split.read.images.id) and len(split.read.categories.id)):
            lacking = "images" if not len(split.read.images.id) else "categories"
            seen.findings.append(
                Finding("empty", "error", split.where, f"the file lists no {lacking}", "is it the right one?")
            )
        elif split is not None:
            seen.splits[name] = split
    train = seen.splits.get("train")
    counts = None if train is None else data.train_counts(train)
    for name, split in seen.splits.items():
        seen.data[name] = data.summary(split, counts, how.bins)
        seen.findings += data.check_split(split)
        if split is train:
            seen.findings += data.check_train(train, how.bins)
        elif train is not None:
            seen.findings += data.check_judged(train, split, how.bins)


def _look_at(split: Split, how: Examination, seen: _Seen, progress: Progress) -> None:
    """Pictures and boxes of one split."""
    size = split.read.images.size
    if split.folder is not None:
        found, pictures = look(split, how.sample, progress)
        seen.findings += found
        seen.pictures[split.name] = pictures
        size = pictures.sizes(size)
    found, seen.formats[split.name] = boxes.check_boxes(split, size)
    seen.findings += found


def _detector(case: Case, how: Examination, seen: _Seen, progress: Progress) -> None:
    adapter, train = case.detector, seen.splits["train"]
    assert adapter is not None
    own, found = classes.match(train, adapter, classes_by_id=case.classes_by_id)
    seen.findings += found
    d = adapter.detector
    seen.detector |= {"source": d.source, "classes": d.num_classes, "names": len(own.names), "digest": d.digest}
    alike = [n for n in ("train", "val") if n in seen.pictures and _same_ids(seen.splits[n], train)]
    observers = [_observer(adapter, name, seen) for name in alike if seen.pictures[name].usable()]
    if not observers:
        text = "the detector was not run: there are no pictures that can be read"
        seen.findings.append(Finding("detector-not-run", "note", d.source, text, "--images names their folder"))
        return
    seen.findings += _proof(adapter, observers[0], how, seen, progress)
    for observer in observers:
        # Of pictures that it trained on the detector knows most: they tell the order of its classes.
        found = _observe(own, observer, how, seen, progress, judged=observer is observers[0])
        seen.findings += found  # which has taken some out by now
    if {"train", "val"} <= seen.detector.keys():
        of_train, of_val = (seen.detector[name]["classifier"] for name in ("train", "val"))
        seen.findings += classes.check_val_labels(of_train, of_val, seen.splits["val"].where)


def _same_ids(split: Split, train: Split) -> bool:
    return np.array_equal(split.read.categories.id, train.read.categories.id)


def _observer(adapter: Adapter, name: str, seen: _Seen) -> Observer:
    split, by_numbers = seen.splits[name], seen.formats[name]
    more = NORMALISED if by_numbers.code == NORMALISED[0].code else (*FORMATS, *_scales(split))
    return Observer(
        split, seen.pictures[name], adapter, (AS_IS, *more, *(() if by_numbers in (AS_IS, *more) else (by_numbers,)))
    )


def _scales(split: Split) -> Iterator[Format]:
    """Half and double size, and the one that boxes in the upper left corner would have."""
    size = split.read.images.size[split.read.image, ::-1].astype(np.float64)
    known = (size > 0).all(axis=1)
    factors = [0.5, 2.0]
    corner = boxes.corner(split.read.box[known], size[known])
    if corner is not None and min(abs(corner - f) for f in factors) > 0.2:
        factors.append(corner)
    return map(scaled, factors)


def _observe(
    own: classes.Classes, observer: Observer, how: Examination, seen: _Seen, progress: Progress, *, judged: bool
) -> list[Finding]:
    """The detector on the pictures of one split."""
    split, source = observer.split, observer.adapter.detector.source
    try:
        evidence = observer.observe(how.sample, how.seconds, progress)
    except CalibError as e:
        return [Finding("detector-failed", "error", source, f"on pictures of {split.name}: {e}", e.hint)]
    found = _faults(split, source, evidence, seen)
    by_numbers = seen.formats[split.name]
    form = proposals.format_of_proposals(evidence, observer.formats)
    if form is AS_IS and by_numbers is not AS_IS:
        form = by_numbers  # numbers alone are sure
    elif form.meaning != by_numbers.meaning:
        seen.drop(split.where, (by_numbers.code, "boxes-in-a-corner"))  # proposals know better than numbers
        found.append(proposals.format_found(split.where, evidence, form))
    answers, counts = evidence.answers[form.meaning], data.train_counts(own.train)
    is_train = split.name == "train"
    details = proposals.recall(evidence, answers, counts, how.bins)
    found += proposals.check_recall(split.where, details, how.bins, seen_in_training=is_train)
    by_pictures = classes.judge(own, evidence, answers) if judged else []
    seen.drop(source, tuple(f.code for f in by_pictures))  # names said so before pictures did
    found += by_pictures
    right = classes.accuracy(own, evidence, answers, counts, how.bins)
    seen.detector[split.name] = details | {
        "seconds": round(evidence.seconds, 1),
        "boxes": form.meaning,
        "classifier": right,
    }
    return found


def _faults(split: Split, source: str, evidence: Evidence, seen: _Seen) -> list[Finding]:
    """Pictures that could not be looked at, unless that is known already."""
    n = evidence.images + len(evidence.unreadable) + len(evidence.too_narrow) + len(evidence.not_finite)
    known = {(f.code, f.where) for f in seen.findings}
    faults = (
        ("pictures-unreadable", split.where, evidence.unreadable, "cannot be read", "restore them, or leave them out"),
        (
            "pictures-too-narrow",
            split.where,
            evidence.too_narrow,
            "have a side that vanishes when the detector resizes them",
            "leave them out of the json",
        ),
        (
            "detector-not-finite",
            source,
            evidence.not_finite,
            "make the detector give NaN or infinity",
            "are its weights finite, and those of this architecture?",
        ),
    )
    return [
        Finding(
            code,
            "error",
            where,
            f"{len(own)} of {n} pictures {what}: {first(own)}",
            remedy,
            tuple(map(str, own[:EXAMPLES])),
        )
        for code, where, own, what, remedy in faults
        if own and (code, where) not in known
    ]


def _proof(adapter: Adapter, observer: Observer, how: Examination, seen: _Seen, progress: Progress) -> list[Finding]:
    """Whether rows of a cache would give the detector's own detections, on the first pictures of the sample."""
    if not how.check_images:
        return []
    records = observer.first(LOOKED_AT * how.check_images)
    folder, source = observer.split.folder, adapter.detector.source
    assert folder is not None
    try:
        with progress("proof of the detector", total=1, unit="steps") as bar:
            proof = prove(adapter, Candidates(_unlabelled(observer.split, adapter), records, folder, how.check_images))
            bar.advance()
    except CalibError as e:
        return [Finding("proof-failed", "error", source, str(e), e.hint)]
    seen.detector["proof"] = proof
    text = f"rows of a cache give the detector's own {proof['detections']} detections on {proof['images']} pictures, "
    text += f"scores to {proof['largest_difference']:.1g}"
    return [Finding("proof", "note", source, text, details=proof)]


def _unlabelled(split: Split, adapter: Adapter) -> Dataset:
    """The data set without objects, and with as many categories as the detector has classes."""
    dataset, k = Dataset.of(split.read), adapter.detector.num_classes
    zeros = np.zeros(k, np.int64)
    stand_in = Categories(np.arange(k), tuple(f"class {i}" for i in range(k)), zeros, zeros, ("r",) * k)
    nothing: dict[str, Any] = {name: column[:0] for name, column in dataset.annotations.items()}
    return replace(dataset, categories=stand_in, annotations=nothing, _of_image={})
