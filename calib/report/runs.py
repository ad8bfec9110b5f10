"""Result folders of one split, read for the report: metrics of every head and AP of every category.

Metrics are fractions as in the folders, None where no category exists; the page shows percent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from calib.analysis import open_views
from calib.errors import InputError, UnknownNameError
from calib.evaluate.bins import bin_index
from calib.files import read_json
from calib.layout import MATCHES, PER_CATEGORY, SUMMARY

DETECTOR = "softmax"  # the method that is the detector as it is
FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
_SAME = ("style", "iou_type", "max_detections", "bins")


@dataclass(frozen=True)
class Runs:
    """H heads over C categories."""

    folders: dict[str, Path]  # by name, in the order given
    summaries: tuple[dict[str, Any], ...]  # [H]
    categories: pa.Table  # columns category_id, name, frequency, instance_count, n_gt of C rows
    ap: NDArray[np.float64]  # [H, C], -1 where the category has no object

    @classmethod
    def read(cls, paths: Sequence[Path]) -> "Runs":
        """Read result folders.

        Raises:
            InputError: none is given, a path is no result folder, or they are not of one split evaluated in one way.
        """
        if not paths:
            raise InputError("no result folder is given", hint="name the folders that calib evaluate wrote")
        twice = [str(p) for k, p in enumerate(paths) if p.resolve() in {q.resolve() for q in paths[:k]}]
        if twice:
            raise InputError(f"the same results are given twice: {', '.join(twice)}")
        with open_views(paths) as views:  # says what is wrong with a path
            names = list(views.runs)
        if len(names) < len(paths):
            raise InputError(
                "a report is made of result folders, and a cache or a detections file is given",
                hint="give folders of calib evaluate; heads go into --models, pictures into --images",
            )
        summaries = tuple(read_json(path / SUMMARY, "summary of results") for path in paths)
        tables = [pq.read_table(path / PER_CATEGORY) for path in paths]
        for name, summary, table in zip(names, summaries, tables, strict=True):
            _check_alike(names[0], summaries[0], tables[0], name, summary, table)
        ap = np.stack([t["AP"].to_numpy() for t in tables])
        return cls(dict(zip(names, paths, strict=True)), summaries, tables[0], ap)

    @property
    def names(self) -> list[str]:
        """Of the heads."""
        return list(self.folders)

    @property
    def edges(self) -> list[int]:
        """Of the bins of training instances."""
        edges: list[int] = self.summaries[0]["bins"]
        return edges

    @property
    def cap(self) -> int:
        """Detections kept per image, -1 for all."""
        return int(self.summaries[0]["max_detections"])

    @property
    def cap_per_image(self) -> int:
        """The cap if it is one of images, else -1: COCO's is one of an image's category, which ranks do not tell."""
        return self.cap if self.summaries[0]["style"] == "lvis" else -1

    @cached_property
    def bin_of(self) -> NDArray[np.int64] | None:
        """Bin of each category from 0, None without training counts. [C]"""
        counts = self.categories["instance_count"]
        return None if counts.null_count else bin_index(counts.to_numpy(), self.edges)

    @property
    def matches(self) -> dict[str, Path]:
        """Files of matches of the heads that have one."""
        return {n: p / MATCHES for n, p in self.folders.items() if (p / MATCHES).is_file()}

    def baseline(self, wanted: str | None) -> int:
        """Index of the head that others are compared with: the one ``wanted``; else what the intervals refer to, else
        the detector as it is, else the first.

        Raises:
            UnknownNameError: no such run.
        """
        referred = [s["difference"]["to"] for s in self.summaries if "difference" in s]
        if wanted:
            return self.place(wanted)
        return next((self.place(name) for name in [*referred, DETECTOR] if name in self.folders), 0)

    def place(self, name: str) -> int:
        """Index of a head.

        Raises:
            UnknownNameError: no such run.
        """
        if name not in self.folders:
            raise UnknownNameError("run", name, self.folders)
        return self.names.index(name)

    def best(self, baseline: int) -> int:
        """Index of the head with the highest AP, the baseline only if it stands alone."""
        others = [i for i in range(len(self.names)) if i != baseline] or [baseline]
        return max(others, key=lambda i: self.summaries[i]["AP"])

    def groups(self) -> list[dict[str, Any]]:
        """Bins, then frequencies, that have a category: key of the metric (``AP1``, ``APr``), label, categories."""
        first = self.summaries[0]
        lows = [0, *self.edges]
        labels = [f"{a:,} to {b - 1:,}" if a else f"below {b:,}" for a, b in zip(lows, self.edges, strict=False)]
        labels.append(f"{self.edges[-1]:,} or more")
        bins = [{"key": f"AP{i + 1}", "label": t, "n": first[f"n{i + 1}"], "bin": i} for i, t in enumerate(labels)]
        rcf = [{"key": f"AP{k}", "label": t, "n": first[f"n{k}"], "bin": None} for k, t in FREQUENCIES.items()]
        return [group for group in bins + rcf if group["n"]]

    def heads(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Per head its name, metrics, and what else its summary holds."""
        keys = ("AP", "AP50", "AR", *(group["key"] for group in groups))
        return [
            {
                "name": name,
                "metrics": {key: _known(summary[key]) for key in keys},
                **{key: summary.get(key) for key in ("difference", "calibration", "reliability")},
                "neverDetected": len(summary["never_detected"]),
            }
            for name, summary in zip(self.names, self.summaries, strict=True)
        ]

    def plain_categories(self) -> dict[str, list[Any]]:
        """Columns: id, name, frequency, count, bin, objects, and AP as one list per head."""
        table = self.categories
        columns = {"id": "category_id", "name": "name", "frequency": "frequency", "count": "instance_count"}
        plain = {key: table[column].to_pylist() for key, column in columns.items()}
        plain["bin"] = [None] * len(table) if self.bin_of is None else self.bin_of.tolist()
        ap = [[_known(v) for v in row] for row in self.ap.round(4).tolist()]
        return plain | {"objects": table["n_gt"].to_pylist(), "ap": ap}


def _known(value: float) -> float | None:
    return None if value < 0 else round(value, 6)


def _check_alike(
    first: str, its: dict[str, Any], categories: pa.Table, name: str, summary: dict[str, Any], table: pa.Table
) -> None:
    for key in _SAME:
        if summary[key] != its[key]:
            raise InputError(
                f"results '{first}' and '{name}' were evaluated differently: {key} {its[key]} and {summary[key]}",
                hint="evaluate them with the same options; one report shows one way",
            )
    for key in ("category_id", "n_gt"):
        if table[key] != categories[key]:
            raise InputError(
                f"results '{first}' and '{name}' are of different splits: their categories or objects differ",
                hint="evaluate all heads on one annotation file",
            )
