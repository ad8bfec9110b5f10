"""Reading an annotation file that may be ill.

A file that keeps the rules of ``calib.annotations`` is read as every command reads it. Of one that breaks them, what
breaks a rule is named and left out, so that the rest can be looked at, too.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.annotations import LARGEST_PIXEL, Annotations
from calib.doctor.findings import EXAMPLES, Finding, first
from calib.errors import CalibError, FormatError
from calib.files import read_json

Row = dict[str, Any]
LISTS = ("images", "categories", "annotations")
SPLITS_MIXED = "the file mixes splits or was cut: write it again from its source"
NEGATIVE = "bbox is x, y, width, height: write the left upper corner and sides above 0"


@dataclass(frozen=True)
class Split:
    """An annotation file as it was read; ``name``: train, tune or val; ``folder``: its pictures, if they are given."""

    name: str
    read: Annotations
    folder: Path | None = None

    @property
    def where(self) -> str:
        """The file, for findings."""
        return str(self.read.path)


def read_split(name: str, path: Path, folder: Path | None) -> tuple[Split | None, list[Finding]]:
    """The split, None where nothing of it can be used, and what is against the rules.

    Raises:
        MissingFileError, FormatError: not there, or not JSON; an object of lists is expected.
    """
    document = read_json(path, "annotation file")
    if not isinstance(document, dict):
        raise FormatError(
            f"{path}: expected a LVIS or COCO ground-truth object, got a {type(document).__name__}",
            hint="a list is a results file; the ground truth is the split's annotations",
        )
    try:
        return Split(name, Annotations.from_document(document, path), folder), []
    except CalibError:
        mended, findings = _mended(document, path)
    try:
        return Split(name, Annotations.from_document(mended, path), folder), findings
    except CalibError as e:
        return None, [*findings, Finding("json-refused", "error", str(path), str(e), e.hint)]


def _mended(document: Row, path: Path) -> tuple[Row, list[Finding]]:
    """The document without the rows that break a rule, and these."""
    findings: list[Finding] = []
    rows = {key: document.get(key) for key in LISTS}
    if not all(isinstance(v, list) and all(isinstance(r, dict) for r in v) for v in rows.values()):
        return document, findings
    kept: dict[str, list[Row]] = {key: _once(key, value, path, findings) for key, value in rows.items() if value}
    for key in ("image", "category"):
        known = {_key(r.get("id")) for r in kept.get("images" if key == "image" else "categories", [])}
        kept["annotations"] = _known(f"{key}_id", known, kept.get("annotations", []), path, findings)
    kept["annotations"] = _boxed(kept["annotations"], path, findings)
    return document | kept, findings


def _key(value: Any) -> Any:
    """Something to compare ids by: 3 and 3.0 are one, a list is none."""
    return value if isinstance(value, int | float | str) else repr(value)


def _once(what: str, rows: list[Row], path: Path, findings: list[Finding]) -> list[Row]:
    """The first row of every id."""
    times = Counter(_key(r.get("id")) for r in rows)
    again = [f"{i} ({n} times)" for i, n in times.items() if n > 1]
    if not again:
        return rows
    findings.append(
        Finding(
            "duplicate-ids",
            "error",
            f"{path}: {what}",
            f"{len(again)} ids stand more than once: {first(again)}; the first row of each is kept here",
            f'renumber: for i, row in enumerate(d["{what}"], 1): row["id"] = i (were two splits joined? then the '
            "image_id of their annotations must follow)"
            if what != "categories"
            else "give every category an id of its own, and its annotations the same",
            tuple(again[:EXAMPLES]),
            {"list": what, "ids": len(again), "rows": len(rows) - len(times)},
        )
    )
    one: dict[Any, Row] = {}
    for row in rows:
        one.setdefault(_key(row.get("id")), row)
    return list(one.values())


def _known(key: str, known: set[Any], rows: list[Row], path: Path, findings: list[Finding]) -> list[Row]:
    """Rows that point at something that is there."""
    lost = [r for r in rows if _key(r.get(key)) not in known]
    if lost:
        ids = sorted({str(r.get(key)) for r in lost})
        findings.append(
            Finding(
                f"unknown-{'images' if key == 'image_id' else 'categories'}",
                "error",
                f"{path}: annotations",
                f"{len(lost)} of {len(rows)} annotations have a {key} that the file does not list: {first(ids)}",
                SPLITS_MIXED,
                tuple(ids[:EXAMPLES]),
                {"annotations": len(lost), "of": len(rows), "ids": len(ids)},
            )
        )
    return [r for r in rows if _key(r.get(key)) in known]


def _boxed(rows: list[Row], path: Path, findings: list[Finding]) -> list[Row]:
    """Rows with a box of four finite numbers and sides that are not negative."""
    wrong = {"boxes-not-numbers": [r for r in rows if not _is_box(r.get("bbox"))]}
    sound = [r for r in rows if _is_box(r.get("bbox"))]
    wrong["boxes-negative"] = [r for r in sound if min(r["bbox"][2:]) < 0]
    said = {
        "boxes-not-numbers": ("are no four finite numbers of pixels", "damaged numbers: write these boxes again"),
        "boxes-negative": ("have a negative width or height", NEGATIVE),
    }
    for code, found in wrong.items():
        if found:
            examples = tuple(f"annotation {r.get('id')}: {r.get('bbox')}" for r in found[:EXAMPLES])
            findings.append(
                Finding(
                    code,
                    "error",
                    f"{path}: annotations",
                    f"{len(found)} of {len(rows)} boxes {said[code][0]}",
                    said[code][1],
                    examples,
                    {"boxes": len(found), "of": len(rows)},
                )
            )
    return [r for r in sound if min(r["bbox"][2:]) >= 0]


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
        and all(math.isfinite(x) and abs(x) <= LARGEST_PIXEL for x in value)
    )
