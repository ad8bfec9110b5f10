"""``commands.sh``: the single commands that a run stands for, with which each of its parts can be done otherwise."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from calib.files import write_text
from calib.improve.caches import fold_names, splits
from calib.improve.examined import HOW
from calib.improve.jobs import Job, jobs_of
from calib.improve.judging import Judge
from calib.improve.request import CALIBRATED, CHOSEN, CONTROL, DETECTOR, NAMES, Request
from calib.improve.steps import Record
from calib.layout import CATEGORIES, CHOSEN_HEAD, RunFolder

OUT, RUN = RunFolder(Path("$OUT")), RunFolder(Path("$RUN"))  # as the shell has them
_HEAD = """#!/bin/sh
# The single commands that this run of calib improve stands for. They write into the folder $OUT, or the one that is
# given: sh commands.sh FOLDER. Start it where calib improve was started: paths are relative to that folder. Heads of a
# search with a budget in time may differ: other trials find room in it.
set -e
RUN=$(dirname "$0")
OUT=${1:-%s}
"""


def write_commands(request: Request, found: dict[str, Record]) -> None:
    """Write the file into the run."""
    lines = [_line(words) for words in _commands(request, found)]
    write_text(request.folder.commands, _HEAD % shlex.quote(f"{request.out}-by-hand") + "\n".join(lines) + "\n")


def _line(words: Sequence[Any]) -> str:
    """Words as the shell takes them; ``$OUT`` or ``$RUN`` at the beginning of one is left to it."""
    return " ".join(_word(str(word)) for word in words)


def _word(word: str) -> str:
    if word.startswith(("$OUT/", "$RUN/")):
        return f'"{word}"' if shlex.quote(word[5:]) == word[5:] else f'"{word[:4]}"/{shlex.quote(word[5:])}'
    return shlex.quote(word)


def _commands(request: Request, found: dict[str, Record]) -> Iterator[list[Any]]:
    choosing = "val" if request.data.is_crossed else "tune"
    if request.doctor:
        yield _doctor(request)
    for split in splits(request):
        yield _extract(request, split.annotations, split.name, split.mode)
    yield ["calib", "train", "softmax", "--cache", OUT.cache("train"), "--out", OUT.head(DETECTOR)]
    yield ["calib", "evaluate", "--cache", OUT.cache(choosing), "--head", OUT.head(DETECTOR), "--proposals",
           "--out", OUT.path / "ceiling"]  # fmt: skip
    yield from _control(request, choosing)
    yield from _chosen(request, choosing, OUT, found[CHOSEN], found[CALIBRATED])
    if request.data.is_crossed:
        yield from _folds(request, found)
    else:
        for name in NAMES:
            yield _score(request, "val", OUT.head(name), name)
    if request.table is not None:
        yield from _table(request)
    cap = request.search.max_detections or found["judge"]["cap"]
    yield [*_evaluate(request, request.judged, found, cap), "--calibration", "--matches", "--bootstrap",
           request.replicates, "--out", OUT.results]  # fmt: skip
    for cap in _caps(request):
        names = [job.run for job in _jobs(request)] + list(request.beside)
        yield [*_evaluate(request, names, found, cap), "--out", OUT.results_at(cap)]
    yield from _export(request, found["export"])
    pictures = ["--images", request.data.images, "--annotations", request.data.val]
    yield ["calib", "report", *(OUT.results / n for n in request.judged), "--baseline", request.baseline,
           "--models", OUT.models, *pictures, "--out", OUT.report]  # fmt: skip


def _judge(request: Request) -> Judge:
    return Judge.of(request, request.folder.cache("val"))


def _caps(request: Request) -> list[int]:
    return [] if request.table is None else _judge(request).table_caps()


def _jobs(request: Request) -> list[Job]:
    return [] if request.table is None else jobs_of(OUT.path, _judge(request), request.table)


def _doctor(request: Request) -> list[Any]:
    data = request.data
    tune = ["--tune", data.tune] if data.tune else []
    how = ["--device", request.device, "--sample", HOW.sample, "--seconds", HOW.seconds]
    return ["calib", "doctor", "--annotations", data.train, "--val", data.val, *tune, "--images", data.images,
            *_detector(request), *how]  # fmt: skip


def _table(request: Request) -> Iterator[list[Any]]:
    for job in _jobs(request):
        base = ["--base", job.base.head] if job.base else []
        settings = [word for pair in job.entry.settings.items() for word in ("--set", _setting(*pair))]
        yield ["calib", "train", job.entry.method, *base, "--cache", OUT.cache("train"), "--out", job.head, *settings,
               "--seed", job.seed]  # fmt: skip
        yield _score(request, "val", job.head, job.run)


def _setting(key: str, value: Any) -> str:
    return f"{key}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def _extract(request: Request, annotations: Path | str, name: str, mode: str) -> list[Any]:
    return ["calib", "extract", *_detector(request), "--annotations", annotations, "--counts-from",
            request.data.train, "--images", request.data.images, "--mode", mode, "--device", request.device, "--resume",
            "--out", OUT.cache(name)]  # fmt: skip


def _detector(request: Request) -> list[Any]:
    detector = request.detector
    more = ["--weights", detector.weights] if detector.weights else []
    more += ["--detector-args", detector.arguments] if detector.arguments else []
    return ["--detector", detector.spec, *more]


def _tune(request: Request, tune: str, out: Path) -> list[Any]:
    wanted = request.search
    how = ["--steps", wanted.steps, "--seed", wanted.seed, "--device", request.device]
    how += ["--max-detections", wanted.max_detections] if wanted.max_detections else []
    return ["calib", "tune", "--cache", OUT.cache("train"), "--tune-cache", OUT.cache(tune), "--objective",
            wanted.objective, *how, "--out", out]  # fmt: skip


def _control(request: Request, tune: str) -> Iterator[list[Any]]:
    space, trials = RUN.control.with_suffix(".toml"), request.search.control_trials
    yield [*_tune(request, tune, OUT.control), "--methods", "natural", "--space", space, "--budget", trials,
           "--finalists", 1, "--seeds", 1, "--bases", 0, "--no-average"]  # fmt: skip
    yield ["mkdir", "-p", OUT.models / CONTROL]
    yield ["cp", "-R", OUT.control / CHOSEN_HEAD, OUT.head(CONTROL)]


def _chosen(request: Request, tune: str, home: RunFolder, chosen: Record, confidence: Record) -> Iterator[list[Any]]:
    wanted, plan = request.search, request.search.plan(request.searches)
    budget = plan.trials if plan.seconds is None else f"{plan.seconds:.0f}s"
    methods = ",".join(wanted.methods) or "all"
    yield [*_tune(request, tune, home.search), "--methods", methods, "--budget", budget, "--finalists",
           wanted.finalists, "--seeds", wanted.seeds, "--stacked", wanted.stacked]  # fmt: skip
    source = home.search / CHOSEN_HEAD if chosen["from"] == "search" else OUT.head(chosen["from"])
    yield ["mkdir", "-p", home.models / CHOSEN, home.models / CALIBRATED]
    yield ["cp", "-R", source, home.head(CHOSEN)]
    if confidence["maps"] is None:
        yield ["cp", "-R", source, home.head(CALIBRATED)]
        return
    yield ["calib", "calibrate", "--head", home.head(CHOSEN), "--cache", OUT.cache(tune), "--method",
           confidence["maps"], "--out", home.head(CALIBRATED)]  # fmt: skip


def _folds(request: Request, found: dict[str, Record]) -> Iterator[list[Any]]:
    """Per fold a head that is chosen without it, and its detections there; then those of all folds together."""
    group = ["--group-by", request.group_by] if request.group_by else []
    yield ["calib", "data", "split", request.data.val, "--folds", request.folds, "--rest", *group, "--seed",
           request.search.seed, "--out", OUT.folds]  # fmt: skip
    for fold in fold_names(request):
        yield _extract(request, OUT.part(fold), fold, "test")
        yield _extract(request, OUT.part(f"{fold}-rest"), f"{fold}-rest", "test")
        its = found[fold]
        yield from _chosen(request, f"{fold}-rest", OUT.fold(fold), its[CHOSEN], its[CALIBRATED])
        for name in (CHOSEN, CALIBRATED):
            yield _score(request, fold, OUT.fold(fold).head(name), f"{fold}/{name}")
    for name in (DETECTOR, CONTROL):
        yield _score(request, "val", OUT.head(name), name)
    for name in (CHOSEN, CALIBRATED):
        parts = [OUT.detections(f"{fold}/{name}") for fold in fold_names(request)]
        join = (
            "import sys, pyarrow as pa, pyarrow.parquet as pq; "
            "pq.write_table(pa.concat_tables([pq.read_table(p) for p in sys.argv[2:]]), sys.argv[1])"
        )
        yield ["python", "-c", join, OUT.detections(name), *parts]


def _score(request: Request, cache: str, head: Path, name: str) -> list[Any]:
    caps = _judge(request).caps
    cap = [] if caps == (None,) else ["--max-detections", max(map(_judge(request).cap, caps))]
    return ["calib", "score", "--cache", OUT.cache(cache), "--head", head, *cap, "--out", OUT.detections(name)]


def _evaluate(request: Request, names: Sequence[str], found: dict[str, Record], cap: int) -> list[Any]:
    results = [word for name in names for word in ("--results", OUT.detections(name))]
    how = ["--style", "coco"] if found["judge"]["style"] == "coco" else ["--max-detections", cap]
    return ["calib", "evaluate", "--annotations", request.data.val, *results, *how, "--counts",
            OUT.cache("val") / CATEGORIES]  # fmt: skip


def _export(request: Request, exported: Record) -> Iterator[list[Any]]:
    if exported["to"] is None:
        return
    more = ["--checkpoint", request.detector.checkpoint] if exported["to"] == request.detector.framework else []
    yield ["calib", "export", OUT.head(CHOSEN), "--to", exported["to"], *more, "--cache",
           OUT.cache("val"), "--out", OUT.path / exported["export"]]  # fmt: skip
