"""Which category an output of the detector stands for."""

from dataclasses import replace

import numpy as np

from calib.cache import Categories
from calib.errors import InputError
from calib.extract.dataset import Dataset


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
