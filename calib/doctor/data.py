"""What the annotation files say, without pictures and detector: counts, categories, federated lists.

Letters: C categories, N annotations, I images.
"""

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.annotations import Annotations
from calib.cache import Categories
from calib.doctor.findings import EXAMPLES, Finding, first, share
from calib.doctor.reading import Split
from calib.evaluate import bin_index

Integers = NDArray[np.int64]
FEW = 5  # objects in val below which the AP of a category says little
FEW_CATEGORIES, FEW_OBJECTS = 10, 30  # of a bin: below them its mean AP says little


def objects(read: Annotations) -> NDArray[np.bool_]:
    """Annotations that are single objects: no crowd, not to be ignored. [N]"""
    return ~(read.crowd | read.ignore)


def train_counts(train: Split) -> Integers:
    """TRAIN instances of every category, as heads and bins take them. [C]"""
    return Categories.of(train.read).instance_count


def summary(split: Split, counts: Integers | None, bins: tuple[int, ...]) -> dict[str, Any]:
    """What there is: images, annotations, categories in all, with objects, and per bin of training instances."""
    read = split.read
    present = np.bincount(read.category[objects(read)], minlength=len(read.categories.id))
    details: dict[str, Any] = {
        "file": split.where,
        "images": len(read.images.id),
        "annotations": len(read.id),
        "crowds": int(read.crowd.sum()),
        "categories": len(present),
        "categories_with_objects": int((present > 0).sum()),
        "style": read.style,
    }
    if counts is None or len(counts) != len(present):
        return details
    index = bin_index(counts, bins)
    per_bin = [present[index == k] for k in range(len(bins) + 1)]
    return details | {
        "bins": list(bins),
        "categories_per_bin": [len(p) for p in per_bin],
        "at_least_1_per_bin": [int((p >= 1).sum()) for p in per_bin],
        f"at_least_{FEW}_per_bin": [int((p >= FEW).sum()) for p in per_bin],
    }


def check_split(split: Split) -> list[Finding]:
    """What holds for any split."""
    return [*_without_annotations(split), *_contradictions(split), *_names(split), *_crowds(split)]


def check_train(train: Split, bins: tuple[int, ...]) -> list[Finding]:
    """What holds for the TRAIN json: counts and ids of its categories."""
    return [*_style(train), *_ids(train), *_stale_counts(train), *_without_objects(train), *_tail(train, bins)]


def _without_annotations(split: Split) -> list[Finding]:
    if split.read.style != "none" and len(split.read.id):
        return []
    text = "the file has no annotations: nothing can be trained, judged or checked on it"
    remedy = "give the annotated json of the split (image_info files list pictures only)"
    return [Finding("not-annotated", "error", split.where, text, remedy)]


def _style(train: Split) -> list[Finding]:
    """Federated or not."""
    if train.read.style == "lvis":
        text = "federated (LVIS): of an image only the annotated categories and those of neg_category_ids are judged"
        return [Finding("federated", "note", train.where, text)]
    if train.read.style == "none":
        return []
    text = "not federated (COCO): every category is judged in every image, as if all its objects were annotated"
    remedy = "nothing, if so they are; else write neg_category_ids and not_exhaustive_category_ids to every image"
    return [Finding("not-federated", "note", train.where, text, remedy)]


def _contradictions(split: Split) -> list[Finding]:
    """Categories that are said to be absent from an image in which they are annotated."""
    read = split.read
    size = int(read.categories.id.max(initial=0)) + 2
    absent = read.images.negative.image() * size + np.clip(read.images.negative.ids, -1, size - 2) + 1
    shown = read.image * size + read.categories.id[read.category] + 1
    wrong = np.flatnonzero(np.isin(shown, absent))
    if not len(wrong):
        return []
    examples = tuple(
        f"image {read.images.id[read.image[k]]}: category {read.categories.id[read.category[k]]}"
        for k in wrong[:EXAMPLES]
    )
    return [
        Finding(
            "federated-contradiction",
            "warning",
            split.where,
            f"{share(len(wrong), len(read.id))} annotations are of a category that neg_category_ids of their image "
            f"says to be absent: {first(examples)}",
            "take these categories out of neg_category_ids",
            examples,
            {"annotations": len(wrong), "of": len(read.id)},
        )
    ]


def _names(split: Split) -> list[Finding]:
    again = [f"'{n}' ({k} times)" for n, k in Counter(split.read.categories.name).items() if k > 1]
    if not again:
        return []
    text = f"{len(again)} names of categories stand more than once: {first(again)}"
    remedy = "give every category a name of its own: classes that are matched by name need it"
    details = {"names": len(again)}
    return [Finding("category-names-twice", "warning", split.where, text, remedy, tuple(again[:EXAMPLES]), details)]


def _crowds(split: Split) -> list[Finding]:
    read, found = split.read, []
    for code, marked, what in (
        ("crowds", read.crowd, "crowd regions (iscrowd): no proposal is labelled by them, no detection in them counts"),
        ("ignored", read.ignore & ~read.crowd, "annotations marked ignore: left out in training and judging"),
    ):
        if marked.any():
            n = int(marked.sum())
            text = f"{share(n, len(read.id))} annotations are {what}"
            found.append(Finding(code, "note", split.where, text, details={"annotations": n, "of": len(read.id)}))
    return found


def _ids(train: Split) -> list[Finding]:
    """Ids that frameworks number differently: gaps, and another order in the file than that of the ids."""
    ids, listed, found = train.read.categories.id, train.read.categories.listed, []
    if len(ids) and int(ids[-1] - ids[0]) + 1 != len(ids):
        missing = sorted(set(range(int(ids[0]), min(int(ids[-1]), int(ids[0]) + 4 * len(ids)))) - set(ids.tolist()))
        text = f"{len(ids)} category ids from {ids[0]} to {ids[-1]} have gaps: {first(missing)} are none"
        remedy = "matched in ascending order; --classes-by-id where output k of the detector is category id k"
        details = {"categories": len(ids), "first": int(ids[0]), "last": int(ids[-1])}
        found.append(Finding("category-ids-gaps", "note", train.where, text, remedy, details=details))
    if listed != tuple(sorted(listed)):
        at = next(k for k in range(1, len(listed)) if listed[k] < listed[k - 1])
        text = f"categories are not listed in ascending id: {listed[at]} follows {listed[at - 1]} at position {at}"
        remedy = "frameworks differ in the order they take: mmdetection that of the file, others that of the ids"
        found.append(Finding("category-ids-unsorted", "note", train.where, text, remedy, details={"position": at}))
    return found


def _stale_counts(train: Split) -> list[Finding]:
    """The json's own counts are those of its annotations, unless the file was cut or joined."""
    read = train.read
    listed, counted = read.categories.instance_count, np.bincount(read.category, minlength=len(read.categories.id))
    if listed is None or not len(read.id) or np.array_equal(listed, counted):
        return []
    wrong = np.flatnonzero(listed != counted)
    ids, names = read.categories.id, read.categories.name
    examples = tuple(f"'{names[k]}' (id {ids[k]}): {listed[k]}, counted {counted[k]}" for k in wrong[:EXAMPLES])
    return [
        Finding(
            "counts-stale",
            "warning",
            train.where,
            f"instance_count of {share(len(wrong), len(listed))} categories is not the number of their annotations: "
            f"{first(examples)}; bins, priors and rare categories go by instance_count",
            "write the counts again, or take instance_count and image_count out of the categories; nothing, if this "
            "is not the TRAIN json",
            examples,
            {"categories": len(wrong), "of": len(listed), "listed": int(listed.sum()), "counted": int(counted.sum())},
        )
    ]


def _without_objects(train: Split) -> list[Finding]:
    read = train.read
    n = np.bincount(read.category[objects(read)], minlength=len(read.categories.id))
    lacking = np.flatnonzero(n == 0)
    if not len(lacking) or not len(read.id):
        return []
    examples = tuple(f"'{read.categories.name[k]}' (id {read.categories.id[k]})" for k in lacking[:EXAMPLES])
    return [
        Finding(
            "categories-without-objects",
            "warning",
            train.where,
            f"{share(len(lacking), len(n))} categories have no object to train on: {first(examples)}",
            "no head can learn them: annotate some, or judge without them",
            examples,
            {"categories": len(lacking), "of": len(n), "ids": read.categories.id[lacking].tolist()},
        )
    ]


def _tail(train: Split, bins: tuple[int, ...]) -> list[Finding]:
    counts = train_counts(train)
    rare = int((counts < bins[0]).sum())
    if rare:
        return []
    text = f"no category has fewer than {bins[0]} training instances (the least: {counts.min()}): there is no tail"
    remedy = f"other edges of bins: --bins {max(2, int(np.quantile(counts, 0.25)))},..."
    return [Finding("no-rare-categories", "note", train.where, text, remedy, details={"least": int(counts.min())})]


def check_judged(train: Split, judged: Split, bins: tuple[int, ...]) -> list[Finding]:
    """Whether ``judged`` (val or tune) has the categories of TRAIN, and enough of the rare ones to tell heads apart."""
    found = _same_categories(train, judged)
    if any(f.severity == "error" for f in found) or not len(judged.read.id):
        return found
    if train.read.style != judged.read.style and "none" not in (train.read.style, judged.read.style):
        text = f"{judged.where} is {judged.read.style}, {train.where} is {train.read.style}"
        found.append(Finding("styles-differ", "warning", judged.where, text, "write both in one way"))
    return [*found, *_sizes(train, judged), *_support(train, judged, bins)]


def _sizes(train: Split, judged: Split) -> list[Finding]:
    """Splits in each other's place are told by their sizes alone where no picture is in both."""
    n, own = len(judged.read.id), len(train.read.id)
    if n <= own:
        return []
    text = f"{judged.name} has {n:,} objects, train {own:,}: are the two in each other's place?"
    remedy = "heads are trained on train, the set that the detector was trained on"
    return [Finding("train-smaller", "warning", judged.where, text, remedy, details={"train": own, judged.name: n})]


def _same_categories(train: Split, judged: Split) -> list[Finding]:
    own, others = (
        dict(zip(s.read.categories.id.tolist(), s.read.categories.name, strict=True)) for s in (train, judged)
    )
    alone = sorted(set(own) ^ set(others))
    if alone:
        text = f"{len(alone)} category ids are in one of {train.where} ({len(own)}) and {judged.where} ({len(others)}) "
        text += f"only: {first(alone)}"
        remedy = "list the same categories in both, those without objects, too"
        details = {"ids": alone, "train": len(own), "other": len(others)}
        return [Finding("categories-differ", "error", judged.where, text, remedy, details=details)]
    renamed = [f"id {i}: '{own[i]}' and '{others[i]}'" for i in own if own[i] != others[i]]
    if not renamed:
        return []
    moved = set(own.values()) & {others[i] for i in own if own[i] != others[i]}
    text = f"{share(len(renamed), len(own))} ids have another name in {judged.where} than in {train.where}: "
    return [
        Finding(
            "category-names-differ",
            "error" if moved else "warning",
            judged.where,
            text + first(renamed) + ("; names stand at other ids: one file is numbered otherwise" if moved else ""),
            "number the categories of both files alike",
            tuple(renamed[:EXAMPLES]),
            {"ids": len(renamed), "of": len(own), "moved": len(moved)},
        )
    ]


def _support(train: Split, judged: Split, bins: tuple[int, ...]) -> list[Finding]:
    counts, read = train_counts(train), judged.read
    n = np.bincount(read.category[objects(read)], minlength=len(counts))
    rare = counts < bins[0]
    total, seen, enough = int(rare.sum()), int((n[rare] >= 1).sum()), int((n[rare] >= FEW).sum())
    if not total:
        return []
    text = (
        f"of {total} categories with fewer than {bins[0]} training instances {judged.name} has objects of {seen}, at "
        f"least {FEW} of {enough} ({int(n[rare].sum())} objects in all)"
    )
    few = seen < FEW_CATEGORIES or n[rare].sum() < FEW_OBJECTS
    remedy = "take more images of rare categories into the split" if few else ""
    if few:
        text += ": their mean AP rests on too few to tell heads apart"
    details = {"rare": total, "at_least_1": seen, f"at_least_{FEW}": enough, "objects": int(n[rare].sum())}
    return [
        Finding("few-rare" if few else "rare", "warning" if few else "note", judged.where, text, remedy, (), details)
    ]
