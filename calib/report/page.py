"""The page: data collected from files, put with styles and scripts into one HTML file that needs nothing else.

The page forbids itself everything but its own scripts, by their hashes: it loads nothing and sends nothing.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from calib import __version__
from calib.errors import ExistsError, MissingExtraError, SettingError
from calib.files import write_text
from calib.progress import Progress, silent
from calib.tables import as_html, percent

from .examples import examples
from .fitted import Models, fitted
from .matched import confusion, cut, false_kinds, is_anything_beyond
from .runs import Runs

SCRIPTS = ("core.js", "controls.js", "tables.js", "ap.js", "errors.js", "examples.js")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Report:
    """What a report is made of: result folders of one split, and what else there is.

    ``baseline`` is the name of the run that others are compared with at first; ``models`` a folder of NAME/VERSION
    heads, or the heads themselves by name;
    ``images`` and ``annotations`` are for ``n_examples`` pictures. ``focus`` names the run that is looked at first,
    that with the highest AP if None; ``notes`` are lines that stand at the beginning.
    """

    results: Sequence[Path]
    baseline: str | None = None
    models: Models = None
    images: Path | None = None
    annotations: Path | None = None
    n_examples: int = 6
    title: str | None = None
    focus: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.images is None) != (self.annotations is None):
            raise SettingError("pictures need both --images and --annotations")
        if self.n_examples < 0:
            raise SettingError(f"the number of examples is {self.n_examples}: expected at least 0")


def write_report(out: Path, report: Report, *, progress: Progress = silent) -> dict[str, Any]:
    """Write the page to ``out`` in one step; what it holds: path, bytes, heads, baseline, best, sections, missing.

    Raises:
        InputError: results that cannot be read or do not belong together, a damaged head or picture.
        UnknownNameError: no run of the baseline's name. SettingError: pictures without annotations.
        ExistsError: ``out`` is a folder. MissingExtraError: pyobsplot, which brings the plots, is not installed.
    """
    check_plotting()  # before anything takes time
    if out.is_dir():
        raise ExistsError(f"{out} is a folder, expected the name of a file to write", hint="name a file inside it")
    data = collect(report, progress=progress)
    text = html(data)
    write_text(out, text)
    names = [head["name"] for head in data["heads"]]
    return {
        "path": str(out),
        "bytes": len(text.encode()),
        "heads": names,
        "baseline": names[data["baseline"]],
        "best": names[data["best"]],
        "missing": data["missing"],
    }


def collect(report: Report, *, progress: Progress = silent) -> dict[str, Any]:
    """Everything that the page shows, as plain values; raises as ``write_report``."""
    runs = Runs.read(report.results)
    baseline = runs.baseline(report.baseline)
    best = runs.best(baseline) if report.focus is None else runs.place(report.focus)
    groups = runs.groups()
    data: dict[str, Any] = {
        "title": report.title or f"Heads on {_split(runs)}",
        "notes": list(report.notes),
        "version": __version__,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cap": runs.cap,
        "style": runs.summaries[0]["style"],
        "iouType": runs.summaries[0]["iou_type"],
        "nCategories": runs.summaries[0]["n"],
        "baseline": baseline,
        "best": best,
        "groups": groups,
        "heads": runs.heads(groups),
        "categories": runs.plain_categories(),
    }
    with progress("report", total=4, unit="parts") as bar:
        for head, described in zip(data["heads"], fitted(runs, report.models), strict=True):
            head["fitted"] = described
        bar.advance()
        has_matches = bool(runs.matches) and runs.bin_of is not None
        data["falseKinds"] = false_kinds(runs) if has_matches else []
        data["cut"] = cut(runs) if has_matches and is_anything_beyond(runs) else []
        bar.advance()
        data["confusion"] = confusion(runs) if has_matches else {"outcomes": [], "pairs": []}
        bar.advance()
        data["examples"] = []
        if report.images is not None and report.annotations is not None and report.n_examples:
            data["examples"] = examples(runs, report.annotations, report.images, report.n_examples, baseline, best)
        bar.advance()
    data["missing"] = _missing(runs, data, report)
    return data


def _split(runs: Runs) -> str:
    source = runs.summaries[0].get("annotations") or runs.summaries[0].get("cache")
    return Path(str(source)).name if source else "one split"


def _missing(runs: Runs, data: dict[str, Any], report: Report) -> dict[str, str]:
    """A line for every section that lacks something: what, and how to get it."""
    lines = {}
    matches = "calib evaluate --matches writes them."
    if runs.bin_of is None:
        lines["bins"] = "The results hold no training counts, so there are no bins: calib evaluate --counts FILE."
    if len(runs.names) > 1 and not any(head["difference"] for head in data["heads"]):
        lines["intervals"] = (
            "No intervals: the results were evaluated without a bootstrap. calib evaluate --bootstrap, with all "
            "results in one command and the baseline first, finds them."
        )
    if not any(head["reliability"] for head in data["heads"]):
        lines["reliability"] = "The results hold no calibration metrics: calib evaluate --calibration finds them."
    if not any(head["fitted"] and head["fitted"]["norms"] for head in data["heads"]):
        lines["norms"] = "No linear heads were found: calib report --models FOLDER names where they lie."
    if not any(head["fitted"] and head["fitted"]["stages"] for head in data["heads"]):
        lines["training"] = "No trained heads were found: calib report --models FOLDER names where they lie."
    if not runs.matches:
        lines |= dict.fromkeys(("confusion", "kinds", "cut"), f"The results hold no matches: {matches}")
    elif runs.bin_of is not None and not data["cut"]:
        lines["cut"] = (
            "There is no cap on the detections of an image."
            if runs.cap_per_image < 0
            else f"No image of the detections files has more than {runs.cap} detections, so what this cap cuts cannot "
            "be seen: calib score with a higher --max-detections, then calib evaluate --max-detections "
            f"{runs.cap} --matches."
        )
    if not data["examples"]:
        lines["examples"] = (
            "No pictures: calib report --images FOLDER --annotations FILE shows some"
            + ("." if runs.matches else f", of results with matches. {matches}")
            if report.images is None or not runs.matches
            else "No picture differs between the baseline and the best head."
        )
    return lines


def check_plotting() -> Path:
    """Where the pyobsplot package keeps d3 and Observable Plot; it is not imported, which takes a second.

    Raises:
        MissingExtraError: it is not installed, or has another form.
    """
    spec = find_spec("pyobsplot")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (script := Path(place) / "static" / "static-widget.js").is_file():
            return script
    raise MissingExtraError("pyobsplot", "report")


def plotting() -> str:
    """d3 and Plot as a script that leaves them in ``window``, as the package's module does when it is loaded.

    Raises:
        MissingExtraError: as ``check_plotting``.
    """
    module, export, _ = check_plotting().read_text().rpartition("\nexport {")
    if not export or "window.Plot" not in module or "</script" in module or "<!--" in module:
        raise MissingExtraError("a pyobsplot whose module leaves d3 and Plot in the page", "report")
    return f"/* d3: Mike Bostock, Observable Plot: Observable, Inc.; both ISC licence */\n(() => {{{module}}})();"


def _percent(metric: float | None) -> str:
    return "-" if metric is None else percent(metric)


def html(data: dict[str, Any]) -> str:
    """The page of ``data``."""
    folder = files("calib.report").joinpath("assets")
    scripts = [plotting(), *(folder.joinpath(name).read_text() for name in SCRIPTS)]
    # In a script element only "<" could end it early; JSON may write it as an escape.
    plain = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    policy = "; ".join([_POLICY, "script-src " + " ".join(f"'sha256-{h}'" for h in hashes)])
    metrics = [
        {"head": head["name"]} | {key: _percent(v) for key, v in head["metrics"].items()} for head in data["heads"]
    ]
    page = folder.joinpath("page.html").read_text()
    for name, value in {
        "POLICY": policy,
        "TITLE": escape(data["title"]),
        "STYLE": folder.joinpath("page.css").read_text(),
        "TABLE": "".join(f"<p>{escape(note)}</p>" for note in data["notes"]) + as_html(metrics, "AP in percent"),
        "SCRIPTS": "\n".join(f"<script>{s}</script>" for s in scripts),
        "DATA": plain,  # last: nothing in it is looked at again
    }.items():
        page = page.replace(f"<!--{name}-->", value)
    return page
