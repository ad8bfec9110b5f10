"""A LVIS or COCO data set cut into tiles.

    OUT/NAME.json          the tiles as a data set of the same form
    OUT/images/NAME/*.png  their pictures; file_name is relative to OUT/images

Several splits have a place in one OUT. A tile's record has, besides what its page's record has: ``page_id``,
``page_file_name``, ``page_height``, ``page_width``; ``tile_x``, ``tile_y``, its corner in pixels of the scaled page;
``tile_scale_x``, ``tile_scale_y``, pixels of the tile per pixel of the page. An annotation has ``page_annotation_id``.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from calib import __version__
from calib.annotations import Annotations
from calib.cache.categories import Categories
from calib.documents import encoded
from calib.errors import ExistsError, InputError, SettingError
from calib.files import fsync_dir, hash_file, lock, read_json, replacing, require, write_json
from calib.progress import Progress, silent
from calib.tiles.grid import Tiling
from calib.tiles.objects import Known, Objects
from calib.tiles.page import Counts, CutPage, Page, cut_page

MARK = ".calib-tiles.json"  # stands in a folder of tiles: no other folder is ever replaced
PAGE_FIELDS = ("page_id", "page_height", "page_width", "tile_x", "tile_y", "tile_scale_x", "tile_scale_y")
Document = dict[str, Any]


@dataclass(frozen=True)
class CutSet:
    """What was written, and what is odd about it."""

    path: Path  # OUT/NAME.json
    counts: Counts
    notices: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Plain metrics."""
        return {"annotations": str(self.path), **asdict(self.counts)}


def cut_file(
    annotations: Path,
    images: Path,
    out: Path,
    tiling: Tiling,
    *,
    recount: bool = False,
    name: str | None = None,
    threads: int = 1,
    overwrite: bool = False,
    progress: Progress = silent,
) -> CutSet:
    """Cut the pictures of ``annotations``, which lie under ``images``, into tiles; ``name`` is that of the file.

    ``recount`` writes the counts of the tiles into the categories, as is right for what a detector is trained on;
    otherwise categories keep the counts that they have. Everything appears under ``out``, or nothing.

    Raises:
        ExistsError: there are tiles of this name, something else stands in their place, or another process cuts them.
        SettingError: the source would be replaced. MissingFileError, FormatError, NonFiniteError, InputError: not
            there, no annotation file, tiles already, or a picture that is missing or damaged.
    """
    require(images, "folder of pictures", "--images is where file_name of the annotation file begins")
    name = annotations.name.removesuffix(".gz").removesuffix(".json") if name is None else name
    if not name or Path(name).name != name or name.startswith("."):
        raise SettingError(f"'{name}' is no name of a file", hint="--name train, for example")
    target, folder = out / f"{name}.json", out / "images" / name
    if target.resolve() == annotations.resolve():
        raise SettingError(f"{target} is to be read and to be written", hint="choose another --out, or --name")
    document = read_json(annotations, "annotation file")
    read = Annotations.from_document(document, annotations)
    pages = list(_pages(document, read))
    about = {"source": annotations.name, "source_xxh3_64": hash_file(annotations), **asdict(tiling)}
    about["calib"] = __version__
    with lock(out / f".{name}.lock", f"cutting {target}"):
        _check_free(target, folder, overwrite=overwrite)
        with _growing(folder) as temporary:
            write_json(temporary / MARK, about)
            cut = _cut_all(pages, images, tiling, temporary, f"{name}/", threads, progress)
            dropped = _named_images(document)
            written = _document(document, cut, about, dropped)
            if recount:
                written["categories"] = _recounted(written, target)
            content = encoded(written, annotations)
            target.unlink(missing_ok=True)  # tiles of before, whose pictures go now
        with replacing(target) as file:
            file.write_bytes(content)
        (out / f".{name}.lock").unlink()
    counts = Counts()
    for one in cut:
        counts.add(one.counts)
    return CutSet(target, counts, (*read.notices, *_notices(counts, read, dropped)))


def _check_free(target: Path, folder: Path, *, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise ExistsError(f"{target} exists", hint="choose another --out or --name, or add --overwrite")
    if folder.exists() and not (folder / MARK).is_file():
        raise ExistsError(f"{folder} exists and holds no tiles: it is not replaced", hint="choose another --out")


@contextmanager
def _growing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place on success. One of a killed process goes first; the
    caller holds a lock."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        fsync_dir(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _pages(document: Document, read: Annotations) -> Iterator[Page]:
    """In ascending id."""
    where = f"{read.path}: images"
    records = {int(row["id"]): row for row in document["images"]}
    if tile := next((i for i, row in records.items() if any(key in row for key in PAGE_FIELDS)), None):
        raise InputError(f"image {tile} of {read.path} is a tile already", hint="cut the pages in another way")
    rows = document["annotations"] if read.style != "none" else []
    order = np.argsort(read.image, kind="stable")
    bounds = np.searchsorted(read.image[order], np.arange(len(read.images.id) + 1))
    for k, image_id in enumerate(read.images.id.tolist()):
        own = order[bounds[k] : bounds[k + 1]]
        category = read.categories.id[read.category[own]]
        objects = Objects(read.box[own], category, read.crowd[own] | read.ignore[own])
        record = records[image_id] | {"id": image_id}
        yield Page(record, [rows[i] for i in own], objects, read.area[own], _known(read, k, category), k, where)


def _known(read: Annotations, image: int, category: Any) -> Known | None:
    if read.style != "lvis":
        return None
    parts = [one.ids[one.start[image] : one.start[image + 1]] for one in read.images.federated]
    return Known(*(frozenset(ids.tolist()) for ids in (*parts, category)))


def _cut_all(
    pages: list[Page], images: Path, tiling: Tiling, out: Path, prefix: str, threads: int, progress: Progress
) -> list[CutPage]:
    """In threads: reading, scaling and writing pictures leaves Python alone."""
    pool = ThreadPoolExecutor(threads)
    try:
        with progress("cutting", total=len(pages), unit="pages") as bar:
            cut = []
            for one in pool.map(lambda page: cut_page(page, images, tiling, out, prefix), pages):
                cut.append(one)
                bar.advance()
            return cut
    finally:
        pool.shutdown(cancel_futures=True)


def _named_images(document: Document) -> list[str]:
    """Lists other than annotations whose entries name an image: captions, for one."""
    lists = {k: v for k, v in document.items() if isinstance(v, list) and k not in ("images", "annotations")}
    return [k for k, v in lists.items() if v and all(isinstance(row, dict) and "image_id" in row for row in v)]


def _document(source: Document, cut: list[CutPage], about: Document, dropped: list[str]) -> Document:
    """The tiles as a data set; ids of images and annotations count from 1."""
    images, annotations, image_ids, annotation_ids = [], [], count(1), count(1)
    for page in cut:
        for record, rows in zip(page.images, page.annotations, strict=True):
            image_id = next(image_ids)
            images.append({"id": image_id} | record)
            annotations += [{"id": next(annotation_ids), "image_id": image_id} | row for row in rows]
    kept = {key: value for key, value in source.items() if key not in dropped}
    lists: Document = {"images": images}
    if source.get("annotations") is not None:
        lists["annotations"] = annotations
    info = source.get("info")
    return kept | lists | {"info": (info if isinstance(info, dict) else {}) | {"calib_tiles": about}}


def _recounted(document: Document, path: Path) -> list[Document]:
    """Category records with the counts of the tiles."""
    keys = ("instance_count", "image_count", "frequency")
    rows = [{key: value for key, value in row.items() if key not in keys} for row in document["categories"]]
    counts = Categories.of(Annotations.from_document(document | {"categories": rows}, path))
    position = {category_id: k for k, category_id in enumerate(counts.category_id.tolist())}
    columns = dict(
        zip(keys, (counts.instance_count.tolist(), counts.image_count.tolist(), counts.frequency), strict=True)
    )
    return [row | {key: column[position[int(row["id"])]] for key, column in columns.items()} for row in rows]


def _notices(counts: Counts, read: Annotations, dropped: list[str]) -> Iterator[str]:
    if counts.lost:
        yield (
            f"{counts.lost:,} of {len(read.id):,} annotations are in no tile: no tile shows enough of them. A larger"
            " --overlap or a smaller --min-visible keeps them"
        )
    if counts.masks_dropped:
        yield f"{counts.masks_dropped:,} masks are left out: of a scaled page only whole polygons can be had exactly"
    if dropped:
        yield f"not in the tiles: {', '.join(dropped)}, which name images of the source"
