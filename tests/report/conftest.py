"""A split of 24 drawn pictures, three heads whose errors are known, and their results with everything in them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from calib.artifact import Artifact, HeadInfo, save
from calib.evaluate.evaluate_files import Options, evaluate_files
from calib.heads.linear import LinearClassifier, LinearHead
from calib.report import Report

COUNTS = [3, 4, 8, 12, 40, 90, 150, 400, 900, 1000, 2000, 5000]
FREQUENCIES = "rrrccccfffff"
EVIL = "</script><img src=x onerror=alert(1)>&amp;"  # the name of the first category, which is rare
CAP, PER_IMAGE, N_IMAGES, SIDE = 6, 4, 24, 120
NAMES = [EVIL, *(f"kind {i}" for i in range(2, 13))]


@dataclass(frozen=True)
class Split:
    """Where everything lies."""

    folder: Path
    annotations: Path
    images: Path
    models: Path

    def results(self, *names: str, of: str = "results") -> list[Path]:
        return [self.folder / of / name for name in names]

    def report(self, **changed: Any) -> Report:
        """Everything in it, but for what is ``changed``."""
        everything: dict[str, Any] = {
            "results": self.results("good", "base", "noisy"),
            "models": self.models,
            "images": self.images,
            "annotations": self.annotations,
        }
        return Report(**(everything | changed))


def document(folder: Path) -> dict[str, Any]:
    """Four objects on each picture, one of them rare; every category is labelled everywhere."""
    annotations: list[dict[str, Any]] = []
    images = []
    for i in range(1, N_IMAGES + 1):
        categories = [1 + i % 3, 4 + i % 4, 8 + i % 5, 8 + (i + 2) % 5]
        picture = Image.new("RGB", (SIDE, SIDE), (40 + 8 * i, 90, 120))
        for k, category in enumerate(categories):
            box = [5 + 60 * (k % 2), 5 + 60 * (k // 2), 45, 40]
            ImageDraw.Draw(picture).rectangle(
                (box[0], box[1], box[0] + 45, box[1] + 40), fill=(20 * category, 200, 255 - 20 * category)
            )
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "category_id": category, "bbox": box, "area": 1800.0}
            )
        picture.save(folder / f"{i}.png")
        others = sorted(set(range(1, 13)) - set(categories))
        images.append(
            {"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE}
            | {"neg_category_ids": others, "not_exhaustive_category_ids": []}
        )
    kinds = [
        {"id": c + 1, "name": NAMES[c], "frequency": FREQUENCIES[c], "instance_count": n, "image_count": n}
        for c, n in enumerate(COUNTS)
    ]
    return {"images": images, "annotations": annotations, "categories": kinds}


def detections(head: str, truth: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """``base`` calls rare objects kind 12; ``good`` names all rightly, but misses those of category 8 on even pictures;
    ``noisy`` is right below ten better-scored detections of nothing."""
    rng = np.random.default_rng(0)
    for a in truth["annotations"]:
        category, score = a["category_id"], float(rng.uniform(0.3, 0.9))
        if head == "base" and category <= 3:
            category = 12
        if head == "good" and category == 8 and a["image_id"] % 2 == 0:
            continue
        if head == "noisy":
            score /= 10
        yield {"image_id": a["image_id"], "category_id": category, "bbox": a["bbox"], "score": score}
    for image in truth["images"]:
        for k in range(10):
            score = 0.95 - 0.01 * k if head == "noisy" else 0.02 + 0.001 * k
            yield {"image_id": image["id"], "category_id": 1 + k, "bbox": [50.5, k, 8, 100], "score": score}


def head_of(name: str) -> Artifact:
    """A linear head; norms of ``base`` rise with the category, training of ``good`` had two stages."""
    weight = torch.ones(13, 4) * (torch.arange(13)[:, None] + 1 if name == "base" else 1)
    losses = [[s, 4.0 / (1 + s / 50)] for s in range(0, 500, 50)]
    info = HeadInfo(
        method="natural",
        settings={},
        seed=0,
        cache_digest="0",
        detector_digest="0",
        category_ids=list(range(1, 13)),
        category_names=NAMES,
        instance_counts=COUNTS,
        losses=losses + losses[:5] if name == "good" else losses,
    )
    return Artifact(LinearHead(LinearClassifier(weight, torch.zeros(13))), info)


@pytest.fixture(scope="session")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """``results/`` at a cap of 6 with all metrics, ``plain/`` without any but AP."""
    folder = tmp_path_factory.mktemp("report")
    images = folder / "images"
    images.mkdir()
    truth = document(images)
    annotations = folder / "val.json"
    annotations.write_text(json.dumps(truth))
    names = ["base", "good", "noisy"]
    files = [folder / f"{name}.json" for name in names]
    for name, path in zip(names, files, strict=True):
        path.write_text(json.dumps(list(detections(name, truth))))
        save(folder / "models" / name / "1", head_of(name))
    split = Split(folder, annotations, images, folder / "models")
    everything = Options(max_detections=CAP, calibration=True, matches=True, bootstrap=20)
    evaluate_files(annotations, files, split.results(*names), everything)
    evaluate_files(annotations, files, split.results(*names, of="plain"), Options(max_detections=CAP))
    return split
