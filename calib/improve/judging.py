"""Heads judged on the split that none was chosen on: metrics, and intervals of their differences to the control.

With one split alone each image is judged by the head that was chosen without its fold: these detections, of all folds,
make one set of detections of the whole split.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from calib.cache import Cache
from calib.evaluate.evaluate_files import Options, evaluate_files
from calib.files import replacing
from calib.improve.request import Request
from calib.layout import CATEGORIES, RunFolder
from calib.progress import Bar, Progress, silent
from calib.score import detector_nms
from calib.score.detections import Output, write_detections
from calib.score.opened import open_heads

METRICS = ("AP", "AP50", "AP75", "APr", "APc", "APf", "AP1", "AP2", "AP3", "AP4", "bAP")
NUMBERS = ("n", "nr", "nc", "nf", "n1", "n2", "n3", "n4")


@dataclass(frozen=True)
class Judge:
    """Of one split: its cache, its annotation file, and how many bootstrap replicates there are. Detections are written
    for every one of ``caps`` per image, and judged at the first; None is the detector's own."""

    cache: Path
    annotations: Path
    replicates: int
    caps: tuple[int | None, ...] = (None,)

    @classmethod
    def of(cls, request: Request, cache: Path) -> "Judge":
        """As ``request`` has it."""
        more = () if request.table is None else request.table.caps
        return cls(cache, request.data.val, request.replicates, (request.search.max_detections, *more))

    def cap(self, asked: int | None) -> int:
        """Detections per image."""
        return detector_nms(Cache(self.cache)).max_detections if asked is None else asked

    def table_caps(self) -> list[int]:
        """Those of a table, ascending; the one that heads are judged at where it names none, or in COCO's style."""
        if self.is_coco:
            return [self.options(None).limit]
        return sorted({self.cap(cap) for cap in self.caps[1:] or self.caps})

    @property
    def is_coco(self) -> bool:
        """Whether the split is annotated in COCO's style."""
        return Cache(self.cache).manifest.style == "coco"

    def detect(self, head: Path, out: Path, progress: Progress = silent) -> None:
        """Write the detections of ``head`` on the whole split."""
        # The best 45 of an image are the first of its best 300: suppression looks at better ones only.
        opened = open_heads([head], self.cache, max_detections=max(map(self.cap, self.caps)))
        write_detections(opened.cache, [Output(opened.artifacts[0], opened.nms, out)], progress=progress)

    def options(self, cap: int | None, **more: Any) -> Options:
        """How detections are evaluated at most ``cap`` per image."""
        if self.is_coco:
            return Options("coco", **more)
        return Options("lvis", max_detections=self.cap(cap), **more)

    def judge(self, run: RunFolder, names: Sequence[str], progress: Progress) -> dict[str, Any]:
        """Evaluate the detections of ``run`` and write its results; the others are compared with the first."""
        options = self.options(self.caps[0], calibration=True, matches=True, bootstrap=self.replicates)
        with progress("judge", total=(len(names) - 1) * self.replicates, unit="replicates") as bar:

            @contextmanager
            def shared(label: str, *, total: int, unit: str) -> Iterator[Bar]:
                yield bar

            found = self.evaluate([run.detections(name) for name in names], run.results, options, shared)
        return {name: _metrics(summary) for name, summary in zip(names, found, strict=True)} | {
            "style": options.style, "cap": options.limit,
        }  # fmt: skip

    def evaluate(
        self, detections: Sequence[Path], results: Path, options: Options, progress: Progress = silent
    ) -> list[Mapping[str, Any]]:
        """A result folder ``results/NAME`` for each file of detections; the summaries."""
        counts, outs = self.cache / CATEGORIES, [results / path.stem for path in detections]
        found = evaluate_files(self.annotations, detections, outs, options, counts=counts, progress=progress)
        return [outcome.summary for outcome in found]


def pool(parts: Mapping[Path, NDArray[np.int64]], out: Path) -> None:
    """Write to ``out`` of each file of detections those of its images."""
    kept = []
    for path, image_ids in parts.items():
        table = pq.read_table(path)
        kept.append(table.filter(pc.is_in(table["image_id"], pa.array(image_ids))).replace_schema_metadata(None))
    with replacing(out) as temporary:
        pq.write_table(pa.concat_tables(kept), temporary, compression="zstd")


def _metrics(summary: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {k: summary[k] for k in (*METRICS, *NUMBERS) if k in summary}
    metrics = {k: None if v == -1 else v for k, v in metrics.items()}  # -1: no category of that kind has an object
    more = {k: v for k, v in summary.get("difference", {}).items() if k != "to"}
    return metrics | {"D-ECE": summary["calibration"]["D-ECE"], "difference_to_control": more}
