"""What a tile shows of the objects of its page, and what is known of its categories.

LVIS is federated: of an image only some categories are known. What is known of a page holds for its tiles: a category
that is verified to be absent from the page is absent from each tile. One that is annotated on the page, every object of
it, is verified to be absent from the tiles that show nothing of these objects. Where a tile shows a part of an object
that is too small to be kept, its category is not known to be absent, and not every object of it is annotated.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from calib.tiles.grid import Tiling

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Objects:
    """N objects of a scaled page."""

    box: Floats  # [N, 4], x, y, width, height in pixels of the scaled page
    category: NDArray[np.int64]  # [N], ids
    forgives: Flags  # [N], crowds and what is to be ignored: kept however little is shown of them

    @cached_property
    def low(self) -> Floats:
        """[N, 2]"""
        return self.box[:, :2]

    @cached_property
    def high(self) -> Floats:
        """[N, 2]"""
        return self.box[:, :2] + self.box[:, 2:]

    def shown(self, corner: tuple[int, int], tiling: Tiling) -> "Shown":
        """What the tile at ``corner`` shows of them."""
        start = np.array(corner, np.float64)
        low, high = np.maximum(self.low, start), np.minimum(self.high, start + tiling.size)
        whole = (self.low >= start) & (self.high <= start + tiling.size)
        side = np.where(whole, self.box[:, 2:], high - low)
        has_extent = self.box[:, 2:] > 0
        # A side of no length is shown where its place is: at the border of two tiles, in the second.
        inside = np.where(has_extent, side > 0, (self.low >= start) & (self.low < start + tiling.size)).all(axis=1)
        shares = np.divide(side, self.box[:, 2:], out=np.ones_like(side), where=has_extent)
        share = np.where(inside, shares.prod(axis=1), 0.0)
        enough = (share >= tiling.min_visible) & (side >= tiling.min_side).all(axis=1)
        kept = inside & (enough | self.forgives)
        box = np.concatenate([low - start, side], axis=1)
        return Shown(np.flatnonzero(kept), box[kept], share[kept], np.flatnonzero(inside & ~kept))


@dataclass(frozen=True)
class Shown:
    """K objects that a tile keeps, and M of which it shows too little."""

    row: NDArray[np.int64]  # [K], of the page's objects
    box: Floats  # [K, 4], x, y, width, height in pixels of the tile
    share: Floats  # [K], of the area of the whole box
    left_out: NDArray[np.int64]  # [M], of the page's objects


@dataclass(frozen=True)
class Known:
    """What is known of the categories of a page, by LVIS's two lists; ids."""

    negative: frozenset[int]
    not_exhaustive: frozenset[int]
    annotated: frozenset[int]

    def of_tile(self, kept: set[int], left_out: set[int]) -> tuple[list[int], list[int]]:
        """``neg_category_ids`` and ``not_exhaustive_category_ids`` of a tile that keeps objects of the categories
        ``kept`` and shows too little of others."""
        absent = (self.annotated - self.not_exhaustive) - kept - left_out
        return sorted(self.negative | absent), sorted(self.not_exhaustive | left_out)
