"""The procedural long-tailed detection set, written in LVIS v1 format.

    OUT/train.json  OUT/tune.json  OUT/val.json      images, annotations, categories (with TRAIN counts)
    OUT/images/train/000001.png ...                  file_name is relative to OUT/images

Train follows the LVIS curve; tune and val place equally many objects of every category, so that rare
categories are measured and not guessed. Everything is a function of the settings: picture i of a split is
drawn from a generator seeded by (seed, split, i), so any number of processes writes the same bytes.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from calib.data.federated import Labels, annotation_record, category_records, image_record, label
from calib.data.plan import SPLITS, Plan, ShapesSettings, make_plan
from calib.data.render import render
from calib.errors import ExistsError, FitError, InputError, SettingError
from calib.files import write_text
from calib.parallel.pool import Pool, worker_progress
from calib.progress import Progress, silent

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


@dataclass(frozen=True)
class _Rendering:
    """Paints pictures of ``plan`` into ``folder``: (split, index) of each -> their labels."""

    plan: Plan
    folder: Path

    def __call__(self, jobs: list[tuple[str, int]]) -> list[Labels]:
        found = []
        with worker_progress("", total=len(jobs), unit="steps") as bar:
            for job in jobs:
                found.append(_render_one(self.plan, self.folder, *job))
                bar.advance()
        return found


def _render_all(plan: Plan, folder: Path, processes: int, progress: Progress) -> dict[str, list[Labels]]:
    jobs = [(split, i) for split in SPLITS for i in range(len(plan.images[split]))]
    chunks = [jobs[i : i + _CHUNK] for i in range(0, len(jobs), _CHUNK)]
    with Pool(processes) as pool:
        found = pool.run(
            _Rendering(plan, folder), chunks, steps=len(jobs), label="rendering", progress=progress, unit="images"
        )
    out: dict[str, list[Labels]] = {split: [] for split in SPLITS}
    for (split, _), labels in zip(jobs, chain.from_iterable(found), strict=True):
        out[split].append(labels)
    return out


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
    processes: int = 1,
    overwrite: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Render the set into the folder ``out`` and return a summary (counts per split and per frequency bin).

    ``out`` appears complete or not at all: the set grows in a folder beside it and is renamed. With more than
    one process the caller's ``__main__`` must be importable (spawned processes).

    Raises:
        ExistsError: ``out`` holds files already (with ``overwrite``: files that are not such a set).
        SettingError: settings that contradict each other.
        InputError: ``out`` cannot be written.
    """
    if processes < 1:
        raise SettingError(f"processes must be at least 1, got {processes}")
    plan = make_plan(settings or ShapesSettings())
    with _growing(out, overwrite) as folder:
        for split in SPLITS:
            (folder / "images" / split).mkdir(parents=True)
        labels = _render_all(plan, folder, processes, progress)
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
