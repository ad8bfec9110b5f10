"""A dozen pictures for the command line, and the arguments that name them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calib.cache import Cache

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def dozen(shapes_set: Path, tmp_path: Path) -> Callable[..., Path]:
    """``dozen(change)``: a json with the first twelve val pictures, after ``change(document)``."""

    def write(change: Change = lambda d: None) -> Path:
        data = json.loads((shapes_set / "val.json").read_bytes())
        data["images"] = data["images"][:12]
        ids = {r["id"] for r in data["images"]}
        data["annotations"] = [a for a in data["annotations"] if a["image_id"] in ids]
        change(data)
        path = tmp_path / "dozen.json"
        path.write_text(json.dumps(data))
        return path

    return write


@pytest.fixture
def extracting(shapes_set: Path, detector_file: Path, dozen: Callable[..., Path]) -> Callable[..., list[Any]]:
    """``extracting(out, *more, **changed)``: arguments of ``calib extract`` for the dozen, in six shards."""

    def arguments(out: Path, *more: object, **changed: object) -> list[Any]:
        options: dict[str, object] = {
            "detector": f"torchvision:{detector_file}",
            "images": shapes_set / "images",
            "batch_size": 2,
            "images_per_shard": 2,
            "device": "cpu",
        } | changed
        if "annotations" not in options:
            options["annotations"] = dozen()
        flat = [x for k, v in options.items() for x in ("--" + k.replace("_", "-"), v)]
        return ["extract", *flat, "--out", out, *more]

    return arguments


@pytest.fixture(scope="session")
def head(val_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The detector's own head, saved."""
    from calib.training import train

    out = tmp_path_factory.mktemp("models") / "softmax" / "1"
    train("softmax", val_cache, out)
    return out
