"""One page cut into tiles: pictures, and records of images and annotations that have no ids yet."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calib.annotations import FEDERATED, PICTURE_NAMES
from calib.extract.pictures import read_image
from calib.tiles.grid import Tiling
from calib.tiles.objects import Known, Objects, Shown
from calib.tiles.segments import Segments, mask_area

Record = dict[str, Any]
Pixels = NDArray[np.uint8]
# Of a page's record, what is of the page alone.
_OF_PAGE = ("id", "height", "width", *PICTURE_NAMES, *FEDERATED)
# Of an annotation, what a tile has anew, or what would be wrong in it.
_ANEW = ("id", "image_id", "bbox", "area", "segmentation", "keypoints", "num_keypoints")


@dataclass(frozen=True)
class Page:
    """A picture of the source: its record, and those of its N annotations with what was read of them."""

    record: Record
    rows: list[Record]  # [N]
    objects: Objects  # [N], unscaled
    area: NDArray[np.float64]  # [N]
    known: Known | None  # None: COCO
    number: int  # of the page in the file
    where: str  # file and list, named in errors


@dataclass
class Counts:
    """What became of the objects: ``kept`` in tiles, ``cut`` of them by a border; ``left_out``, too little of them is
    shown; ``lost`` are in no tile at all; ``masks_dropped`` could not be had exactly. ``empty_dropped`` are tiles."""

    pages: int = 0
    tiles: int = 0
    empty: int = 0
    empty_dropped: int = 0
    kept: int = 0
    cut: int = 0
    left_out: int = 0
    lost: int = 0
    masks_dropped: int = 0

    def add(self, other: "Counts") -> None:
        """Sums."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class CutPage:
    """Image records of the tiles, the annotations of each, and counts."""

    images: list[Record] = field(default_factory=list)
    annotations: list[list[Record]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


def cut_page(page: Page, images: Path, tiling: Tiling, out: Path, prefix: str) -> CutPage:
    """Cut the picture of ``page``, which lies under ``images``, and write its tiles as PNG into the folder ``out``.
    ``prefix`` comes before their names in the records.

    Raises:
        MissingFileError, FormatError, InputError: as ``read_image``, or a malformed mask.
    """
    original = read_image(page.record, images)
    pixels = _scaled(original, tiling)
    cut, at = CutPage(counts=Counts(pages=1)), _Cutting(page, original.shape[:2], pixels.shape[:2], tiling)
    draw = np.random.default_rng([tiling.seed, page.number])
    for corner, shown in at.tiles():
        is_empty = not len(shown.row)
        is_dropped = draw.random() >= tiling.empty and is_empty  # one draw per tile, whatever is in it
        cut.counts.empty += is_empty
        cut.counts.empty_dropped += is_dropped
        if is_dropped:
            continue
        name = f"{page.record['id']}_{corner[0]}_{corner[1]}.png"
        Image.fromarray(_tile(pixels, corner, tiling)).save(out / name)
        cut.images.append(at.image(corner, shown, f"{prefix}{name}"))
        cut.annotations.append(at.annotations(corner, shown))
    cut.counts.tiles = len(cut.images)
    cut.counts.add(at.counts())
    return cut


class _Cutting:
    """Records of the tiles of one page."""

    def __init__(self, page: Page, size: tuple[int, int], scaled: tuple[int, int], tiling: Tiling) -> None:
        self.page, self.size, self.scaled, self.tiling = page, size, scaled, tiling
        self.scale = (scaled[1] / size[1], scaled[0] / size[0])  # of x and y
        own = page.objects
        self.objects = Objects(own.box * np.array([*self.scale, *self.scale]), own.category, own.forgives)
        self.segments = Segments(size, self.scale, page.where)
        self._counts = Counts()
        self._seen: set[int] = set()

    def tiles(self) -> Iterator[tuple[tuple[int, int], Shown]]:
        """Corners, and what is shown there."""
        for corner in self.tiling.corners(*self.scaled):
            yield corner, self.objects.shown(corner, self.tiling)

    def image(self, corner: tuple[int, int], shown: Shown, name: str) -> Record:
        """The record of a tile; ``id`` is missing."""
        size, page = self.tiling.size, self.page.record
        record = {key: value for key, value in page.items() if key not in _OF_PAGE}
        record |= {"file_name": name, "height": size, "width": size, "page_id": page["id"]}
        record |= {"page_file_name": page.get("file_name"), "page_height": self.size[0], "page_width": self.size[1]}
        record |= {"tile_x": corner[0], "tile_y": corner[1]}
        record |= {"tile_scale_x": self.scale[0], "tile_scale_y": self.scale[1]}
        if self.page.known is None:
            return record
        kept, left_out = (set(self.objects.category[rows].tolist()) for rows in (shown.row, shown.left_out))
        return record | dict(zip(FEDERATED, self.page.known.of_tile(kept, left_out), strict=True))

    def annotations(self, corner: tuple[int, int], shown: Shown) -> list[Record]:
        """The records of what a tile keeps; ``id`` and ``image_id`` are missing."""
        self._seen.update(shown.row.tolist())
        self._counts.left_out += len(shown.left_out)
        kept = zip(shown.row.tolist(), shown.box.tolist(), shown.share.tolist(), strict=True)
        return [self._annotation(corner, *one) for one in kept]

    def _annotation(self, corner: tuple[int, int], row: int, box: list[float], share: float) -> Record:
        source = self.page.rows[row]
        is_whole = share == 1.0
        self._counts.kept += 1
        self._counts.cut += not is_whole
        record = {key: value for key, value in source.items() if key not in _ANEW}
        record |= {"bbox": box, "area": float(self.page.area[row]) * self.scale[0] * self.scale[1] * share}
        record["page_annotation_id"] = source["id"]
        if not (given := source.get("segmentation")):
            return record
        mask = self.segments.of_tile(given, corner, self.tiling, is_whole=is_whole)
        if mask is None:
            self._counts.masks_dropped += 1
            return record
        area = None if is_whole else mask_area(mask)
        return record | {"segmentation": mask} | ({} if area is None else {"area": area})

    def counts(self) -> Counts:
        """Of all tiles so far."""
        self._counts.lost = len(self.page.rows) - len(self._seen)
        return self._counts


def _scaled(pixels: Pixels, tiling: Tiling) -> Pixels:
    """[H, W, 3] or, of a grey page, [H, W]."""
    is_grey = bool((pixels[..., :1] == pixels[..., 1:]).all())
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if is_grey else pixels)
    height, width = tiling.scaled(*pixels.shape[:2])
    if (height, width) == pixels.shape[:2]:
        return np.asarray(picture)
    # Every pixel of a smaller page is the mean of the pixels that it covers.
    how = Image.Resampling.BOX if tiling.scale < 1 else Image.Resampling.BICUBIC
    return np.asarray(picture.resize((width, height), how))


def _tile(pixels: Pixels, corner: tuple[int, int], tiling: Tiling) -> Pixels:
    x, y = corner
    part = pixels[y : y + tiling.size, x : x + tiling.size]
    if part.shape[:2] == (tiling.size, tiling.size):
        return np.ascontiguousarray(part)
    tile = np.full((tiling.size, tiling.size, *pixels.shape[2:]), tiling.fill, np.uint8)
    tile[: part.shape[0], : part.shape[1]] = part
    return tile
