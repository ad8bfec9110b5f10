"""The steps as functions for a notebook or a script, with progress bars; ``calib.NAME`` is each of these.

Paths may be text; those that are read may be URLs. What comes back shows itself as a table.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.artifact import Artifact, load
from calib.cache import Cache
from calib.decide.assess import Assessment
from calib.decide.compare import Comparison
from calib.decide.compare import compare as _compare
from calib.decide.confidence import Before, Confidence, calibrate
from calib.decide.per_class import Selection, Thresholds, select, set_thresholds
from calib.errors import UnsupportedError
from calib.evaluate import Evaluation
from calib.parallel.devices import choose_device
from calib.progress import Bar
from calib.score.opened import open_heads
from calib.storage import local, parse
from calib.tables import Rows, Tables, percent
from calib.training import train
from calib.tune.outcome import Result
from calib.tune.search import Plan, budget_of, tune

Place = str | Path


@dataclass(frozen=True)
class Judgement(Tables):
    """What a head is worth on a labelled cache; metrics are fractions."""

    name: str
    evaluation: Evaluation
    max_detections: int  # per image

    @property
    def metrics(self) -> dict[str, float | int]:
        """As ``Evaluation.summary``."""
        return self.evaluation.summary()

    def tables(self) -> list[tuple[str, Rows]]:
        """One row, AP in percent."""
        metrics = self.metrics
        shown = {k: percent(v) for k, v in metrics.items() if k.startswith(("AP", "bAP")) and v >= 0}
        return [(f"AP %, at most {self.max_detections} detections per image", [{"head": self.name} | shown])]


class Changes(list[Before], Tables):
    """What confidence maps did, cache by cache."""

    def tables(self) -> list[tuple[str, Rows]]:
        """Those of each."""
        return [table for change in self for table in change.tables()]


class _Count:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def advance(self, n: int = 1, **metrics: float) -> None:
        if metrics:
            self._bar.set_postfix(metrics, refresh=False)
        self._bar.update(n)


@contextmanager
def bar(label: str, *, total: int, unit: str) -> Iterator[Bar]:
    """``calib.progress.Progress``: a bar in a notebook's output or on stderr."""
    from tqdm import tqdm

    with tqdm(total=total, desc=label, unit=f" {unit}") as opened:
        yield _Count(opened)


def open_cache(path: Place) -> Cache:
    """The feature cache at ``path``, which may be a URL; raises as ``Cache`` and ``calib.storage.local``."""
    return Cache(local(path))


def load_head(path: Place) -> Artifact:
    """The head at ``path``, which may be a URL; raises as ``calib.artifact.load`` and ``calib.storage.local``."""
    return load(local(path))


def fit_head(method: str, cache: Cache | Place, out: Place, *, base: Artifact | Place | None = None, seed: int = 0,
             device: str = "auto", overwrite: bool = False, **settings: Any) -> Artifact:  # fmt: skip
    """Train ``method`` and write the head to ``out``; ``settings`` as ``calib methods METHOD`` lists them, with a
    double underscore for a dot. ``base``: a fitted head to build on, its folder, or ``"METHOD:key=value"``, which is
    fitted first. Raises as ``calib.training.train``."""
    overrides = {k.replace("__", "."): v for k, v in settings.items()}
    return train(method, _cache(cache), _written(out), overrides, base=base, seed=seed, device=device,
                 overwrite=overwrite, progress=bar)  # fmt: skip


def judge_head(head: Artifact | Place, cache: Cache | Place, *, max_detections: int | None = None) -> Judgement:
    """Exact AP of ``head`` on a labelled cache; raises as ``Assessment`` and ``Scorer``."""
    path = head if isinstance(head, Artifact) else local(head)
    opened = open_heads([path], _cache(cache), max_detections=max_detections)
    (artifact,), nms, assessment = opened.artifacts, opened.nms, Assessment(opened.cache)
    name = artifact.info.method if isinstance(head, Artifact) else str(head)
    found = assessment.found(artifact.head, nms, progress=bar)
    return Judgement(name, assessment.evaluate(found, nms), nms.max_detections)


def tune_heads(cache: Place, tune_cache: Place, out: Place, budget: str = "20m", *, processes: int = 1,
               device: str = "auto", **plan: Any) -> Result:  # fmt: skip
    """``calib tune``: ``budget`` as there, ``plan`` as the fields of ``Plan``; several processes need a script's main
    to be guarded, as all of Python's worker processes do. Raises as ``calib.tune.search.tune``."""
    wanted = Plan(**(budget_of(budget) | plan))
    where = str(choose_device(device))
    return tune(local(cache), local(tune_cache), _written(out), wanted, processes=processes, device=where, progress=bar)


def compare_heads(heads: Sequence[Place], cache: Cache | Place, *, max_detections: int | None = None,
                  replicates: int = 1000) -> Comparison:  # fmt: skip
    """``calib compare``; raises as ``calib.compare.compare``."""
    paths = [local(h) for h in heads]
    return _compare(paths, _cache(cache), max_detections=max_detections, replicates=replicates, progress=bar)


def calibrate_head(head: Place, cache: Cache | Place, out: Place, *, judge: Cache | Place | None = None,
                   max_detections: int | None = None, overwrite: bool = False, **how: Any) -> Changes:  # fmt: skip
    """``calib calibrate``; ``how`` are fields of ``Confidence``. Raises as ``calib.confidence.calibrate``."""
    other = None if judge is None else _cache(judge)
    _, changes = calibrate(local(head), _cache(cache), _written(out), Confidence(**how), judge=other,
                           max_detections=max_detections, overwrite=overwrite)  # fmt: skip
    return Changes(changes)


def select_heads(heads: Sequence[Place], cache: Cache | Place, out: Place, **more: Any) -> Selection:
    """``calib select``; raises as ``calib.per_class.select``."""
    return select([local(h) for h in heads], _cache(cache), _written(out), **more)[1]


def threshold_head(head: Place, cache: Cache | Place, out: Place, **more: Any) -> Thresholds:
    """``calib threshold``; raises as ``calib.per_class.set_thresholds``."""
    return set_thresholds(local(head), _cache(cache), _written(out), **more)[1]


def _cache(cache: Cache | Place) -> Cache:
    return cache if isinstance(cache, Cache) else open_cache(cache)


def _written(out: Place) -> Path:
    """A path to write to.

    Raises:
        UnsupportedError: a URL.
    """
    place = parse(out)
    if isinstance(place, Path):
        return place
    raise UnsupportedError(
        f"{place}: functions write to local paths",
        hint="with calib.storage.writing(URL) as path: ... uploads at the end",
    )
