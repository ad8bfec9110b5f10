"""Arrays of a cascade to a cache: rows of all stages in one table, with a column that says which."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.cache import Cache
from calib.heads.detector import detector_head
from calib.score import score
from calib.settings import Nms
from tests.toy import Toy

from .test_raw import arrays_of, write_rows

Calib = Callable[..., Any]
Fails = Callable[..., str]


def cascade_files(cache: Cache, folder: Path) -> list[Any]:
    """``--rows`` and so on of a cascade's cache, as users of another framework would write them."""
    parts = [
        arrays_of(stage) | {"label": stage.labels, "stage": np.full(stage.n_rows, k)}
        for k, stage in enumerate(cache.stages)
    ]
    whole = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    order = np.argsort(whole["image_id"], kind="stable")
    rows = write_rows(folder, "parquet", {name: v[order] for name, v in whole.items()})
    tensors = {
        f"stage{k}.{n}" if k else n: getattr(c, n)
        for k, c in enumerate(cache.classifier.stages)
        for n in ("weight", "bias")
    }
    np.savez(folder / "head.npz", **tensors)
    (folder / "a.json").write_text(json.dumps(document_of(cache)))
    return ["--rows", rows, "--classifier", folder / "head.npz", "--annotations", folder / "a.json"]


def document_of(cache: Cache) -> dict[str, Any]:
    """The annotation file of ``cache``."""
    lists = ("neg_category_ids", "not_exhaustive_category_ids")
    images = [
        {
            "id": r["image_id"],
            "file_name": f"{r['image_id']}.jpg",
            "height": 100,
            "width": 100,
            **{n: r[n] for n in lists},
        }
        for r in cache.images.to_pylist()
    ]
    annotations = [
        {n: a[n] for n in ("id", "image_id", "category_id", "area", "ignore")}
        | {"bbox": [a[n] for n in ("x1", "y1", "width", "height")]}
        for a in cache.annotations().to_pylist()
    ]
    k = cache.categories
    columns = {"id": k.category_id.tolist(), "name": k.name, "frequency": k.frequency}
    columns |= {"instance_count": k.instance_count.tolist(), "image_count": k.image_count.tolist()}
    categories = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.mark.parametrize("mode", ["test", "train"])
def test_a_cascade_comes_with_a_column_of_stages(mode: str, calib: Calib, tmp_path: Path) -> None:
    cache = Toy(stages=3, average="logits", mode=mode).write(tmp_path / "c")
    settings = ("dtype=float32", "average=logits", "next_ious=0.6,0.7", "max_detections=50")
    given = (*cascade_files(cache, tmp_path), "--mode", mode, *(p for s in settings for p in ("--set", s)))
    outcome = calib("import", *given, "--out", tmp_path / "again")
    assert outcome.exit_code == 0, (outcome.stderr, outcome.exception)
    again = Cache(tmp_path / "again")
    assert again.manifest.detector.digest == cache.manifest.detector.digest
    assert (again.manifest.detector.stages, again.manifest.detector.average) == (3, "logits")
    for k, (ours, theirs) in enumerate(zip(again.stages, cache.stages, strict=True)):
        names = ("roi_id", "image_id", "label", "refined_x1", "proposal_y2")
        pairs = [dict(zip(names, s.meta(*names), strict=True)) for s in (ours, theirs)]
        x = [s.features.read(0, s.n_rows) for s in (ours, theirs)]
        if mode == "test":
            assert all(np.array_equal(pairs[0][n], pairs[1][n]) for n in names)
            assert np.array_equal(*x)
        else:  # drawn and ordered, the same RoIs in every stage
            assert np.array_equal(pairs[0]["roi_id"], again.stages[0].meta("roi_id")[0])
            assert sorted(map(tuple, x[0].tolist())) == sorted(map(tuple, x[1][theirs.labels >= 0].tolist()))
        assert (ours.meta("stage")[0] == k).all()
    if mode == "test":
        found = [score(c, detector_head(c), Nms(1e-4, 0.5, 50)) for c in (again, cache)]
        assert all(np.array_equal(a.detections.score, b.detections.score) for a, b in zip(*found, strict=True))


def test_an_imported_cascade_is_trained_and_evaluated_from_the_command_line(
    calib: Calib, fails: Fails, tmp_path: Path
) -> None:
    for mode in ("train", "test"):
        (tmp_path / mode).mkdir()
        files = cascade_files(Toy(stages=2, mode=mode).write(tmp_path / f"toy-{mode}"), tmp_path / mode)
        assert calib("import", *files, "--mode", mode, "--out", tmp_path / f"c-{mode}").exit_code == 0
    head = tmp_path / "models" / "natural" / "1"
    commands = [
        ("train", "natural", "--cache", tmp_path / "c-train", "--out", head, "--set", "steps=3"),
        ("score", "--cache", tmp_path / "c-test", "--head", head, "--out", tmp_path / "d.parquet"),
        ("evaluate", "--cache", tmp_path / "c-test", "--head", head, "--out", tmp_path / "results"),
        ("cache", "check", tmp_path / "c-test"),
    ]
    for command in commands:
        done = calib(*command)
        assert done.exit_code == 0, (command[0], done.stderr, done.exception)
    assert json.loads((tmp_path / "results" / "summary.json").read_text())["AP"] > 0
    # A cache of its first stage alone is of another detector.
    one = Toy(mode="test").write(tmp_path / "one")
    said = fails("score", "--cache", one.path, "--head", head, "--out", tmp_path / "e.parquet")
    assert "was fitted for detector" in said
