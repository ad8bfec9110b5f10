"""Bi-level sampling of SimCal: first classes and images, then proposals within them.

Paper: Wang et al., The Devil is in Classification: A Simple Framework for Long-tail Instance Segmentation, ECCV 2020,
Sec. 4.1.
Differs: as in the authors' code (twangnh/SimCal e5f3076) an image contributes the positives of the class it was drawn
for, not those of all sampled classes, and negatives are proposals whose best IoU lies in [0.1, 0.5).
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from calib.cache.index import ClassIndex
from calib.sampling.step import Rows, Step

HARD_NEGATIVE_IOU = 0.1


class BilevelSampler:
    """A step draws classes uniformly and one image for each, both with replacement; keeps every positive of the class
    in its image, and as many hard negatives from all drawn images."""

    def __init__(self, index: ClassIndex, max_iou: NDArray[np.float32], *, classes_per_step: int, seed: int) -> None:
        self._index = index
        background = index.rows(index.background)
        self._negatives = background[max_iou[background] >= HARD_NEGATIVE_IOU]
        self._negative_images = index.image[self._negatives]
        self._images = {int(c): index.images(int(c)) for c in index.present}
        self._classes_per_step, self._seed = classes_per_step, seed
        self.identity = ("bilevel", classes_per_step, seed)

    def step(self, i: int) -> Step:
        """Positives and hard negatives 1:1 (fewer negatives where the images have no more)."""
        rng = np.random.default_rng([self._seed, 5, i])
        classes, images = _draw(rng, self._index.present, self._images, self._classes_per_step)
        pool = self._negatives_of(np.unique(images))
        rows = compose(self._index, classes, images, rng.permutation(pool))
        return Step(rows, np.zeros(len(rows), np.int64), 1)

    def _negatives_of(self, images: Rows) -> Rows:
        low, high = np.searchsorted(self._negative_images, images), np.searchsorted(self._negative_images, images + 1)
        return np.concatenate([self._negatives[a:b] for a, b in zip(low, high, strict=True)])


def draw_episode(rng: np.random.Generator, images_of: Mapping[int, Rows], n: int) -> tuple[Rows, Rows]:
    """``n`` classes, uniformly among those that have images, and one image of each; both with replacement."""
    present = np.asarray([c for c, m in images_of.items() if len(m)], np.int64)
    return _draw(rng, present, images_of, n)


def _draw(rng: np.random.Generator, present: Rows, images_of: Mapping[int, Rows], n: int) -> tuple[Rows, Rows]:
    classes = rng.choice(present, n)
    own = [images_of[c] for c in classes.tolist()]
    # What rng.choice of each would draw, without its preparation, which costs more than the draw.
    places = rng.integers(0, [len(m) for m in own])
    return classes, np.asarray([m[k] for m, k in zip(own, places.tolist(), strict=True)])


def compose(index: ClassIndex, classes: Rows, images: Rows, negatives: Rows) -> Rows:
    """Rows of one step: of the i-th image the positives of the i-th class only, and as many of the first ``negatives``,
    which come first."""
    positives = index.rows_in_images(classes, images)
    return np.concatenate([negatives[: len(positives)], positives])
