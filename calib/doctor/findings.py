"""What an examination says: findings with stable codes, and what was counted."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from calib.doctor.codes import CODES
from calib.tables import Rows, Tables

SEVERITIES = ("error", "warning", "note")
EXAMPLES = 3  # of a finding


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    ``error``: later commands refuse the input, or their metrics would be wrong. ``warning``: metrics may be wrong or
    say little. ``note``: worth to know. ``code``: one of ``CODES``; programs go by it. ``where``: the file, or
    the detector. ``remedy``: a command or an edit. ``details``: the numbers in ``message``, and more, for programs.
    """

    code: str
    severity: str
    where: str
    message: str
    remedy: str = ""
    examples: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.code in CODES, self.code


@dataclass(frozen=True)
class Report(Tables):
    """All findings, the gravest first, and what was counted: of each split, of proposals, of the classifier."""

    findings: tuple[Finding, ...]
    data: dict[str, dict[str, Any]]  # by split: train, tune, val
    detector: dict[str, Any]

    def of(self, severity: str) -> tuple[Finding, ...]:
        """Those of one severity."""
        return tuple(f for f in self.findings if f.severity == severity)

    @property
    def codes(self) -> tuple[str, ...]:
        """Of all findings."""
        return tuple(f.code for f in self.findings)

    @property
    def has_errors(self) -> bool:
        """Whether long work had better wait."""
        return bool(self.of("error"))

    def record(self) -> dict[str, Any]:
        """Everything as plain data."""
        counts = {f"{s}s": len(self.of(s)) for s in SEVERITIES}
        found = [asdict(f) | {"examples": list(f.examples)} for f in self.findings]
        return {**counts, "findings": found, "data": self.data, "detector": self.detector}

    def tables(self) -> list[tuple[str, Rows]]:
        """The findings, and the details of the splits."""
        keys = ("severity", "code", "where", "message", "remedy")
        rows: Rows = [{k: getattr(f, k) for k in keys} for f in self.findings]
        splits: Rows = [{"split": name, **_flat(details)} for name, details in self.data.items()]
        return [("findings", rows), ("data", splits)]


def _flat(details: dict[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in details.items() if not isinstance(v, dict)}
    return {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in plain.items()}


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The gravest first, otherwise as they came."""
    return tuple(sorted(findings, key=lambda f: SEVERITIES.index(f.severity)))


def first(things: Sequence[Any], most: int = EXAMPLES) -> str:
    """The first few of ``things`` in words."""
    text = ", ".join(str(x) for x in things[:most])
    return f"{text}, ..." if len(things) > most else text


def share(part: int, whole: int) -> str:
    """``7 of 20 (35.0 %)``."""
    return f"{part:,} of {whole:,} ({100 * part / whole:.1f} %)" if whole else f"{part:,} of {whole:,}"
