"""From a trained detector to a better head: the steps of ``calib improve``, each done once."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from calib.artifact import load
from calib.files import hash_file, lock
from calib.improve import caches, ceiling, deliver, heads, judging
from calib.improve.caches import Split
from calib.improve.commands import write_commands
from calib.improve.examined import examined
from calib.improve.jobs import Job, evaluate_at, jobs_of, run_jobs
from calib.improve.request import CALIBRATED, CHOSEN, CONTROL, DETECTOR, NAMES, HeadTable, Request
from calib.improve.steps import Note, Record, Step, Steps, check_place
from calib.improve.summary import Summary, conclusions, outcome, summarise
from calib.improve.table import collect
from calib.layout import CHOSEN_HEAD, RunFolder
from calib.progress import Progress, silent
from calib.report import Report


def improve(request: Request, *, progress: Progress = silent, note: Note = lambda line: None) -> Summary:
    """Extract, search, choose, calibrate, judge; write heads to serve, an export, a report and a summary to ``out``.

    Killed at any moment the same call goes on; what is done is not done again. With other arguments the steps that
    depend on them are done again, and no others. With a larger budget the search goes on from where it ended.

    Raises:
        MissingFileError, SettingError: inputs that are not there, or cannot be. ExistsError: ``out`` is something else,
            or another process writes it. Others as the pieces: extraction, tuning, evaluation, export.
    """
    request.data.check()
    check_place(request.out)
    with lock(request.folder.lock, f"improving into {request.out}"):
        return _Run.begin(request, progress, note).all()


@dataclass
class _Run:
    """One call."""

    request: Request
    steps: Steps
    progress: Progress
    note: Note
    counts: str  # of the TRAIN json, on which everything depends

    @classmethod
    def begin(cls, request: Request, progress: Progress, note: Note) -> "_Run":
        folds = len(caches.fold_names(request))
        more = request.doctor + 2 * (request.table is not None)
        steps = Steps(request.out, 12 + more + 4 * folds, note)
        return cls(request, steps, progress, note, hash_file(request.data.train))

    def all(self) -> Summary:
        """Every step in its order."""
        found: dict[str, Record] = {}
        if self.request.doctor:
            found["doctor"] = self._doctor()
        for split in caches.splits(self.request):
            found[split.name] = self._extract(split)
        found["detector"] = self._detector(found)
        found["ceiling"] = self._ceiling(found)
        found["control"] = self._control(found)
        folds = self._folds(found)
        found |= folds
        found |= self._choose("", self.folder.cache(self.choosing), found[self.choosing], found)
        if self.request.table is not None:
            found["heads"] = self._heads(self.request.table, found)
        found["judge"] = self._judge(found, folds)
        if self.request.table is not None:
            found["table"] = self._table(found)
        found["export"] = self._export(found)
        found["report"] = self._report(found)
        write_commands(self.request, found)
        return summarise(self.request, found, self.steps)

    @property
    def choosing(self) -> str:
        """The name of the split that heads are chosen on."""
        return "val" if self.request.data.is_crossed else "tune"

    @property
    def judge(self) -> judging.Judge:
        """Of the split that heads are judged on."""
        return judging.Judge.of(self.request, self.folder.cache("val"))

    @property
    def jobs(self) -> list[Job]:
        """Heads of the table."""
        return [] if self.request.table is None else jobs_of(self.request.out, self.judge, self.request.table)

    @property
    def cap(self) -> int | None:
        """Detections per image that heads are chosen and judged at; None: the detector's own."""
        return self.request.search.max_detections

    @property
    def folder(self) -> RunFolder:
        """What lies where in the run."""
        return self.request.folder

    def _extract(self, split: Split) -> Record:
        out, request = self.folder.cache(split.name), self.request
        inputs = {
            "detector": request.detector.identity(),
            "annotations": hash_file(split.annotations),
            "counts": self.counts,
            "images": request.data.images.resolve(),
            "mode": split.mode,
        }
        do = partial(caches.extracted, request, split, out, self.progress)
        return self.steps.run(Step(f"extract-{split.name}", inputs, (out,), do))

    def _doctor(self) -> Record:
        data = self.request.data
        inputs = {
            "detector": self.request.detector.identity(),
            "annotations": [hash_file(path) for path in data.files],
            "images": data.images.resolve(),
        }
        found = self.steps.run(Step("doctor", inputs, (), partial(examined, self.request, self.progress)))
        for warning in found["warnings"]:
            self.note(f"warning: {warning}")
        return found

    def _detector(self, found: dict[str, Record]) -> Record:
        out = self.folder.head(DETECTOR)
        do = partial(heads.detector_head, self.folder.cache("train"), out)
        return self.steps.run(Step("detector", {"train": found["train"]["digest"]}, (out,), do))

    def _ceiling(self, found: dict[str, Record]) -> Record:
        """Said before the budget is spent."""
        inputs = {"cache": found[self.choosing]["digest"], "judge": found["val"]["digest"]}
        inputs |= {"detector": found["detector"]["digest"], "cap": self.cap}

        def do() -> Record:
            reach = ceiling.ceiling(self.folder.cache(self.choosing), self.folder.head(DETECTOR), self.cap)
            return reach | {"few": ceiling.few(self.folder.cache("val"), "val")}

        reach = self.steps.run(Step("ceiling", inputs, (), do))
        few = reach.pop("few", [])
        reach["warnings"] += [] if self.request.doctor else few  # the doctor has said it
        for warning in reach["warnings"]:
            self.note(f"warning: {warning}")
        return reach

    def _searching(self, tune: Record, found: dict[str, Record]) -> dict[str, Any]:
        """What a search depends on, but for its budget."""
        wanted = self.request.search
        return {
            "train": found["train"]["digest"],
            "tune": tune["digest"],
            "objective": " ".join(wanted.objective.split()),
            "steps": wanted.steps,
            "seed": wanted.seed,
            "cap": self.cap,
        }

    def _control(self, found: dict[str, Record]) -> Record:
        """The control is chosen on all of the split: with folds that favours it, not what is compared with it."""
        study, out, name = self.folder.control, self.folder.head(CONTROL), self.choosing
        where = (self.folder.cache("train"), self.folder.cache(name))
        do = partial(heads.control, self.request, where, study, out, self.progress, self.note)
        inputs = self._searching(found[name], found) | {"trials": self.request.search.control_trials}
        return self.steps.run(Step("control", inputs, (study, out), do))

    def _choose(self, fold: str, tune: Path, its: Record, found: dict[str, Record]) -> dict[str, Record]:
        """Search, choose and calibrate on one cache; of a fold, if it is not empty, on all but that."""
        request, wanted = self.request, self.request.search
        home, label = (self.folder.fold(fold), f"{fold}-") if fold else (self.folder, "")
        study, chosen, calibrated = home.search, home.head(CHOSEN), home.head(CALIBRATED)
        others = [self.folder.head(DETECTOR), self.folder.head(CONTROL)]
        inputs = self._searching(its, found) | {
            "methods": wanted.methods, "finalists": wanted.finalists, "seeds": wanted.seeds, "stacked": wanted.stacked,
        }  # fmt: skip
        budget = {"budget": wanted.budget, "searches": request.searches}
        do = partial(heads.searched, request, (self.folder.cache("train"), tune), study, self.progress, self.note)
        search = self.steps.run(Step(f"{label}search", inputs, (study,), do, budget))
        inputs = {name: found[name]["digest"] for name in (DETECTOR, CONTROL)}
        inputs |= {"tune": its["digest"], "search": search["digest"], "objective": wanted.objective, "cap": self.cap}
        do = partial(heads.choose, study / CHOSEN_HEAD, others, tune, wanted, chosen)
        picked = self.steps.run(Step(f"{label}choose", inputs, (chosen,), do))
        inputs = {"head": picked["digest"], "tune": its["digest"]}
        do = partial(heads.with_confidence, chosen, tune, calibrated)
        confidence = self.steps.run(Step(f"{label}calibrate", inputs, (calibrated,), do))
        return {"search": search, CHOSEN: picked, CALIBRATED: confidence}

    def _folds(self, found: dict[str, Record]) -> dict[str, dict[str, Record]]:
        """For every fold a head that was chosen without it; none where tune and test are given."""
        names = caches.fold_names(self.request)
        if not names:
            return {}
        inputs = {"val": hash_file(self.request.data.val), "folds": self.request.folds}
        inputs |= {"group_by": self.request.group_by, "seed": self.request.search.seed}
        files = tuple(self.folder.part(name + rest) for name in names for rest in ("", "-rest"))
        found["split"] = self.steps.run(Step("split", inputs, files, partial(caches.divided, self.request)))
        return {name: self._fold(name, found) for name in names}

    def _fold(self, name: str, found: dict[str, Record]) -> dict[str, Record]:
        out, rest = self.folder.fold(name).rest, self.folder.part(f"{name}-rest")
        do = partial(caches.without_fold, self.folder.cache("val"), rest, out, self.progress)
        inputs = {"val": found["val"]["digest"], "rest": hash_file(rest)}
        its = self.steps.run(Step(f"{name}-cache", inputs, (out,), do))
        return self._choose(name, out, its, found)

    def _heads(self, table: HeadTable, found: dict[str, Record]) -> Record:
        """Those of the table; with another table the ones that are in both are not trained again."""
        jobs, request = self.jobs, self.request
        inputs = {"train": found["train"]["digest"], "val": found["val"]["digest"]}
        inputs |= {"annotations": hash_file(request.data.val), "caps": self.judge.caps}
        wanted = {"entries": [asdict(entry) for entry in table.entries], "seeds": table.seeds}
        places = (path for job in jobs for path in (job.head, job.detections, *map(job.results, job.caps())))

        def do() -> Record:
            run_jobs(jobs, request.processes, self.progress)
            return {"digests": {f"{job.entry.name}/{job.head.name}": load(job.head).digest() for job in jobs}}

        return self.steps.run(Step("heads", inputs, tuple(places), do, wanted))

    def _judge(self, found: dict[str, Record], folds: dict[str, dict[str, Record]]) -> Record:
        run = self.folder
        inputs = {name: found[name]["digest"] for name in NAMES} | {"cache": found["val"]["digest"]}
        inputs |= {"annotations": hash_file(self.judge.annotations), "replicates": self.judge.replicates}
        inputs |= {"caps": self.judge.caps, "names": self.request.judged, "heads": found.get("heads")}
        inputs |= {
            f"{fold} {name}": its[name]["digest"] for fold, its in folds.items() for name in (CHOSEN, CALIBRATED)
        }

        def do() -> Record:
            for name in NAMES:
                for head, out in self._detected(name, list(folds)):
                    self.judge.detect(head, out, self.progress)
            for name in (CHOSEN, CALIBRATED) if folds else ():
                parts = {
                    out: caches.image_ids(run.part(out.parent.name)) for _, out in self._detected(name, list(folds))
                }
                judging.pool(parts, run.detections(name))
            return self.judge.judge(run, self.request.judged, self.progress)

        outputs = [out for name in NAMES for _, out in self._detected(name, list(folds))]
        outputs += [run.detections(name) for name in NAMES]
        return self.steps.run(Step("judge", inputs, (*dict.fromkeys(outputs), run.results), do))

    def _table(self, found: dict[str, Record]) -> Record:
        """Metrics of the table's heads and of the run's own, at every cap."""
        run, jobs, own = self.folder, self.jobs, self.request.beside
        files = [run.detections(name) for name in own]
        outputs = (run.table, *(run.results_at(cap) / name for cap in self.judge.table_caps() for name in own))
        notes = {job.entry.name: job.entry.note for job in jobs}

        def do() -> Record:
            evaluate_at(self.judge, run, files, self.judge.table_caps())
            table = collect(run, jobs, own, self.request.baseline)
            table.write(run.table)
            return table.plain()

        inputs = {"heads": found["heads"], "judge": found["judge"], "notes": notes, "own": own}
        return self.steps.run(Step("table", inputs, outputs, do))

    def _detected(self, name: str, folds: list[str]) -> Iterator[tuple[Path, Path]]:
        """The heads that stand behind the results ``name``, and where the detections of each go."""
        if not folds or name in (DETECTOR, CONTROL):
            yield self.folder.head(name), self.folder.detections(name)
        else:
            for fold in folds:
                yield self.folder.fold(fold).head(name), self.folder.detections(f"{fold}/{name}")

    def _export(self, found: dict[str, Record]) -> Record:
        out = self.folder.export
        inputs = {"head": found[CHOSEN]["digest"], "cache": found["val"]["digest"]}
        inputs["detector"] = self.request.detector.identity()
        do = partial(deliver.exported, self.request.detector, self.folder.head(CHOSEN), self.folder.cache("val"), out)
        return self.steps.run(Step("export", inputs, (out,), do))

    def _report(self, found: dict[str, Record]) -> Record:
        out, request = self.folder.report, self.request
        inputs = {"results": found["judge"], "heads": [found[name]["digest"] for name in NAMES]}
        inputs["annotations"] = hash_file(request.data.val)
        served = {name: self.folder.head(name) for name in self.request.judged}
        folders = [self.folder.results / name for name in self.request.judged]
        notes = tuple(conclusions(request, found))
        inputs["notes"] = notes
        page = Report(folders, request.baseline, served, request.data.images, request.data.val, title="calib improve",
                      focus=outcome(request, found)["judged"], notes=notes)  # fmt: skip
        do = partial(deliver.reported, page, out, self.progress)
        return self.steps.run(Step("report", inputs, (out,), do))
