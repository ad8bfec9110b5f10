"""MUSCIMA++ 2.0 as a LVIS data set: train.json, tune.json, val.json and pages/, from a clone of its repository.

    python studies/muscima.py muscima-pp --out muscima [--by version|score]

Source: Hajič jr. and Pecina, The MUSCIMA++ Dataset for Handwritten Optical Music Recognition, ICDAR 2017; repository
OMR-Research/muscima-pp, CC BY-NC-SA 4.0. What this script writes is under the same licence, and no part of calib.

The repository has no pictures: pages are put together from the pixel masks of their symbols, black on white, with
``MARGIN`` pixels to the right and below. Staffs and their spaces, which are areas and no ink, are not drawn. They,
staff lines and unclassified marks have no boxes. Every symbol is annotated, so that of an image every other category
is known to be absent.

The 140 pages are 20 pages of music, each written by seven people. By ``version`` the seven versions of each are
divided, in the order of the writers: four to train, one to tune, two to val. No version is in two splits, but every
page of val shows music of which train has another hand's version. By ``score`` all versions of a page of music are in
one split, so that val is music that train has not seen; scores are divided so that categories have their shares.
"""

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calib.annotations import Annotations
from calib.cli.console import bar, exit_code
from calib.data.split import split_images
from calib.errors import ExistsError, FormatError, MissingFileError, SettingError
from calib.files import require, write_json

MARGIN = 40
NOT_INK = ("staff", "staffSpace")
WITHOUT_BOXES = (*NOT_INK, "staffLine", "unclassified")
SPLITS = ("train", "tune", "val")
VERSIONS = ("train", "val", "train", "tune", "train", "val", "train")  # of the seven, in the order of the writers
SHARES = {"train": 4 / 7, "tune": 1 / 7, "val": 2 / 7}
_NAME = re.compile(r"CVC-MUSCIMA_W-(\d+)_N-(\d+)_D-ideal\.xml")
_FIELDS = ("Top", "Left", "Height", "Width")


@dataclass(frozen=True)
class Symbol:
    """What is written: class, place in pixels, and which pixels of its box are ink, [height, width]."""

    name: str
    top: int
    left: int
    mask: NDArray[np.bool_]

    @property
    def box(self) -> list[int]:
        """x, y, width, height."""
        return [self.left, self.top, self.mask.shape[1], self.mask.shape[0]]


@dataclass(frozen=True)
class Page:
    """A version of a page of music, by its writer."""

    writer: int
    score: int
    symbols: list[Symbol]

    @property
    def file_name(self) -> str:
        """For example ``w01_n10.png``."""
        return f"w{self.writer:02d}_n{self.score:02d}.png"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        bottom = max(s.top + s.mask.shape[0] for s in self.symbols)
        right = max(s.left + s.mask.shape[1] for s in self.symbols)
        return bottom + MARGIN, right + MARGIN

    def picture(self) -> Image.Image:
        """One bit per pixel, ink 0."""
        ink = np.zeros(self.size, np.bool_)
        for s in self.symbols:
            if s.name not in NOT_INK:
                height, width = s.mask.shape
                ink[s.top : s.top + height, s.left : s.left + width] |= s.mask
        return Image.fromarray(~ink)

    def boxes(self) -> Iterator[Symbol]:
        """What a detector is to find."""
        yield from (s for s in self.symbols if s.name not in WITHOUT_BOXES)


def read_pages(clone: Path) -> Iterator[Page]:
    """All pages of the repository at ``clone``, by file name.

    Raises:
        MissingFileError: no such files. FormatError: a damaged one.
    """
    folder = require(
        clone / "v2.0" / "data" / "annotations", "folder of annotations", "git clone OMR-Research/muscima-pp"
    )
    found = [(path, match) for path in sorted(folder.glob("*.xml")) if (match := _NAME.fullmatch(path.name))]
    if not found:
        raise MissingFileError(f"{folder} has no annotations", hint="the clone must have files, not only history")
    for path, match in found:
        yield Page(int(match[1]), int(match[2]), list(_symbols(path)))


def _symbols(path: Path) -> Iterator[Symbol]:
    try:
        for node in ElementTree.parse(path).getroot().iter("Node"):
            top, left, height, width = (int(node.findtext(key, "")) for key in _FIELDS)
            runs = [run.split(":") for run in node.findtext("Mask", "").split()]
            values, lengths = [int(value) for value, _ in runs], [int(length) for _, length in runs]
            mask = np.repeat(np.array(values, np.bool_), lengths).reshape(height, width)
            yield Symbol(node.findtext("ClassName", ""), top, left, mask)
    except (ElementTree.ParseError, ValueError) as e:
        raise FormatError(f"{path} is damaged: {e}", hint="restore it: git checkout in the clone") from e


def by_version(pages: list[Page]) -> dict[str, list[int]]:
    """Places in ``pages`` of every split."""
    found: dict[str, list[int]] = {split: [] for split in SPLITS}
    for score in sorted({page.score for page in pages}):
        versions = sorted((page.writer, k) for k, page in enumerate(pages) if page.score == score)
        for number, (_, k) in enumerate(versions):
            found[VERSIONS[number % len(VERSIONS)]].append(k)
    return {split: sorted(places) for split, places in found.items()}


def by_score(pages: list[Page], whole: dict[str, Any], seed: int) -> dict[str, list[int]]:
    """The same, versions of a score together. ``whole`` is the set in one document, image ids from 1."""
    read, groups = Annotations.from_document(whole, Path("muscima.json")), np.array([page.score for page in pages])
    parts = split_images(read, SHARES, groups=groups, seed=seed)
    return {split: [int(i) - 1 for i in ids] for split, ids in parts.items()}


def document(pages: list[Page], places: list[int], categories: list[dict[str, Any]]) -> dict[str, Any]:
    """A LVIS document of the pages at ``places``; an image's id is its place, from 1."""
    ids = {c["name"]: c["id"] for c in categories}
    images, annotations = [], []
    for k in places:
        own = [s for s in pages[k].boxes() if s.name in ids]
        height, width = pages[k].size
        absent = set(ids.values()) - {ids[s.name] for s in own}
        record = {"id": k + 1, "file_name": pages[k].file_name, "height": height, "width": width}
        record |= {"writer": pages[k].writer, "score": pages[k].score}
        images.append(record | {"neg_category_ids": sorted(absent), "not_exhaustive_category_ids": []})
        for s in own:
            given = {"id": len(annotations) + 1, "image_id": k + 1, "category_id": ids[s.name], "bbox": s.box}
            annotations.append(given | {"area": int(s.mask.sum())})
    info = {"description": "MUSCIMA++ 2.0, ICDAR 2017, CC BY-NC-SA 4.0, github.com/OMR-Research/muscima-pp"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def category_records(pages: list[Page]) -> list[dict[str, Any]]:
    """The classes of ``pages``, by name, with their counts there; frequency as in LVIS: r to 10 images, c to 100."""
    instances = Counter(s.name for page in pages for s in page.boxes())
    images = Counter(name for page in pages for name in {s.name for s in page.boxes()})
    return [
        {
            "id": k + 1,
            "name": name,
            "instance_count": instances[name],
            "image_count": images[name],
            "frequency": "r" if images[name] <= 10 else "c" if images[name] <= 100 else "f",
        }
        for k, name in enumerate(sorted(instances))
    ]


def make(clone: Path, out: Path, by: str = "version", seed: int = 0) -> dict[str, Any]:
    """Write the set to the folder ``out``, which appears complete or not at all; returns numbers per split.

    Categories are those of train: what train has no object of has no boxes in tune and val.

    Raises:
        ExistsError: ``out`` is there. SettingError: no such division. MissingFileError, FormatError: as ``read_pages``.
    """
    if by not in ("version", "score"):
        raise SettingError(f"by is '{by}': expected version or score")
    if out.exists():
        raise ExistsError(f"{out} exists", hint="name another --out, or remove it")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "pages").mkdir(parents=True)
    try:
        pages = list(_drawn(clone, temporary / "pages"))
        whole = document(pages, list(range(len(pages))), category_records(pages))
        parts = by_version(pages) if by == "version" else by_score(pages, whole, seed)
        categories = category_records([pages[k] for k in parts["train"]])
        written = {split: document(pages, parts[split], categories) for split in SPLITS}
        for split, content in written.items():
            write_json(temporary / f"{split}.json", content)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    left_out = len(whole["annotations"]) - sum(len(d["annotations"]) for d in written.values())
    return {"by": by, "categories": len(categories), "boxes_without_category": left_out} | {
        split: _numbers(content) for split, content in written.items()
    }


def _drawn(clone: Path, folder: Path) -> Iterator[Page]:
    """The pages, drawn into ``folder``."""
    with bar("pages", total=len(list(clone.glob("v2.0/data/annotations/CVC*.xml"))), unit="pages") as progress:
        for page in read_pages(clone):
            page.picture().save(folder / page.file_name)
            progress.advance()
            yield page


def _numbers(content: dict[str, Any]) -> dict[str, int]:
    shown = {a["category_id"] for a in content["annotations"]}
    return {"pages": len(content["images"]), "boxes": len(content["annotations"]), "categories": len(shown)}


def main() -> int:
    """Exit code 0, or 2 with one line on stderr that says what to mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="a clone of OMR-Research/muscima-pp")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--by", choices=("version", "score"), default="version", help="what is divided (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the division by score (%(default)s)")
    args = parser.parse_args()
    return exit_code(lambda: print(json.dumps(make(args.clone, args.out, args.by, args.seed))))


if __name__ == "__main__":
    sys.exit(main())
