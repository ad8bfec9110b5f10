"""A few images of the rendered set with all its categories, and the request of a run on them that takes seconds."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calib.improve.request import Data, Frozen, Request, Search

SMALL = Search(
    "2", methods=("tau-norm", "logit-adjustment"), steps=2, finalists=1, seeds=1, stacked=1, control_trials=1
)


def shortened(source: Path, out: Path, images: int) -> Path:
    """The first ``images`` of an annotation file, which keeps its counts of TRAIN."""
    document = json.loads(source.read_text())
    kept = document["images"][:images]
    ids = {image["id"] for image in kept}
    own = [a for a in document["annotations"] if a["image_id"] in ids]
    out.write_text(json.dumps(document | {"images": kept, "annotations": own}))
    return out


@pytest.fixture(scope="session")
def files(shapes_set: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """train, tune and val of 12 images each, and the folder of pictures."""
    pytest.importorskip("torchvision")
    out = tmp_path_factory.mktemp("small")
    found = {s: shortened(shapes_set / f"{s}.json", out / f"{s}.json", 12) for s in ("train", "tune", "val")}
    return found | {"images": shapes_set / "images"}


@pytest.fixture(scope="session")
def request_for(files: dict[str, Path], detector_file: Path) -> Callable[..., Request]:
    """``request_for(out, val_alone=False, **changed)``: ``changed`` are fields of Request or of its search."""

    def make(out: Path, *, val_alone: bool = False, **changed: Any) -> Request:
        tune = None if val_alone else files["tune"]
        search = {k: v for k, v in changed.items() if k in Search.__dataclass_fields__}
        own = {k: v for k, v in changed.items() if k not in search}
        data = Data(files["train"], files["images"], files["val"], tune)
        frozen = Frozen(f"torchvision:{detector_file}")
        plain = Request(frozen, data, out, replace(SMALL, **search), replicates=10, device="cpu", doctor=False)
        return replace(plain, **own)

    return make
