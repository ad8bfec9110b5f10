"""Results files of other frameworks give the metrics of the same results as json, and are not run."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

Fails = Callable[..., str]

CATEGORIES = [9, 2, 5]  # in no order


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    objects = [(i, CATEGORIES[k % 3], rng.uniform(0, 50, 2), rng.uniform(5, 40, 2)) for i in (1, 2) for k in range(6)]
    document = {
        "images": [
            {"id": i, "height": 99, "width": 99, "neg_category_ids": [], "not_exhaustive_category_ids": []}
            for i in (1, 2)
        ],
        "annotations": [
            {"id": k + 1, "image_id": i, "category_id": c, "bbox": [*xy, *wh], "area": float(wh.prod())}
            for k, (i, c, xy, wh) in enumerate(objects)
        ],
        "categories": [
            {"id": c, "name": str(c), "instance_count": 9, "image_count": 9, "frequency": "r"} for c in CATEGORIES
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(document))
    return tmp_path / "truth.json"


@pytest.fixture
def results(truth: Path) -> list[dict[str, Any]]:
    """Half of the objects, a little aside, and strays."""
    rng = np.random.default_rng(1)
    return [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"] if k % 4 else 2,
            "bbox": [v + float(rng.normal()) for v in a["bbox"]],
            "score": float(rng.random()),
        }
        for k, a in enumerate(json.loads(truth.read_text())["annotations"])
    ]


def evaluated(calib: Callable[..., Any], truth: Path, results: Path, out: Path) -> dict[str, Any]:
    done = calib("evaluate", "--annotations", truth, "--results", results, "--out", out, "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    metrics: dict[str, Any] = json.loads(done.stdout)
    return {k: v for k, v in metrics.items() if isinstance(v, float)}


def test_they_give_the_metrics_of_the_same_results_as_json(
    truth: Path, results: list[dict[str, Any]], calib: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(results))
    index = {c: k for k, c in enumerate(sorted(CATEGORIES))}
    of_image = {i: [r for r in results if r["image_id"] == i] for i in (1, 2)}
    detectron2 = [
        {"image_id": i, "instances": [r | {"category_id": index[r["category_id"]]} for r in rows]}
        for i, rows in of_image.items()
    ]
    torch.save(detectron2, tmp_path / "instances_predictions.pth")
    mmdetection = []
    for i, rows in of_image.items():
        xywh = torch.tensor([r["bbox"] for r in rows], dtype=torch.float64)
        found = {
            "bboxes": torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1),
            "labels": torch.tensor([CATEGORIES.index(r["category_id"]) for r in rows]),
            "scores": torch.tensor([r["score"] for r in rows], dtype=torch.float64),
        }
        mmdetection.append(
            {"img_id": i, "ori_shape": (99, 99), "pad_shape": torch.Size([99, 99]), "pred_instances": found}
        )
    (tmp_path / "results.pkl").write_bytes(pickle.dumps(mmdetection))
    expected = evaluated(calib, truth, tmp_path / "a.json", tmp_path / "out-json")
    assert 0.1 < expected["AP"] < 0.9
    for name in ("instances_predictions.pth", "results.pkl"):
        assert evaluated(calib, truth, tmp_path / name, tmp_path / f"out-{name}") == pytest.approx(expected, abs=1e-12)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_what_is_no_results_is_refused(truth: Path, fails: Fails, tmp_path: Path) -> None:
    def said(name: str) -> str:
        return fails("evaluate", "--annotations", truth, "--results", tmp_path / name, "--out", tmp_path / "out")

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps([Evil()]))
    assert "it names builtins.print" in said("evil.pkl")
    torch.save([Evil()], tmp_path / "evil.pth")
    assert "evil.pth cannot be read" in said("evil.pth")
    (tmp_path / "old.pkl").write_bytes(pickle.dumps([[np.zeros((0, 5))]]))  # mmdetection 2: no image ids
    assert "is no list of images" in said("old.pkl")
    (tmp_path / "other.pkl").write_bytes(pickle.dumps([{"image": 1}]))
    assert "no results that are known" in said("other.pkl")
    torch.save(
        [{"image_id": 1, "instances": [{"category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}]}], tmp_path / "o.pth"
    )
    assert "class index 3: there are 3 classes" in said("o.pth")
    assert "results not found" in said("absent.pth")
