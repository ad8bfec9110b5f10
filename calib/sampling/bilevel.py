"""Bi-level sampling of SimCal: first classes and images, then proposals within them.

Paper: Wang et al., The Devil is in Classification: A Simple Framework for Long-tail Instance Segmentation, ECCV 2020,
Sec. 4.1.
Differs: as in the authors' code (twangnh/SimCal e5f3076) an image contributes the positives of the class it was drawn
for, not those of all sampled classes, and negatives are proposals whose best IoU lies in [0.1, 0.5).
"""

import numpy as np

from calib.cache import Cache
from calib.cache.index import ClassIndex
from calib.errors import InputError
from calib.sampling.step import Rows, Step

HARD_NEGATIVE_IOU = 0.1


class BilevelSampler:
    """A step draws classes uniformly and one image for each, both with replacement; keeps every positive of the class
    in its image, and as many hard negatives from all drawn images.

    Raises:
        InputError: the cache has no foreground row.
    """

    def __init__(self, cache: Cache, *, classes_per_step: int, seed: int) -> None:
        self._index = ClassIndex.build(cache)
        if len(self._index.present) == 0:
            raise InputError(f"cache {cache.path} has no foreground row to train on", hint="extract with --mode train")
        max_iou = cache.meta("max_iou")[0]
        background = self._index.rows(cache.background)
        self._negatives = background[max_iou[background] >= HARD_NEGATIVE_IOU]
        self._negative_images = self._index.image[self._negatives]
        self._images = {int(c): self._index.images(int(c)) for c in self._index.present}
        self._classes_per_step, self._seed = classes_per_step, seed

    def step(self, i: int) -> Step:
        """Positives and hard negatives 1:1 (fewer negatives where the images have no more)."""
        rng = np.random.default_rng([self._seed, 5, i])
        classes = rng.choice(self._index.present, self._classes_per_step)
        images = np.asarray([rng.choice(self._images[int(c)]) for c in classes])
        positives = [self._index.rows_in_image(int(c), int(m)) for c, m in zip(classes, images, strict=True)]
        n_positive = sum(len(p) for p in positives)
        pool = self._negatives_of(np.unique(images))
        negatives = rng.choice(pool, min(n_positive, len(pool)), replace=False)
        rows = np.concatenate([np.sort(negatives), *positives])
        return Step(rows, np.zeros(len(rows), np.int64), 1)

    def _negatives_of(self, images: Rows) -> Rows:
        low, high = (
            np.searchsorted(self._negative_images, images),
            np.searchsorted(self._negative_images, images + 1),
        )
        return np.concatenate([self._negatives[a:b] for a, b in zip(low, high, strict=True)])
