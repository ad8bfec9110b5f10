"""Which rows belong to which class and image: what class-aware samplers draw from."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.cache.read import Cache
from calib.errors import InputError

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class ClassIndex:
    """Rows grouped by label, and for every label the distinct images among them.

    ``order`` lists all rows with a label in 0..C, by label, then row; ``start[c]:start[c + 1]`` is label c's part.
    """

    order: Rows
    start: Rows  # [C + 2]
    image: Rows  # [N] image number of every row, ascending

    @classmethod
    def build(cls, cache: Cache) -> "ClassIndex":
        """Index all rows of ``cache``.

        Raises:
            InputError: it has no foreground row.
        """
        image = np.repeat(np.arange(len(cache.image_start) - 1), np.diff(cache.image_start))
        index = cls.of(cache.labels, image, cache.background)
        if len(index.present) == 0:
            raise InputError(f"cache {cache.path} has no foreground row to train on", hint="extract with --mode train")
        return index

    @classmethod
    def of(cls, labels: NDArray[np.integer[Any]], image: Rows, background: int) -> "ClassIndex":
        """Index rows with [N] labels and [N] ascending image numbers; rows with a negative label are left out."""
        order = np.argsort(labels, kind="stable").astype(np.int64)
        start = np.searchsorted(labels[order], np.arange(background + 2))
        return cls(order, start.astype(np.int64), image)

    @property
    def background(self) -> int:
        """The label of background rows: C."""
        return len(self.start) - 2

    def rows(self, label: int) -> Rows:
        """All rows of ``label``, ascending."""
        return self.order[self.start[label] : self.start[label + 1]]

    @cached_property
    def present(self) -> Rows:
        """Foreground classes with at least one row, ascending."""
        return np.flatnonzero(np.diff(self.start)[:-1] > 0)

    def images(self, label: int) -> Rows:
        """Distinct images with a row of ``label``, ascending."""
        return np.unique(self.image[self.rows(label)])

    def rows_in_image(self, label: int, image: int) -> Rows:
        """Rows of ``label`` in one image, ascending."""
        rows = self.rows(label)
        low, high = np.searchsorted(rows, np.searchsorted(self.image, [image, image + 1]))
        return rows[low:high]

    def rows_in_images(self, labels: Rows, images: Rows) -> Rows:
        """[n], [n] -> the rows of the first foreground label in the first image, then of the second, and so on."""
        places = labels * self._images + images
        low = np.searchsorted(self._places, places)
        count = np.searchsorted(self._places, places, side="right") - low
        ends = np.cumsum(count)
        chosen: Rows = self.start[0] + np.repeat(low - (ends - count), count) + np.arange(ends[-1] if len(ends) else 0)
        return self.order[chosen]

    @property
    def _images(self) -> int:
        return int(self.image[-1]) + 1 if len(self.image) else 1

    @cached_property
    def _places(self) -> Rows:
        """Label and image of the foreground part of ``order`` as one number, which ascends as ``order`` does."""
        foreground = self.order[self.start[0] : self.start[-2]]
        labels = np.repeat(np.arange(self.background), np.diff(self.start)[:-1])
        return np.asarray(labels * self._images + self.image[foreground])
