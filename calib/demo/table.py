"""The demo's table: heads x figures at two caps on detections per image, as Markdown and on the screen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from calib.demo.entries import CONTROL, Entry, is_random
from calib.errors import MissingFileError
from calib.evaluate.folder import SUMMARY
from calib.files import read_json, write_text

# 0.3 detections per proposal is LVIS's own ratio (300 to 1,000); 300 is LVIS's cap, twice our 150 proposals.
CAPS = (45, 300)
COLUMNS = ("AP", "AP1", "AP2", "AP3", "AP4", "APr", "APc", "APf")
COUNTS = ("n", "n1", "n2", "n3", "n4", "nr", "nc", "nf")


@dataclass(frozen=True)
class Row:
    """Figures of one head at one cap, in percent: mean over seeds, and their sample standard deviation (0 for one)."""

    head: str
    note: str
    cap: int
    seeds: int
    means: dict[str, float]
    deviations: dict[str, float]

    def cell(self, column: str) -> str:
        """The figure as text, with its spread where there are several seeds; ``-`` where no category exists."""
        if self.means[column] < 0:
            return "-"
        spread = f" ±{self.deviations[column]:.1f}" if self.seeds > 1 else ""
        return f"{self.means[column]:.1f}{spread}"


@dataclass(frozen=True)
class Table:
    """All rows, and the number of categories behind every column."""

    rows: tuple[Row, ...]
    counts: dict[str, int]

    def of_cap(self, cap: int) -> list[Row]:
        """Rows of one cap."""
        return [r for r in self.rows if r.cap == cap]

    def gain(self, row: Row) -> str:
        """AP over the converged control at the same cap."""
        control = next(r for r in self.of_cap(row.cap) if r.head == CONTROL)
        difference = round(row.means["AP"] - control.means["AP"], 1)
        return "" if row.head == CONTROL else f"{difference + 0.0:+.1f}"  # + 0.0: no negative zero

    def header(self) -> list[str]:
        """Column titles: figure and number of categories."""
        return ["head", "gain", *(f"{c} ({self.counts[c]})" for c in COLUMNS)]

    def lines(self, cap: int) -> list[list[str]]:
        """Cells of one cap."""
        return [[r.head, self.gain(r), *(r.cell(c) for c in COLUMNS)] for r in self.of_cap(cap)]

    def markdown(self) -> str:
        """The table as Markdown, with what its rows are."""
        parts = [_TITLE.format(control=CONTROL)]
        for cap in CAPS:
            parts.append(f"\n## At most {cap} detections per image\n")
            parts.append(_markdown_row(self.header()))
            parts.append(_markdown_row(["---", *["---:"] * (len(self.header()) - 1)]))
            parts += [_markdown_row(line) for line in self.lines(cap)]
        parts.append("\n## The heads\n")
        parts += [f"- **{r.head}**: {r.note}" for r in self.of_cap(CAPS[0])]
        return "\n".join(parts) + "\n"

    def write(self, path: Path) -> None:
        """Write the Markdown."""
        write_text(path, self.markdown())

    def plain(self) -> dict[str, Any]:
        """JSON of all rows."""
        return {"categories": self.counts, "rows": [asdict(r) for r in self.rows]}


_TITLE = """# Calibration heads on one frozen detector

Box AP in percent on the val split, LVIS definition; numbers of categories in brackets. AP1..AP4: categories with fewer
than 10, 10 to 99, 100 to 999, and 1,000 or more training instances. APr, APc, APf: rare, common, frequent by training
images. The gain is over the AP of `{control}`, the detector's own linear head trained to convergence."""


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def collect(results: Path, heads: Sequence[Entry], seeds: int) -> Table:
    """Read the summaries under ``results`` and its neighbours for the other caps.

    Raises:
        MissingFileError: a head has no result.
    """
    rows = []
    counts: dict[str, int] = {}
    for cap in CAPS:
        folder = results if cap == max(CAPS) else results.with_name(f"{results.name}-{cap}")
        for entry in heads:
            runs = [_summary(folder, entry.name, k) for k in range(seeds if is_random(entry, heads) else 1)]
            figures = {c: [100 * r[c] if r[c] >= 0 else -1.0 for r in runs] for c in COLUMNS}
            deviations = {c: stdev(v) if len(v) > 1 else 0.0 for c, v in figures.items()}
            means = {c: mean(v) for c, v in figures.items()}
            rows.append(Row(entry.name, entry.note, cap, len(runs), means, deviations))
            counts = {c: int(runs[0][n]) for c, n in zip(COLUMNS, COUNTS, strict=True)}
    return Table(tuple(rows), counts)


def _summary(folder: Path, head: str, seed: int) -> dict[str, Any]:
    path = folder / (head if seed == 0 else f"{head}-seed{seed}") / SUMMARY
    if not path.exists():
        raise MissingFileError(f"no result at {path}", hint="run calib demo again")
    found: dict[str, Any] = read_json(path, "result summary")
    return found
