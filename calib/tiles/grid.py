"""Where the tiles of a page lie.

A page is a picture of the source. It is scaled as a whole, then cut into squares of one size; the last row and column
are moved back to end at its border. Only a page smaller than a tile is filled up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from calib.errors import SettingError
from calib.settings import at_least


@dataclass(frozen=True)
class Tiling:
    """How pages are cut.

    Attributes:
        size: side of a tile, in pixels of the scaled page.
        overlap: pixels that neighbours share at least.
        scale: of the page, before it is cut.
        min_visible: share of a box's area that a tile must show to keep the object, above 0 and at most 1.
        min_side: pixels of the tile that both sides of what is shown must have.
        empty: share of the tiles without objects that is kept, drawn by ``seed``.
        fill: grey level beyond a page that is smaller than a tile, 0 (black) to 255.
    """

    size: int
    overlap: int = 0
    scale: float = 1.0
    min_visible: float = 0.5
    min_side: float = 0.0
    empty: float = 1.0
    fill: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "size")
        at_least(self, 0, "overlap", "min_side", "empty", "fill", "seed", "min_visible", "scale")
        if self.overlap >= self.size:
            raise SettingError(f"overlap is {self.overlap}: expected less than the size of a tile, {self.size}")
        if not 0 < self.scale <= 16:
            raise SettingError(f"scale is {self.scale}: expected a number above 0 and up to 16")
        if not 0 < self.min_visible <= 1 or self.empty > 1:
            raise SettingError("min_visible is a share above 0 and up to 1, empty one from 0 to 1")
        if self.fill > 255:
            raise SettingError(f"fill is {self.fill}: expected a grey level from 0 to 255")

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a page once it is scaled."""
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))

    def corners(self, height: int, width: int) -> Iterator[tuple[int, int]]:
        """The upper left corner (x, y) of every tile of a scaled page, row by row."""
        for y, x in product(starts(height, self.size, self.overlap), starts(width, self.size, self.overlap)):
            yield x, y


def starts(length: int, size: int, overlap: int) -> list[int]:
    """Where tiles of ``size`` begin that cover ``length`` and share at least ``overlap`` with the one before."""
    if length <= size:
        return [0]
    return [*range(0, length - size, size - overlap), length - size]
