"""Classes of the detector against categories of the json: their number, names and order, and how right they are.

Letters: C categories in ascending id, K foreground classes of the detector.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from calib.annotations import Integers
from calib.doctor import agreement
from calib.doctor.agreement import NONE, Seen
from calib.doctor.findings import EXAMPLES, Finding, first, share
from calib.doctor.orders import Explained, Mapping, exchanged, explain, foreground, is_background, mappings, named
from calib.doctor.reading import Split
from calib.doctor.sample import Answers, Evidence
from calib.errors import InputError, ShapeError
from calib.evaluate import bin_index
from calib.extract.adapter import Adapter
from calib.extract.classes import by_id, in_class_order
from calib.extract.dataset import Dataset

LEAST_OBJECTS, LEAST_IMAGES = 30, 10  # below which classes are not judged
ENOUGH = 100  # objects, from which on chance is called so
CHANCE = 0.05  # kappa


@dataclass(frozen=True)
class Classes:
    """What calib takes the classes of ``adapter`` for: ``plain`` [C], the class of every category, or ``NONE``."""

    train: Split
    adapter: Adapter
    plain: Integers

    @property
    def count(self) -> int:
        """K."""
        return self.adapter.detector.num_classes

    @property
    def names(self) -> tuple[str, ...]:
        """What the detector calls its foreground classes, as far as it is known. [K], or none"""
        rule = self.adapter.classes
        return foreground(rule.names or rule.hints, self.count)

    def seen(self, evidence: Evidence, answers: Answers) -> Seen:
        """The objects that have a proposal, with the class of each."""
        on = answers.is_covered
        size = len(self.train.read.categories.id)
        return Seen(evidence.image[on], evidence.category[on], answers.predicted[on], answers.probability[on], size)

    def category(self, k: int) -> str:
        """A category in words."""
        rows = self.train.read.categories
        return f"'{rows.name[k]}' (id {rows.id[k]})"

    def taken_for(self, k: int) -> str:
        """What calib takes class ``k`` for."""
        at = np.flatnonzero(self.plain == k)
        return self.category(int(at[0])) if len(at) else "no category"


def match(train: Split, adapter: Adapter, *, classes_by_id: bool) -> tuple[Classes, list[Finding]]:
    """The classes as ``calib extract`` would take them, and what stands against that."""
    dataset, classes = Dataset.of(train.read), adapter.detector.num_classes
    ids = train.read.categories.id
    ascending = np.where(np.arange(len(ids)) < classes, np.arange(len(ids)), NONE)
    try:
        ordered = by_id(dataset, classes) if classes_by_id else in_class_order(adapter, dataset)
    except ShapeError:
        own = Classes(train, adapter, ascending)
        return own, [_number(own), *_by_name(own)]
    except InputError as e:
        own = Classes(train, adapter, ascending)
        return own, [Finding("classes-refused", "error", _where(adapter), str(e), e.hint), *_by_name(own)]
    place = {int(i): k for k, i in enumerate(ordered.categories.category_id.tolist())}
    own = Classes(train, adapter, np.asarray([place[int(i)] for i in ids], np.int64))
    return own, _by_name(own)


def _where(adapter: Adapter) -> str:
    return adapter.detector.source


def _number(own: Classes) -> Finding:
    """A class too many or too few."""
    ids, k = own.train.read.categories.id, own.count
    c, framework = len(ids), own.adapter.detector.source.partition(":")[0]
    text = f"the detector has {k} foreground classes, {own.train.where} lists {c} categories"
    details = {"classes": k, "categories": c, "difference": k - c}
    code = "classes-too-many" if k > c else "classes-too-few"
    if k > c and int(ids[0]) >= 1 and int(ids[-1]) <= k and int(ids[-1]) - c >= (k - c) / 2:
        text += f", with ids up to {ids[-1]}: output k may be category id k, and the ids that are left out unused"
        return Finding(code, "error", _where(own.adapter), text, "if so: --classes-by-id", (), details)
    if abs(k - c) == 1:
        counts = "counts background in" if framework == "torchvision" else "does not count background in"
        text += ": one too many" if k > c else ": one too few"
        text += f"; background counted in, or left out? The number of classes of {framework} {counts}"
    remedy = "give the json that the detector was trained with"
    extra = [name for name in own.train.read.categories.name if is_background(name)]
    if extra and c > k:
        remedy = f"take category '{extra[0]}' out of the json: background is no category, detectors count it themselves"
        return Finding(code, "error", _where(own.adapter), text, remedy, (), details | {"background": extra[0]})
    if k == c + 1:
        remedy += ", or add the category that it lacks, without objects, at the id where the class stands"
    elif k == c - 1:
        remedy += ", or take the category that the detector lacks out of it; a detector built with one class too few "
        remedy += "has to be trained again"
    return Finding(code, "error", _where(own.adapter), text, remedy, (), details)


def _by_name(own: Classes) -> list[Finding]:
    """The detector's own names against those of the json."""
    listed = own.adapter.classes.names or own.adapter.classes.hints
    if not listed:
        return []
    rows, where = own.train.read.categories, _where(own.adapter)
    class_of = named(rows, own.count, listed)
    details: dict[str, Any] = {"names": len(listed), "classes": own.count}
    if class_of is None:
        text = f"the detector's names ({first(listed)}) are not those of the categories ({first(rows.name)})"
        remedy = "is it the json of the set that the detector was trained on?"
        return [Finding("classes-names-differ", "warning", where, text, remedy, tuple(listed[:EXAMPLES]), details)]
    known = class_of >= 0
    moved = np.flatnonzero(known & (class_of != own.plain))
    details |= {"known": int(known.sum()), "moved": len(moved)}
    if not len(moved):
        text = (
            f"the detector's own names confirm the order: {share(int(known.sum()), len(known))} categories have theirs"
        )
        return [Finding("classes-named", "note", where, text, details=details)]
    names = own.names
    examples = tuple(
        f"class {class_of[c]} is called '{names[class_of[c]]}' and taken for {own.taken_for(int(class_of[c]))}"
        for c in moved[:EXAMPLES].tolist()
    )
    text = f"the detector calls {share(len(moved), int(known.sum()))} classes otherwise than the categories they are "
    text += f"taken for: {first(examples)}"
    remedy = own.adapter.classes.hint
    return [Finding("classes-names-order", "warning", where, text, remedy, examples, details)]


def judge(own: Classes, evidence: Evidence, answers: Answers) -> list[Finding]:
    """What the classes of objects say on the order."""
    seen = own.seen(evidence, answers)
    n, images, where = len(seen.image), len(np.unique(seen.image)), _where(own.adapter)
    if n < LEAST_OBJECTS or images < LEAST_IMAGES:
        text = f"{n} objects with a proposal on {images} pictures are too few to tell whether classes are in order "
        text += f"(at least {LEAST_OBJECTS} on {LEAST_IMAGES})"
        return [Finding("classes-not-judged", "note", where, text, "--sample, --seconds", details={"objects": n})]
    others = mappings(own.train.read.categories, own.plain, own.count, own.names)
    if (better := explain(seen, own.plain, others)) is not None:
        return [_order(own, seen, better)]
    if rings := exchanged(seen, own.plain):
        return [_exchanged(own, seen, rings)]
    value, z = agreement.kappa(seen, own.plain)
    if n >= ENOUGH and value < CHANCE and z < agreement.SURE / 2:
        return [_at_chance(own, seen, value)]
    return [_in_order(own, seen, value)] if z > agreement.SURE else []


def _order(own: Classes, seen: Seen, found: Explained) -> Finding:
    """Another order holds."""
    mapping, c = found.mapping, found.comparison
    examples = _behaves(own, seen, mapping)
    right = [float((seen.predicted == m[seen.category]).mean()) for m in (own.plain, mapping.class_of)]
    text = f"the classes are in another order than calib takes: {mapping.meaning}. So taken, {100 * right[1]:.1f} % of "
    text += f"{len(seen.image)} objects have their class, else {100 * right[0]:.1f} %: {'; '.join(examples)}"
    ids, names = own.train.read.categories.id.tolist(), own.train.read.categories.name
    details = {
        "right": right[1],
        "right_as_taken": right[0],
        "kappa": c.kappa,
        "kappa_as_taken": c.plain,
        "z": c.z,
        "objects": len(seen.image),
        "order": mapping.meaning,
        "from_class": mapping.at,
        "mapping": [
            {"class": k, "category_id": i, "name": name}
            for k, i, name in zip(mapping.class_of.tolist(), ids, names, strict=True)
            if k >= 0
        ],
    }
    return Finding(mapping.code, "error", _where(own.adapter), text, _remedy(own, mapping), examples, details)


def _behaves(own: Classes, seen: Seen, mapping: Mapping) -> tuple[str, ...]:
    """The clearest examples of classes that are not what they are taken for."""
    table = seen.table()
    rows = np.flatnonzero((mapping.class_of >= 0) & (mapping.class_of != own.plain))
    hits = table[rows, mapping.class_of[rows]]
    best = rows[np.lexsort((rows, -hits))][:EXAMPLES].tolist()
    return tuple(
        f"class {k} of the detector behaves like {own.category(c)}, not {own.taken_for(k)} ({table[c, k]:.0f} of "
        f"{table[c].sum():.0f} objects)"
        for c, k in zip(best, mapping.class_of[best].tolist(), strict=True)
    )


def _remedy(own: Classes, mapping: Mapping) -> str:
    framework = own.adapter.detector.source.partition(":")[0]
    orders = {"classes-id-order": "id", "classes-json-order": "json", "classes-names-order": "names"}
    if mapping.code == "classes-by-id" and mapping.class_of.min() == own.train.read.categories.id.min() - 1:
        return "--classes-by-id"
    if framework == "mmdet" and mapping.code in orders:
        return f'--detector-args \'{{"class_order": "{orders[mapping.code]}"}}\''
    listed = "give the json that the detector was trained with, or number the categories of all jsons anew"
    if mapping.code == "classes-shifted":
        return (
            "was background counted among the classes, or a category taken out of the json or put into it? "
            + listed
            + ": "
            "the class of each is in details.mapping of --json"
        )
    return f"{listed}, with ids in the order of the classes (details.mapping of --json)"


def _exchanged(own: Classes, seen: Seen, rings: list[list[int]]) -> Finding:
    table = seen.table()
    pairs = [(c, ring[(k + 1) % len(ring)]) for ring in rings for k, c in enumerate(ring)]
    examples = tuple(
        f"class {own.plain[to]} of the detector behaves like {own.category(c)}, not {own.category(to)} "
        f"({table[c, own.plain[to]]:.0f} of {table[c].sum():.0f} objects)"
        for c, to in pairs
    )
    text = (
        f"{len(pairs)} classes stand in each other's place, the others are in order: {'; '.join(examples[:EXAMPLES])}"
    )
    ids = own.train.read.categories.id
    details = {"rings": [[int(ids[c]) for c in ring] for ring in rings]}
    remedy = "exchange these ids in the json, or give the json that the detector was trained with"
    return Finding("classes-exchanged", "error", _where(own.adapter), text, remedy, examples, details)


def _in_order(own: Classes, seen: Seen, value: float) -> Finding:
    right = float((seen.predicted == own.plain[seen.category]).mean())
    text = (
        f"classes are in the order that calib takes: {100 * right:.1f} % of {len(seen.image)} objects with a proposal "
    )
    text += "have theirs (background aside), and no other order explains them better"
    if own.count != len(own.plain):
        spare = sorted(set(range(own.count)) - set(own.plain.tolist()))
        text += f"; class {first(spare)} is no category" if spare else "; the last categories have no class"
    details = {"right": right, "kappa": value, "objects": len(seen.image)}
    return Finding("classes-in-order", "note", _where(own.adapter), text, "", (), details)


def _at_chance(own: Classes, seen: Seen, value: float) -> Finding:
    right = float((seen.predicted == own.plain[seen.category]).mean())
    text = f"the detector's classes have nothing to do with the labels of {len(seen.image)} objects: "
    text += (
        f"{100 * right:.1f} % are right, hardly more than by chance, and no other order explains them (a permutation "
    )
    text += f"is said of a classifier that is right on {100 * agreement.LEAST_RIGHT:.0f} %)"
    remedy = "are the weights those of the trained detector (--weights), and of this data set? "
    remedy += "More pictures: --sample, --seconds"
    details = {"right": right, "kappa": value, "objects": len(seen.image)}
    return Finding("classes-at-chance", "error", _where(own.adapter), text, remedy, (), details)


def accuracy(
    own: Classes, evidence: Evidence, answers: Answers, counts: Integers, bins: tuple[int, ...]
) -> dict[str, Any]:
    """Of objects with a proposal: the share whose class is right (background aside), and of those that the classifier
    prefers background for; over all and per bin of training instances. -1 where there are none."""
    on = answers.is_covered
    category = evidence.category[on]
    right = (answers.predicted[on] == own.plain[category]).astype(np.float64)
    lost = answers.is_background[on].astype(np.float64)
    index = bin_index(counts, bins)[category]
    groups = [np.ones(len(category), np.bool_), *(index == b for b in range(len(bins) + 1))]
    return {
        "objects": [int(g.sum()) for g in groups],
        "right": [float(right[g].mean()) if g.any() else -1.0 for g in groups],
        "background": [float(lost[g].mean()) if g.any() else -1.0 for g in groups],
    }


RIGHT_ON_TRAIN, WRONG_ON_VAL, ENOUGH = 0.3, 0.05, 30  # shares of objects whose class is right; objects


def check_val_labels(train: dict[str, Any], val: dict[str, Any], where: str) -> list[Finding]:
    """Two results of ``accuracy``: whether val at ``where`` is labelled otherwise than train."""
    (of_train, *_), (of_val, *_), (n, *_) = train["right"], val["right"], val["objects"]
    if n < ENOUGH or of_train < RIGHT_ON_TRAIN or of_val > WRONG_ON_VAL:
        return []
    text = f"the classifier is right on {100 * of_train:.1f} % of the objects of train, and on {100 * of_val:.1f} % of "
    text += f"these {n}: they have other labels than those that it was trained on"
    remedy = "are the category ids of both files of one numbering? give them the names and ids of train"
    return [Finding("val-labels-differ", "error", where, text, remedy, details={"train": of_train, "val": of_val})]
