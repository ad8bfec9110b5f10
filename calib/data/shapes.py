"""The procedural long-tailed detection set, written in LVIS v1 format.

    OUT/train.json  OUT/tune.json  OUT/val.json      images, annotations, categories (with TRAIN counts)
    OUT/images/train/000001.png ...                  file_name is relative to OUT/images

Train follows the LVIS curve; tune and val place equally many objects of every category, so that rare
categories are measured and not guessed. Everything is a function of the settings: picture i of a split is
drawn from a generator seeded by (seed, split, i), so any number of workers writes the same bytes.
"""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from PIL import Image

from calib.data.federated import Labels, annotation_record, category_records, image_record, label
from calib.data.plan import SPLITS, Plan, ShapesSettings, make_plan
from calib.data.render import render
from calib.errors import ExistsError, FitError, InputError, SettingError
from calib.files import write_text
from calib.parallel.pool import end_with_parent
from calib.progress import Bar, Progress, silent

_CHUNK = 32


def _render_one(plan: Plan, folder: Path, split: str, index: int) -> Labels:
    """Paint picture ``index`` of ``split``, write it, return its labels."""
    s, key = plan.settings, [plan.settings.seed, 10 + SPLITS.index(split), index]
    looks = [c.look for c in plan.categories]
    taken = frozenset((look.shape, look.pattern) for look in looks)
    picture = render(plan.images[split][index], looks, taken, s.scene, np.random.default_rng(key))
    # Noise compresses badly at any effort: the least effort costs a third of the time for 2 % more bytes.
    Image.fromarray(picture.pixels).save(folder / "images" / _file_name(split, index), compress_level=1)
    return label(
        picture.instances,
        plan.categories,
        verified=s.verified,
        left_out=0.0 if split == "train" else s.left_out,
        rng=np.random.default_rng([*key, 1]),
    )


def _file_name(split: str, index: int) -> str:
    return f"{split}/{index + 1:06d}.png"


_worker_state: dict[str, Any] = {}


def _start_worker(plan: Plan, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    Thread(target=end_with_parent, daemon=True).start()
    _worker_state.update(plan=plan, folder=folder)


def _render_chunk(jobs: list[tuple[str, int]]) -> list[Labels]:
    return [_render_one(_worker_state["plan"], _worker_state["folder"], *job) for job in jobs]


def _render_all(plan: Plan, folder: Path, workers: int, bar: Bar) -> dict[str, list[Labels]]:
    jobs = [(split, i) for split in SPLITS for i in range(len(plan.images[split]))]
    if workers == 1:
        labels = []
        for job in jobs:
            labels.append(_render_one(plan, folder, *job))
            bar.advance()
    else:
        labels = _render_parallel(plan, folder, jobs, workers, bar)
    out: dict[str, list[Labels]] = {split: [] for split in SPLITS}
    for (split, _), result in zip(jobs, labels, strict=True):
        out[split].append(result)
    return out


def _render_parallel(plan: Plan, folder: Path, jobs: list[tuple[str, int]], workers: int, bar: Bar) -> list[Labels]:
    """``jobs`` in processes; results in the order of the jobs."""
    chunks = [jobs[i : i + _CHUNK] for i in range(0, len(jobs), _CHUNK)]
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(plan, folder))
    futures: list[Future[list[Labels]]] = []
    try:
        futures = [pool.submit(_render_chunk, chunk) for chunk in chunks]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                bar.advance(len(future.result()))
        return [labels for future in futures for labels in future.result()]
    except BrokenProcessPool as e:
        raise InputError(
            "a rendering process was killed or could not start",
            hint="try --workers 1, which needs least memory",
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)


def _complete(plan: Plan, folder: Path, train: list[Labels]) -> None:
    """Append train pictures, one category each, for categories whose every object came out hidden.

    Raises:
        FitError: a category stays hidden in ten pictures of its own, which no scene in range causes.
    """
    seen = {i.rank for labels in train for i in labels.kept}
    for category in plan.categories:
        for _ in range(10):
            if category.rank in seen:
                break
            plan.images["train"].append([category.rank])
            train.append(_render_one(plan, folder, "train", len(train)))
            seen.update(i.rank for i in train[-1].kept)
        if category.rank not in seen:
            raise FitError(f"category '{category.name}' never shows", hint="use a larger --size")


def _dataset(plan: Plan, split: str, labels: list[Labels], records: list[dict[str, Any]]) -> dict[str, Any]:
    """One split as an LVIS v1 object. Image ids are unique over the splits, annotation ids within one."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, one in enumerate(labels):
        image_id = SPLITS.index(split) * 1_000_000 + index + 1
        images.append(image_record(image_id, _file_name(split, index), plan.settings.scene.size_px, one))
        for instance in one.kept:
            annotations.append(annotation_record(len(annotations) + 1, image_id, instance, plan.categories))
    info = {
        "description": "calib shapes: a procedural long-tailed detection set",
        "split": split,
        "settings": asdict(plan.settings),
    }
    return {"info": info, "images": images, "annotations": annotations, "categories": records}


def build(
    out: Path,
    settings: ShapesSettings | None = None,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Render the set into the folder ``out`` and return a summary (counts per split and per frequency bin).

    ``out`` appears complete or not at all: the set grows in a folder beside it and is renamed. With more than
    one worker the caller's ``__main__`` must be importable (spawned processes).

    Raises:
        ExistsError: ``out`` holds files already (with ``overwrite``: files that are not such a set).
        SettingError: settings that contradict each other.
        InputError: ``out`` cannot be written.
    """
    if workers < 1:
        raise SettingError(f"workers must be at least 1, got {workers}")
    plan = make_plan(settings or ShapesSettings())
    with _growing(out, overwrite) as folder:
        for split in SPLITS:
            (folder / "images" / split).mkdir(parents=True)
        total = sum(len(images) for images in plan.images.values())
        with progress("rendering", total=total, unit="images") as bar:
            labels = _render_all(plan, folder, workers, bar)
        _complete(plan, folder, labels["train"])
        records = category_records(plan.categories, [one.kept for one in labels["train"]])
        for split in SPLITS:
            dataset = _dataset(plan, split, labels[split], records)
            write_text(folder / f"{split}.json", json.dumps(dataset, separators=(",", ":")))
    return summarise(plan.settings, labels, records)


def summarise(
    settings: ShapesSettings, labels: dict[str, list[Labels]], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Images and annotations per split, categories per bin of train instances and per frequency."""
    counts = [r["instance_count"] for r in records]
    edges = ((0, 10), (10, 100), (100, 1000), (1000, float("inf")))
    return {
        "seed": settings.seed,
        "categories": len(records),
        "images": {split: len(labels[split]) for split in SPLITS},
        "annotations": {split: sum(len(one.kept) for one in labels[split]) for split in SPLITS},
        "train_instances": {"least": min(counts), "most": max(counts)},
        "categories_per_instance_bin": [sum(low <= n < high for n in counts) for low, high in edges],
        "categories_per_frequency": {f: sum(r["frequency"] == f for r in records) for f in "rcf"},
    }


@contextmanager
def _growing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its place on success and is removed on failure."""
    if (out.exists() and not out.is_dir()) or (
        out.is_dir() and any(out.iterdir()) and not (overwrite and _is_shapes_set(out))
    ):
        raise ExistsError(
            f"{out} exists already" + (" and is not a set written by this command" if overwrite else ""),
            hint="name another --out" + ("" if overwrite else ", or give --overwrite to replace a set of shapes"),
        )
    out = out.resolve()
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
        if out.is_dir():
            shutil.rmtree(out)
        folder.rename(out)
    except OSError as e:
        raise InputError(
            f"{out} cannot be written: {e.strerror or e}",
            hint="name a folder that you may write, on a disk with space (the demo set fills 210 MB)",
        ) from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_shapes_set(folder: Path) -> bool:
    try:
        with open(folder / "val.json", "rb") as f:
            return b"calib shapes" in f.read(200)
    except OSError:
        return False
