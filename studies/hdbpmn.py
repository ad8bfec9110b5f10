"""hdBPMN as a COCO data set: train.json, tune.json, val.json and pictures/, from a clone of its repository.

    python studies/hdbpmn.py hdBPMN --out bpmn [--side 1024]

Source: Schäfer, van der Aa, Leopold and Stuckenschmidt, Sketch2BPMN, CAiSE 2021; repository dwslab/hdBPMN, CC BY 4.0:
photographs and scans of process diagrams that people drew by hand. What this script writes is under the same licence,
and no part of calib.

A diagram is a BPMN file over its picture; the picture's longer side is ``backgroundSize`` units of the file. Every
drawn element with a shape is an object; lines, texts and annotations are left out. The category is the element's kind
and, of an event, what it waits for or gives. Splits are the repository's own, by writer: train, val (here tune) and
test (here val). Pictures are shrunk to ``--side``; those that the clone lacks are left out and counted.
"""

import argparse
import csv
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

from PIL import Image

from calib.cli.console import bar, exit_code
from calib.errors import ExistsError, FormatError, MissingFileError
from calib.files import require, write_json

SPLITS = {"train": "train", "val": "tune", "test": "val"}  # theirs and ours
LEFT_OUT = ("textAnnotation", "group")
_SIZE = re.compile(r'"backgroundSize"\s*:\s*(\d+)')
_NAME = re.compile(r"ex(\d+)_writer(\d+)")


@dataclass(frozen=True)
class Shape:
    """A drawn element: category, and x, y, width, height in units of its file."""

    category: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Diagram:
    """One drawing with its picture; ``size`` is the picture's longer side in units of ``shapes``."""

    name: str
    exercise: int
    writer: str
    picture: Path
    size: float
    shapes: tuple[Shape, ...]


def read_diagram(path: Path, picture: Path) -> Diagram:
    """
    Raises:
        FormatError: damaged, or no such file.
    """
    named = _NAME.fullmatch(path.stem)
    try:
        text = path.read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
        size = float(_SIZE.search(text)[1])  # type: ignore[index]
        assert named is not None
        shapes = tuple(_shapes(root))
    except (ElementTree.ParseError, UnicodeDecodeError, TypeError, ValueError, KeyError, AssertionError) as e:
        raise FormatError(f"{path} is damaged: {e}", hint="restore it: git checkout in the clone") from e
    return Diagram(path.stem, int(named[1]), f"writer{named[2]}", picture, size, shapes)


def _shapes(root: ElementTree.Element) -> Iterator[Shape]:
    elements = {element.get("id"): element for element in root.iter() if element.get("id")}
    for shape in root.iter():
        if _tag(shape) == "BPMNShape" and (category := _category(elements[shape.get("bpmnElement")], shape)):
            bounds = next(child for child in shape if _tag(child) == "Bounds")
            x, y, width, height = (float(bounds.attrib[key]) for key in ("x", "y", "width", "height"))
            yield Shape(category, (x, y, width, height))


def _category(element: ElementTree.Element, shape: ElementTree.Element) -> str:
    """Empty for what is left out."""
    tag = _tag(element)
    if tag in LEFT_OUT:
        return ""
    if tag == "subProcess":
        return f"{tag}, {'open' if shape.get('isExpanded') == 'true' else 'closed'}"
    kinds = [_tag(child).removesuffix("EventDefinition") for child in element if "EventDefinition" in child.tag]
    return ", ".join([tag.removesuffix("Reference"), *kinds])


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def read_diagrams(clone: Path) -> tuple[dict[str, list[Diagram]], list[str]]:
    """Diagrams of every split, and names of those whose picture is not there.

    Raises:
        MissingFileError: no such repository. FormatError: a damaged file.
    """
    data = require(clone / "data", "folder of the data set", "git clone dwslab/hdBPMN")
    with require(data / "writer_split.csv", "list of writers").open() as f:
        split_of = {row["writer"]: SPLITS[row["split"]] for row in csv.DictReader(f)}
    pictures = {path.stem: path for path in (data / "images").glob("*/*") if path.suffix != ".bpmn"}
    files = sorted((data / "annotations").glob("*/*.bpmn"))
    if not files or not pictures:
        raise MissingFileError(f"{data} has no diagrams", hint="the clone must have files, not only history")
    found: dict[str, list[Diagram]] = {split: [] for split in SPLITS.values()}
    for path in files:
        if path.stem in pictures:
            diagram = read_diagram(path, pictures[path.stem])
            found[split_of[diagram.writer]].append(diagram)
    return found, [path.stem for path in files if path.stem not in pictures]


def document(diagrams: list[Diagram], sizes: dict[str, tuple[int, int]], ids: dict[str, int]) -> dict[str, Any]:
    """A COCO document; ``sizes`` are width and height of the written pictures. Boxes end where pictures end."""
    images, annotations = [], []
    for k, diagram in enumerate(diagrams, 1):
        width, height = sizes[diagram.name]
        record = {"id": k, "file_name": f"{diagram.name}.jpg", "width": width, "height": height}
        images.append(record | {"writer": diagram.writer, "exercise": diagram.exercise})
        unit = max(width, height) / diagram.size
        for shape in diagram.shapes:
            left, top, right, bottom = _corners(shape.box, unit, width, height)
            if shape.category in ids and right > left and bottom > top:
                box, area = [left, top, right - left, bottom - top], (right - left) * (bottom - top)
                given = {"id": len(annotations) + 1, "image_id": k, "category_id": ids[shape.category], "bbox": box}
                annotations.append(given | {"area": round(area, 2), "iscrowd": 0})
    categories = [{"id": k, "name": name} for name, k in ids.items()]
    info = {"description": "hdBPMN, CAiSE 2021, CC BY 4.0, github.com/dwslab/hdBPMN"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def _corners(box: tuple[float, ...], unit: float, width: int, height: int) -> tuple[float, ...]:
    x, y, w, h = (value * unit for value in box)
    corners = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
    return tuple(round(value, 2) for value in corners)


def make(clone: Path, out: Path, side: int = 1024) -> dict[str, Any]:
    """Write the set to the folder ``out``, which appears complete or not at all; returns numbers per split.

    Categories are those of train: what train has no object of has no boxes in tune and val.

    Raises:
        ExistsError: ``out`` is there. MissingFileError, FormatError: as ``read_diagrams``.
    """
    if out.exists():
        raise ExistsError(f"{out} exists", hint="name another --out, or remove it")
    parts, missing = read_diagrams(clone)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "pictures").mkdir(parents=True)
    try:
        diagrams = [diagram for part in parts.values() for diagram in part]
        sizes = dict(_shrunk(diagrams, temporary / "pictures", side))
        counts = Counter(shape.category for diagram in parts["train"] for shape in diagram.shapes)
        ids = {name: k for k, name in enumerate(sorted(counts), 1)}
        written = {split: document(part, sizes, ids) for split, part in parts.items()}
        for split, content in written.items():
            write_json(temporary / f"{split}.json", content)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    numbers = {split: {"pictures": len(c["images"]), "boxes": len(c["annotations"])} for split, c in written.items()}
    return {"categories": len(ids), "without_picture": len(missing), **numbers, "train_counts": dict(counts)}


def _shrunk(diagrams: list[Diagram], folder: Path, side: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Pictures written to ``folder``; name, width and height of each."""
    with bar("pictures", total=len(diagrams), unit="pictures") as progress:
        for diagram in diagrams:
            with Image.open(diagram.picture) as picture:
                picture.draft("RGB", (side, side))  # a JPEG is decoded at a smaller size
                own = picture.convert("RGB")
            own.thumbnail((side, side), Image.Resampling.LANCZOS)
            own.save(folder / f"{diagram.name}.jpg", quality=92)
            progress.advance()
            yield diagram.name, own.size


def main() -> int:
    """Exit code 0, or 2 with one line on stderr that says what to mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="a clone of dwslab/hdBPMN")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--side", type=int, default=1024, help="longer side of the pictures (%(default)s)")
    args = parser.parse_args()
    return exit_code(lambda: print(json.dumps(make(args.clone, args.out, args.side))))


if __name__ == "__main__":
    sys.exit(main())
