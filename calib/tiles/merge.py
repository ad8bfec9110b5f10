"""Detections of tiles as detections of their pages.

Boxes are moved and scaled to the page and cut at its border. An object that several tiles show is found several times:
of boxes of one category from different tiles the better one suppresses the others, as in class-wise NMS. Boxes of one
tile are left as they are, since the detector's own NMS has seen them: without an overlap nothing is suppressed.
Letters: N detections of one page.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from calib.boxes import area
from calib.documents import integers, numbers, records, unique
from calib.errors import FormatError, InputError, SettingError
from calib.evaluate.results import PARQUET_COLUMNS, Detections
from calib.files import hash_file, read_json, replacing
from calib.lookup import positions
from calib.progress import Progress, silent
from calib.settings import at_least, one_of
from calib.tiles.cut import PAGE_FIELDS

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
METRICS = ("iou", "ios")
_IDS = ("image_id", "category_id")
SCHEMA = pa.schema(
    [(name, pa.int64() if name in _IDS else pa.float64()) for name in PARQUET_COLUMNS] + [("tile_id", pa.int64())]
)


@dataclass(frozen=True)
class Merging:
    """How detections of several tiles become those of a page.

    Attributes:
        nms_iou: a box is suppressed by a better one of its category from another tile that overlaps it by more.
        metric: of the overlap: ``iou``, intersection over union, or ``ios``, over the area of the smaller box, which
            also finds the part of an object that a border cuts.
        max_detections: of a page, the best; None for all.
    """

    nms_iou: float = 0.5
    metric: str = "iou"
    max_detections: int | None = None

    def __post_init__(self) -> None:
        at_least(self, 0, "nms_iou")
        one_of(self, "metric", METRICS)
        if self.nms_iou > 1:
            raise SettingError(f"nms_iou is {self.nms_iou}: expected a number from 0 to 1")
        if self.max_detections is not None:
            at_least(self, 1, "max_detections")


@dataclass(frozen=True)
class Tiles:
    """T tiles in ascending id."""

    path: Path
    id: Integers  # [T]
    page: Integers  # [T], id of the page
    corner: Floats  # [T, 2], x, y in pixels of the scaled page
    scale: Floats  # [T, 2], of x and y
    page_size: Floats  # [T, 2], width and height of the page

    @classmethod
    def read(cls, path: Path) -> "Tiles":
        """Read a json of ``calib data tile``.

        Raises:
            MissingFileError, FormatError, NonFiniteError: not there, or no such json.
        """
        rows, where = records(read_json(path, "json of tiles"), "images", path), f"{path}: images"
        lacking = [key for key in PAGE_FIELDS if rows and not any(key in row for row in rows)]
        if lacking:
            raise FormatError(f"{path}: no image has '{lacking[0]}'", hint="--tiles names a json of calib data tile")
        ids = unique(integers(rows, "id", where), where)
        order = np.argsort(ids)
        page = integers(rows, "page_id", where)

        def pairs(*keys: str) -> Floats:
            return np.stack([numbers(rows, key, where) for key in keys], axis=1)[order]

        scale, size = pairs("tile_scale_x", "tile_scale_y"), pairs("page_width", "page_height")
        if (scale <= 0).any() or (size < 1).any():
            raise FormatError(f"{where}: scales must be above 0, pages at least 1 pixel", hint="cut the pages again")
        return cls(path, ids[order], page[order], pairs("tile_x", "tile_y"), scale, size)

    def index(self, found: Detections) -> Integers:
        """The tile of every detection, [N].

        Raises:
            InputError: a detection of another image.
        """
        index = positions(self.id, found.image_id)
        if (index < 0).any():
            row = int(np.argmin(index))
            raise InputError(
                f"{found.source}[{row}]: image id {found.image_id[row]} is no tile of {self.path}",
                hint="detections of another split, or of the pages themselves?",
            )
        return index

    def on_page(self, box: Floats, tile: Integers) -> Floats:
        """Boxes [N, 4] (x, y, width, height in their ``tile`` [N]) as x1, y1, x2, y2 on the page."""
        corner, scale, size = self.corner[tile], self.scale[tile], self.page_size[tile]
        low = (box[:, :2] + corner) / scale
        high = (box[:, :2] + box[:, 2:] + corner) / scale
        return np.concatenate([np.clip(low, 0, size), np.clip(high, 0, size)], axis=1)


@dataclass(frozen=True)
class Merged:
    """Numbers of pages, of detections in the tiles, of those suppressed, of those beyond the cap, and of the rest."""

    pages: int
    tiles: int
    read: int
    suppressed: int
    beyond_cap: int
    written: int


def untile(detections: Path, tiles: Path, out: Path, merging: Merging, *, progress: Progress = silent) -> Merged:
    """Write the detections of pages to ``out`` (Parquet): ``image_id`` is that of the page, ``tile_id`` tells the tile.

    Args:
        detections: of tiles, in any form that ``calib evaluate`` takes for boxes.
        tiles: their json, of ``calib data tile``.

    Raises:
        MissingFileError, FormatError, NonFiniteError: not there, or damaged. InputError: detections of other images;
            ``out`` is to be read.
    """
    if out.resolve() in (detections.resolve(), tiles.resolve()):
        raise InputError(f"{out} is to be read and to be written", hint="choose another --out")
    if out.suffix == ".json":
        raise InputError(f"{out} would hold Parquet under the name of a JSON file", hint="--out NAME.parquet")
    placed, found = Tiles.read(tiles), Detections.read(detections)
    tile = placed.index(found)
    box = placed.on_page(found.box, tile)
    kept: list[Integers] = []
    suppressed = 0
    pages = np.unique(placed.page)
    with progress("merging", total=len(pages), unit="pages") as bar:
        for rows in _of_pages(positions(pages, placed.page)[tile], len(pages)):
            best = rows[_survivors(box[rows], found.score[rows], found.category_id[rows], tile[rows], merging)]
            suppressed += len(rows) - len(best)
            kept.append(best[: merging.max_detections])
            bar.advance()
    row = np.concatenate([np.zeros(0, np.int64), *kept])
    columns = [placed.page[tile[row]], found.category_id[row], found.score[row], *box[row].T, placed.id[tile[row]]]
    _write(columns, out, {"detections": hash_file(detections), "tiles": hash_file(tiles), **asdict(merging)})
    return Merged(len(pages), len(placed.id), len(found), suppressed, len(found) - suppressed - len(row), len(row))


def _of_pages(page: Integers, pages: int) -> Iterator[Integers]:
    """Rows of every page, in the order of the file."""
    order = np.argsort(page, kind="stable")
    yield from np.split(order, np.searchsorted(page[order], np.arange(1, pages))) if pages else []


def _survivors(box: Floats, score: Floats, category: Integers, tile: Integers, merging: Merging) -> Integers:
    """Rows of what is not suppressed, best first, ties in the order of rows."""
    order = np.argsort(-score, kind="stable")
    # Together the rows of a category, best first.
    by_category = order[np.argsort(category[order], kind="stable")]
    ends = np.flatnonzero(np.diff(category[by_category])) + 1
    is_kept = np.zeros(len(score), np.bool_)
    for rows in np.split(by_category, ends):
        is_kept[rows] = _unsuppressed(box[rows], tile[rows], merging)
    return order[is_kept[order]]


def _unsuppressed(box: Floats, tile: Integers, merging: Merging) -> NDArray[np.bool_]:
    """Which of N boxes of one category, best first, no better one of another tile suppresses. [N]"""
    is_kept = np.ones(len(box), np.bool_)
    if len(box) < 2 or (tile == tile[0]).all():
        return is_kept
    areas = area(box)
    for k in range(len(box) - 1):
        if is_kept[k]:
            later = slice(k + 1, None)
            over = _overlap(box[k], box[later], areas[k], areas[later], merging.metric) > merging.nms_iou
            is_kept[later] &= ~(over & (tile[later] != tile[k]))
    return is_kept


def _overlap(one: Floats, others: Floats, its_area: Any, areas: Floats, metric: str) -> Floats:
    """Of one box [4] with others [M, 4]. Boxes without area overlap nothing. [M]"""
    sides = np.minimum(one[2:], others[:, 2:]) - np.maximum(one[:2], others[:, :2])
    inter = np.clip(sides, 0, None).prod(axis=1)
    whole = np.minimum(its_area, areas) if metric == "ios" else its_area + areas - inter
    share: Floats = np.divide(inter, whole, out=np.zeros_like(inter), where=whole > 0)
    return share


def _write(columns: list[Any], out: Path, origin: dict[str, Any]) -> None:
    schema = SCHEMA.with_metadata({"calib.untile": orjson.dumps(origin)})
    with replacing(out) as temporary:
        pq.write_table(pa.table(columns, schema=schema), temporary, compression="zstd")
