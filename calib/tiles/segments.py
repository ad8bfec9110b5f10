"""Masks of objects in tiles, where they can be had exactly.

Polygons of an object that lies within the tile are scaled and moved. What is cut, and run lengths, become the pixels of
the page's own mask in the tile, as run lengths: exact where the page is not scaled. Otherwise there is no mask.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from calib.errors import FormatError
from calib.evaluate.masks import pixels, run_lengths
from calib.tiles.grid import Tiling


@dataclass(frozen=True)
class Segments:
    """Masks of the objects of one page; ``size`` is its height and width unscaled, ``scale`` that of x and y."""

    size: tuple[int, int]
    scale: tuple[float, float]
    where: str  # file and list, named in errors

    def of_tile(self, given: Any, corner: tuple[int, int], tiling: Tiling, *, is_whole: bool) -> Any:
        """The mask ``given`` of the page in the tile at ``corner``, or None.

        Raises:
            FormatError: a malformed mask.
        """
        if is_whole and isinstance(given, list):
            return [self._moved(polygon, corner) for polygon in given]
        if self.scale != (1.0, 1.0):
            return None
        (code,) = run_lengths([given], [self.size], self.where)
        return _cropped(code, corner, tiling.size)

    def _moved(self, polygon: Any, corner: tuple[int, int]) -> list[float]:
        try:
            xy = np.array(polygon, np.float64).reshape(-1, 2)
        except (TypeError, ValueError) as e:
            raise FormatError(f"{self.where}: malformed 'segmentation': {e}") from e
        moved: list[float] = (xy * self.scale - corner).reshape(-1).tolist()
        return moved


def mask_area(segmentation: Any) -> float | None:
    """Pixels of run lengths; None for polygons, whose area the annotation has."""
    from pycocotools import mask as coco_mask

    return float(coco_mask.area(segmentation)) if isinstance(segmentation, dict) else None


def _cropped(code: dict[str, Any], corner: tuple[int, int], size: int) -> dict[str, Any]:
    """Run lengths of the square of ``size`` at ``corner``, empty beyond the page."""
    from pycocotools import mask as coco_mask

    x, y = corner
    part = pixels(code)[y : y + size, x : x + size]
    square = np.zeros((size, size), np.uint8, order="F")
    square[: part.shape[0], : part.shape[1]] = part
    found = coco_mask.encode(square)
    return {"size": [size, size], "counts": found["counts"].decode()}
