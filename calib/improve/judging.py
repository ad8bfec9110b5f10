"""Heads judged on the split that none was chosen on: figures, and intervals of their differences to the control.

With one split alone each image is judged by the head that was chosen without its fold: these detections, of all folds,
make one set of detections of the whole split.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from calib.artifact import load
from calib.cache import Cache
from calib.evaluate.evaluate_files import Options, evaluate_files
from calib.files import replacing
from calib.improve.heads import CONTROL, NAMES
from calib.progress import Progress
from calib.score import detector_nms
from calib.score.detections import Output, write_detections

FIGURES = ("AP", "AP50", "AP75", "APr", "APc", "APf", "AP1", "AP2", "AP3", "AP4", "bAP")
NUMBERS = ("n", "nr", "nc", "nf", "n1", "n2", "n3", "n4")


@dataclass(frozen=True)
class Judge:
    """Of one split: its cache, its annotation file, and how many bootstrap replicates there are."""

    cache: Path
    annotations: Path
    replicates: int

    def detect(self, head: Path, out: Path, progress: Progress) -> None:
        """Write the detections of ``head`` on the whole split."""
        cache = Cache(self.cache)
        write_detections(cache, [Output(load(head), detector_nms(cache), out)], progress=progress)

    def judge(self, detections: Path, results: Path, progress: Progress) -> dict[str, Any]:
        """Evaluate ``detections/NAME.parquet`` of all heads, the control first; a result folder for each."""
        cache = Cache(self.cache)
        is_coco = cache.manifest.style == "coco"
        cap = None if is_coco else detector_nms(cache).max_detections
        names = [CONTROL, *(name for name in NAMES if name != CONTROL)]
        options = Options(
            "coco" if is_coco else "lvis", max_detections=cap, calibration=True, matches=True,
            bootstrap=self.replicates,
        )  # fmt: skip
        outcomes = evaluate_files(
            self.annotations,
            [detections / f"{name}.parquet" for name in names],
            [results / name for name in names],
            options,
            counts=self.cache / "categories.parquet",
            progress=progress,
        )
        told = {name: _told(outcome.summary) for name, outcome in zip(names, outcomes, strict=True)}
        return told | {"style": options.style, "cap": options.limit}


def pool(parts: Mapping[Path, NDArray[np.int64]], out: Path) -> None:
    """Write to ``out`` of each file of detections those of its images."""
    kept = []
    for path, image_ids in parts.items():
        table = pq.read_table(path)
        kept.append(table.filter(pc.is_in(table["image_id"], pa.array(image_ids))).replace_schema_metadata(None))
    with replacing(out) as temporary:
        pq.write_table(pa.concat_tables(kept), temporary, compression="zstd")


def _told(summary: Mapping[str, Any]) -> dict[str, Any]:
    figures = {k: summary[k] for k in (*FIGURES, *NUMBERS) if k in summary}
    more = {k: v for k, v in summary.get("difference", {}).items() if k != "to"}
    return figures | {"D-ECE": summary["calibration"]["D-ECE"], "difference_to_control": more}
