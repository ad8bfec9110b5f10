"""The look at detector and data before anything is extracted: ``calib doctor``."""

from typing import Any

from calib.doctor import Case, Examination, Finding, examine
from calib.errors import InputError
from calib.extract.opener import Opener
from calib.improve.request import Request
from calib.progress import Progress

HOW = Examination(sample=50, seconds=15.0)


def examined(request: Request, progress: Progress) -> dict[str, Any]:
    """All findings, and the warnings among them as lines.

    Raises:
        InputError: there are errors among them: a cache, or metrics, would be wrong.
    """
    data, detector = request.data, request.detector
    adapter = Opener(detector.spec, request.device, detector.weights, detector.arguments)(0)
    found = examine(Case(data.train, data.val, data.tune, data.images, detector=adapter), HOW, progress=progress)
    if found.has_errors:
        lines = [_line(f) for f in found.of("error")]
        raise InputError("\n".join(lines), hint="calib doctor shows all findings; --no-doctor goes on all the same")
    return {"warnings": [f"{f.code}, {f.where}: {f.message}" for f in found.of("warning")], "report": found.record()}


def _line(finding: Finding) -> str:
    """One error with what it was seen on, and its remedy."""
    seen = [example for example in finding.examples if example not in finding.message]
    parts = (finding.message, f"as in {seen[0]}" if seen else "", finding.remedy)
    return f"{finding.code}, {finding.where}: {'; '.join(part for part in parts if part)}"
