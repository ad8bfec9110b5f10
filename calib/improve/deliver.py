"""What a run leaves besides heads: the chosen one for use without calib, and the page of results."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calib.errors import CalibError, MissingExtraError
from calib.export.export import Export, export
from calib.export.fold import LAYERS
from calib.extract.frameworks import checkpoint_reader
from calib.improve.request import Frozen
from calib.improve.steps import remove
from calib.progress import Progress
from calib.report import Report, write_report


def exported(detector: Frozen, head: Path, cache: Path, out: Path) -> dict[str, Any]:
    """Write the head folded into the detector's checkpoint; where it does not fold, as ONNX, or as a module.

    Returns ``to`` and ``export``, both None where nothing goes, and ``refused``: why not, by form.
    """
    remove((out,))
    out.mkdir(parents=True)
    refused: dict[str, str] = {}
    for wanted, name in _forms(detector):
        try:
            record = export(head, cache, out / name, wanted)
        except CalibError as e:  # what one form refuses another may take; all reasons are kept
            refused[wanted.to] = str(e)
            continue
        kept = {k: record[k] for k in ("to", "largest_difference")}
        return kept | {"export": str(Path(out.name) / name), "refused": refused}
    return {"to": None, "export": None, "refused": refused}


def _forms(detector: Frozen) -> Iterator[tuple[Export, str]]:
    checkpoint = detector.checkpoint
    if checkpoint is not None and detector.framework in LAYERS:
        reader = checkpoint_reader(detector.framework)
        name = f"detector{checkpoint.suffix if checkpoint.is_file() else ''}"
        yield Export(detector.framework, checkpoint, reader=reader), name
    yield Export("onnx"), "head.onnx"
    yield Export("module"), "head.pt2"


def reported(page: Report, out: Path, progress: Progress) -> dict[str, Any]:
    """Write the page; ``report`` is None where what draws its charts is not installed."""
    try:
        write_report(out, page, progress=progress)
    except MissingExtraError as e:
        return {"report": None, "why": str(e)}
    return {"report": out.name}
