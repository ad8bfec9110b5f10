"""A table of heads x metrics at several caps on detections per image, as Markdown and on the screen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from calib.files import write_text
from calib.improve.jobs import Job, metrics
from calib.layout import RunFolder

COLUMNS = ("AP", "AP1", "AP2", "AP3", "AP4", "APr", "APc", "APf")
COUNTS = ("n", "n1", "n2", "n3", "n4", "nr", "nc", "nf")


@dataclass(frozen=True)
class Row:
    """Metrics of one head at one cap, in percent: mean over seeds, and their sample standard deviation (0 for one)."""

    head: str
    note: str
    cap: int
    seeds: int
    means: dict[str, float]
    deviations: dict[str, float]

    def cell(self, column: str) -> str:
        """The metric as text, with its spread where there are several seeds; ``-`` where no category exists."""
        if self.means[column] < 0:
            return "-"
        spread = f" ±{self.deviations[column]:.1f}" if self.seeds > 1 else ""
        return f"{self.means[column]:.1f}{spread}"


@dataclass(frozen=True)
class Table:
    """All rows, and the number of categories behind every column; ``baseline`` is the head that gains are over."""

    rows: tuple[Row, ...]
    counts: dict[str, int]
    baseline: str

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Table":
        """From ``plain()``."""
        return cls(tuple(Row(**row) for row in plain["rows"]), plain["categories"], plain["baseline"])

    @property
    def caps(self) -> list[int]:
        """Ascending."""
        return sorted({row.cap for row in self.rows})

    def of_cap(self, cap: int) -> list[Row]:
        """Rows of one cap."""
        return [r for r in self.rows if r.cap == cap]

    def gain(self, row: Row) -> str:
        """AP over the baseline at the same cap."""
        control = next(r for r in self.of_cap(row.cap) if r.head == self.baseline)
        difference = round(row.means["AP"] - control.means["AP"], 1)
        return "" if row.head == self.baseline else f"{difference + 0.0:+.1f}"  # + 0.0: no negative zero

    def header(self) -> list[str]:
        """Column titles: metric and number of categories."""
        return ["head", "gain", *(f"{c} ({self.counts[c]})" for c in COLUMNS)]

    def lines(self, cap: int) -> list[list[str]]:
        """Cells of one cap."""
        return [[r.head, self.gain(r), *(r.cell(c) for c in COLUMNS)] for r in self.of_cap(cap)]

    def markdown(self) -> str:
        """The table as Markdown, with what its rows are."""
        parts = [_TITLE.format(control=self.baseline)]
        for cap in self.caps:
            parts.append(f"\n## At most {cap} detections per image\n")
            parts.append(_markdown_row(self.header()))
            parts.append(_markdown_row(["---", *["---:"] * (len(self.header()) - 1)]))
            parts += [_markdown_row(line) for line in self.lines(cap)]
        parts.append("\n## The heads\n")
        parts += [f"- **{r.head}**: {r.note}" for r in self.of_cap(self.caps[0])]
        return "\n".join(parts) + "\n"

    def write(self, path: Path) -> None:
        """Write the Markdown."""
        write_text(path, self.markdown())

    def plain(self) -> dict[str, Any]:
        """JSON of all rows."""
        return {"categories": self.counts, "baseline": self.baseline, "rows": [asdict(r) for r in self.rows]}


_TITLE = """# Calibration heads on one frozen detector

Box AP in percent on the val split; numbers of categories in brackets. AP1..AP4: categories with fewer than 10, 10 to
99, 100 to 999, and 1,000 or more training instances. APr, APc, APf: rare, common, frequent by training images. The gain
is over the AP of `{control}`, the detector's own linear head trained to convergence."""


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def collect(run: RunFolder, jobs: Sequence[Job], own: dict[str, str], baseline: str) -> Table:
    """Read the results of ``jobs`` and of the run's own heads, ``own`` by name with a note.

    Raises:
        MissingFileError: a head has no result.
    """
    notes = {job.entry.name: job.entry.note for job in jobs} | own
    runs = {name: [job.run for job in jobs if job.entry.name == name] or [name] for name in notes}
    rows, counts = [], {}
    for cap in jobs[0].caps():
        for name, note in notes.items():
            found = [metrics(run, cap, one) for one in runs[name]]
            rows.append(_row(name, note, cap, found))
            counts = {c: int(found[0].get(n, 0)) for c, n in zip(COLUMNS, COUNTS, strict=True)}
    return Table(tuple(rows), counts, baseline)


def _row(name: str, note: str, cap: int, found: Sequence[dict[str, Any]]) -> Row:
    values = {c: [100 * r[c] if r.get(c, -1) >= 0 else -1.0 for r in found] for c in COLUMNS}
    deviations = {c: stdev(v) if len(v) > 1 else 0.0 for c, v in values.items()}
    return Row(name, note, cap, len(found), {c: mean(v) for c, v in values.items()}, deviations)
