"""The heads of a table: each trained, scored and evaluated, several at a time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.artifact import load
from calib.cache import Cache
from calib.files import read_json
from calib.improve.entries import Entry, is_random
from calib.improve.judging import Judge
from calib.improve.request import HeadTable
from calib.improve.steps import remove
from calib.layout import SUMMARY, RunFolder
from calib.parallel.pool import run_all, worker_progress
from calib.progress import Progress
from calib.training import train
from calib.training.plan import HeadPlan, settings_of


@dataclass(frozen=True)
class Job:
    """One head of one seed, with everything that follows from it; ``base`` is the head that it is built on."""

    out: Path
    judge: Judge
    entry: Entry
    seed: int
    base: "Job | None" = None

    @property
    def folder(self) -> RunFolder:
        """The run that it belongs to."""
        return RunFolder(self.out)

    @property
    def run(self) -> str:
        """The name of its results: the head's, and the seed's where it is not the first."""
        return self.entry.name if self.seed == 0 else f"{self.entry.name}-seed{self.seed}"

    @property
    def head(self) -> Path:
        """Its folder; seeds are versions."""
        return self.folder.head(self.entry.name, str(self.seed + 1))

    @property
    def detections(self) -> Path:
        """The file of its detections."""
        return self.folder.detections(self.run)

    def results(self, cap: int) -> Path:
        """Its result folder at a cap of detections per image."""
        return self.folder.results_at(cap) / self.run

    def caps(self) -> list[int]:
        """The caps that it is evaluated at."""
        return self.judge.table_caps()

    def is_trained(self) -> bool:
        """Whether the head is there as it would be trained, and its base."""
        if self.base is not None and not self.base.is_trained():
            return False
        base = None if self.base is None else load(self.base.head)
        cache, settings = Cache(self.folder.cache("train")), self.entry.settings
        plan = HeadPlan(self.entry.method, settings_of(self.entry.method, settings, self.seed), self.seed, cache,
                        self.head, base)  # fmt: skip
        return plan.is_done()

    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        written = [self.detections, *(self.results(cap) / SUMMARY for cap in self.caps())]
        return self.is_trained() and all(path.exists() for path in written)


def jobs_of(out: Path, judge: Judge, table: HeadTable) -> list[Job]:
    """All seeds of every head in which something is drawn at random: in its own training, or in that of its base."""
    jobs: dict[tuple[str, int], Job] = {}
    for entry in table.entries:
        for seed in range(table.seeds if is_random(entry, table.entries) else 1):
            base = jobs.get((entry.base, seed), jobs.get((entry.base, 0)))
            jobs[entry.name, seed] = Job(out, judge, entry, seed, base)
    return list(jobs.values())


def run_jobs(jobs: Sequence[Job], processes: int, progress: Progress) -> None:
    """Do what is left: long trainings first; heads that are built on others when those are there."""
    left = [job for job in jobs if not job.is_done()]
    while left:
        ready = [job for job in left if job.base is None or job.base not in left]
        ready.sort(key=lambda job: -job.entry.steps)
        steps, label = sum(job.entry.steps for job in ready), f"train {len(ready)} heads"
        run_all(do, ready, processes=min(processes, len(ready)), steps=max(steps, 1), label=label, progress=progress)
        left = [job for job in left if job not in ready]


def do(job: Job) -> None:
    """Train, score and evaluate one head."""
    if not job.is_trained():
        remove((job.head, job.detections, *(job.results(cap) for cap in job.caps())))
        base = None if job.base is None else job.base.head
        train(job.entry.method, job.folder.cache("train"), job.head, job.entry.settings, base=base, seed=job.seed,
              progress=worker_progress)  # fmt: skip
    if not job.detections.exists():
        job.judge.detect(job.head, job.detections)
    evaluate_at(job.judge, job.folder, [job.detections], job.caps())


def evaluate_at(judge: Judge, run: RunFolder, detections: Iterable[Path], caps: Iterable[int]) -> None:
    """Evaluate files of detections at each of the caps of a table."""
    found = list(detections)
    for cap in caps:
        judge.evaluate(found, run.results_at(cap), judge.options(cap))


def metrics(run: RunFolder, cap: int, name: str) -> dict[str, Any]:
    """The summary of one head at one cap."""
    summary: dict[str, Any] = read_json(run.results_at(cap) / name / SUMMARY, "summary of results")
    return summary
