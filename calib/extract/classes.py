"""Which category each class of a detector is: every framework has a rule of its own."""

from dataclasses import replace

import numpy as np

from calib.cache import Categories
from calib.errors import InputError, ShapeError
from calib.extract.adapter import Adapter
from calib.extract.dataset import Dataset


def in_class_order(adapter: Adapter, dataset: Dataset) -> Dataset:
    """``dataset`` with its categories in the order of the detector's classes, by the rule ``adapter.classes``.

    Raises:
        ShapeError: the data set has more or fewer categories than the detector.
        InputError: the detector's names of its classes are those of other categories, or of none.
    """
    rule, file, found = adapter.classes, dataset.annotations_file, dataset.categories
    if adapter.detector.num_classes != len(found):
        raise ShapeError(
            f"the detector has {adapter.detector.num_classes} foreground classes, {file} lists {len(found)} categories",
            hint="use the annotation file the detector was trained with; --classes-by-id where output k is category id "
            "k (torchvision's 91 outputs for COCO)",
        )
    category = {n: int(i) for n, i in zip(found.name, found.category_id, strict=True) if found.name.count(n) == 1}
    names = rule.names if rule.has_all or len(rule.names) == len(found) else ()
    strange = [n for n in names if n not in category]
    if rule.has_all and (strange or len(names) != len(found)):
        problem = f"calls a class '{strange[0]}'" if strange else f"has names for {len(names)} classes"
        raise InputError(f"the detector {problem}: {file} has other categories", hint=rule.hint)
    if rule.order == "names" and names and not strange:
        ids = np.asarray([category[n] for n in names], np.int64)
    else:
        in_file = rule.order == "json" and dataset.listed
        ids = np.asarray(dataset.listed, np.int64) if in_file else np.sort(found.category_id)
        for name, category_id in zip(names, ids.tolist(), strict=False):
            if category.get(name, category_id) != category_id:
                order = "in the order of the file" if in_file else "by ascending id"
                raise InputError(
                    f"the detector's class '{name}' would be category {category_id} of {file}, whose classes are "
                    f"numbered {order}; the category of that name is {category[name]}",
                    hint=rule.hint,
                )
    return replace(dataset, categories=found.ordered(ids))


def by_id(dataset: Dataset, classes: int) -> Dataset:
    """``dataset`` for a detector with ``classes`` foreground outputs, of which the k-th (from 1) is category id k.

    torchvision's COCO detectors have 90, with gaps, for 80 categories. An id without a category becomes one, without
    objects: it keeps its part in the softmax, so that all scores are those of the detector.

    Raises:
        InputError: a category has an id beyond the outputs.
    """
    own = dataset.categories
    beyond = own.category_id[(own.category_id < 1) | (own.category_id > classes)]
    if len(beyond):
        raise InputError(
            f"category id {beyond[0]} of {dataset.annotations_file} is none of the outputs 1 to {classes}",
            hint="without --classes-by-id categories are matched in ascending order",
        )
    place = own.category_id - 1
    counts = np.zeros((2, classes), np.int64)
    counts[:, place] = own.instance_count, own.image_count
    name = [f"unused {k}" for k in range(1, classes + 1)]
    frequency = ["r"] * classes
    for k, one, often in zip(place.tolist(), own.name, own.frequency, strict=True):
        name[k], frequency[k] = one, often
    ids = np.arange(1, classes + 1, dtype=np.int64)
    return replace(dataset, categories=Categories(ids, tuple(name), counts[0], counts[1], tuple(frequency)))
