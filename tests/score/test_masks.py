"""``calib masks``: a Mask R-CNN's own masks for its own detections, rescored or not, and goes on when interrupted."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pycocotools import mask as coco_mask

from calib.errors import InputError, ShapeError, UnsupportedError
from calib.extract import masks as module
from calib.extract.dataset import Dataset
from calib.extract.masks import MaskRun, write_masks
from calib.extract.pictures import read_image
from calib.extract.torchvision import TorchvisionAdapter
from calib.score.detections import DETECTIONS_SCHEMA

from ..extract.conftest import CLASSES, picture, tiny_detector

pytest.importorskip("torchvision")


def mask_detector(outputs: int = CLASSES + 1) -> Any:
    """The tiny detector with a mask branch of ``outputs`` channels."""
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.ops import MultiScaleRoIAlign

    model = tiny_detector()
    heads = model.roi_heads
    heads.mask_roi_pool, heads.mask_head = MultiScaleRoIAlign(["0"], 7, 2), MaskRCNNHeads(8, (8,), 1)
    heads.mask_predictor = MaskRCNNPredictor(8, 8, outputs)
    with torch.no_grad():
        weight = heads.mask_predictor.mask_fcn_logits.weight
        weight.sub_(weight.mean()).mul_(20)  # untrained masks are grey, or of one sign
    return model.eval()


def agnostic_detector() -> Any:
    """One mask for all classes."""
    return mask_detector(1)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Five pictures of three sizes with a few polygons."""
    from PIL import Image

    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for i, (height, width) in enumerate([(48, 64), (40, 40), (48, 64), (100, 60), (48, 64)]):
        Image.fromarray(picture(height, width, i)).save(tmp_path / "images" / f"{i + 1}.png")
        images.append({"id": i + 1, "file_name": f"{i + 1}.png", "height": height, "width": width})
        images[-1] |= {"neg_category_ids": [10, 20, 30, 40], "not_exhaustive_category_ids": []}
        polygon = [5, 5, 30, 5, 30, 25, 5, 25]
        annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 10 * (i % CLASSES + 1), "area": 500})
        annotations[-1] |= {"bbox": [5, 5, 25, 20], "segmentation": [polygon]}
    categories = [
        {"id": 10 * (c + 1), "name": f"kind {c}", "frequency": "f", "instance_count": 1, "image_count": 1}
        for c in range(CLASSES)
    ]
    path = tmp_path / "val.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@torch.inference_mode()
def live(model: Any, dataset: Dataset, images: Path) -> tuple[pa.Table, list[Any]]:
    """The model's own detections, as ``calib score`` writes them, and its masks [height, width]."""
    rows, found = [], []
    for record in dataset.images:
        x = torch.from_numpy(read_image(record, images)).permute(2, 0, 1).float() / 255
        one = model([x])[0]
        for k in range(len(one["scores"])):
            box = one["boxes"][k].tolist()
            category = int(dataset.categories.category_id[int(one["labels"][k]) - 1])
            rows.append([record["id"], category, float(one["scores"][k]), *box, k])
        found += list((one["masks"][:, 0] > 0.5).numpy())
    return pa.table(list(zip(*rows, strict=True)), schema=DETECTIONS_SCHEMA), found


def decoded(path: Path) -> list[Any]:
    with warnings.catch_warnings():  # pycocotools on numpy 2
        warnings.simplefilter("ignore")
        return [coco_mask.decode(row["segmentation"]).astype(bool) for row in json.loads(path.read_text())]


def test_the_masks_are_the_models_own(split: Path, tmp_path: Path) -> None:
    model, dataset = mask_detector(), Dataset.read(split)
    table, wanted = live(model, dataset, tmp_path / "images")
    pq.write_table(table, tmp_path / "d.parquet")
    adapter = TorchvisionAdapter(model, "tiny", torch.device("cpu"))
    run = MaskRun(adapter, dataset, tmp_path / "images", tmp_path / "d.parquet", tmp_path / "masks.json")
    assert write_masks(run) == len(table) == len(wanted) > 50
    found = decoded(tmp_path / "masks.json")
    # Boxes go from the picture's pixels to the network's and back: a pixel on the edge of a mask may turn.
    differing = sum(int((a != b).sum()) for a, b in zip(found, wanted, strict=True))
    assert differing <= 1e-3 * sum(int(m.sum()) for m in wanted)
    assert np.mean([m.any() for m in found]) > 0.1
    rows = json.loads((tmp_path / "masks.json").read_text())
    for row, plain in zip(rows, table.to_pylist(), strict=True):
        assert (row["image_id"], row["category_id"], row["score"]) == tuple(
            plain[k] for k in ("image_id", "category_id", "score")
        )
        assert row["bbox"] == [plain["x1"], plain["y1"], plain["x2"] - plain["x1"], plain["y2"] - plain["y1"]]


def test_one_mask_for_all_classes(split: Path, tmp_path: Path) -> None:
    """The same as of a model that has this mask for every class."""
    agnostic, specific = agnostic_detector(), mask_detector()
    one, each = (m.roi_heads.mask_predictor for m in (agnostic, specific))
    each.conv5_mask.load_state_dict(one.conv5_mask.state_dict())
    for part, repeats in (("weight", (CLASSES + 1, 1, 1, 1)), ("bias", (CLASSES + 1,))):
        getattr(each.mask_fcn_logits, part).data = getattr(one.mask_fcn_logits, part).data.repeat(repeats)
    specific.roi_heads.mask_head.load_state_dict(agnostic.roi_heads.mask_head.state_dict())
    dataset = Dataset.read(split)
    table, _ = live(specific, dataset, tmp_path / "images")
    pq.write_table(table, tmp_path / "d.parquet")
    for name, model in (("a", agnostic), ("b", specific)):
        adapter = TorchvisionAdapter(model, name, torch.device("cpu"))
        write_masks(MaskRun(adapter, dataset, tmp_path / "images", tmp_path / "d.parquet", tmp_path / f"{name}.json"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert any(m.any() for m in decoded(tmp_path / "a.json"))


def test_an_interrupted_run_goes_on(split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMAGES_PER_PIECE", 2)
    model, dataset = mask_detector(), Dataset.read(split)
    pq.write_table(live(model, dataset, tmp_path / "images")[0], tmp_path / "d.parquet")
    adapter = TorchvisionAdapter(model, "tiny", torch.device("cpu"))

    def run(name: str) -> MaskRun:
        return MaskRun(adapter, dataset, tmp_path / "images", tmp_path / "d.parquet", tmp_path / name)

    write_masks(run("whole.json"))
    seen: list[int] = []
    masks = TorchvisionAdapter._masks

    def counting(self: Any, pixels: Any, boxes: Any, category: Any) -> Any:
        seen.append(len(boxes))
        return masks(self, pixels, boxes, category)

    monkeypatch.setattr(TorchvisionAdapter, "_masks", counting)

    @contextmanager
    def stopping(label: str, *, total: int, unit: str) -> Iterator[Any]:
        class Stop:
            def advance(self, n: int = 1, **metrics: float) -> None:
                if len(seen) == 3:
                    raise KeyboardInterrupt

        yield Stop()

    with pytest.raises(KeyboardInterrupt):
        write_masks(run("a.json"), progress=stopping)
    assert not (tmp_path / "a.json").exists()
    write_masks(run("a.json"))
    assert len(seen) == 3 + 3  # the piece of images 1 and 2 was done
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not list(tmp_path.glob(".*pieces"))


def test_the_command_leads_to_mask_ap(
    calib: Callable[..., Any], split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(f"from {__name__} import agnostic_detector, mask_detector\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    dataset = Dataset.read(split)
    pq.write_table(live(mask_detector(), dataset, tmp_path / "images")[0], tmp_path / "d.parquet")
    wanted = ["--detector", "torchvision:mine:mask_detector", "--annotations", split, "--images", tmp_path / "images"]
    out = tmp_path / "masks.json"
    done = calib("masks", "--detections", tmp_path / "d.parquet", *wanted, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    metrics = json.loads(done.stdout)
    assert metrics["masks"] == len(json.loads(out.read_text())) > 50 and metrics["images"] == 5
    done = calib(
        "evaluate", "--iou-type", "segm", "--annotations", split, "--results", out, "--out", tmp_path / "r", "--json"
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["AP"] >= 0


def test_what_has_no_masks_is_refused(split: Path, tmp_path: Path) -> None:
    dataset = Dataset.read(split)
    row = {"image_id": [1], "category_id": [10], "score": [0.5], "roi_id": [0]}
    row |= {"x1": [1.0], "y1": [1.0], "x2": [9.0], "y2": [9.0]}  # type: ignore[dict-item]
    table = pa.table({n: row[n] for n in DETECTIONS_SCHEMA.names}, schema=DETECTIONS_SCHEMA)
    pq.write_table(table, tmp_path / "d.parquet")

    def run(model: Any, table: Path) -> None:
        adapter = TorchvisionAdapter(model, "tiny", torch.device("cpu"))
        write_masks(MaskRun(adapter, dataset, tmp_path / "images", table, tmp_path / "a.json"))

    with pytest.raises(UnsupportedError, match="tiny has no mask branch"):
        run(tiny_detector(), tmp_path / "d.parquet")
    with pytest.raises(UnsupportedError, match="3 outputs: expected 1, or 5 with background"):
        run(mask_detector(3), tmp_path / "d.parquet")
    fewer = json.loads(split.read_text())
    fewer["categories"].pop()
    (tmp_path / "fewer.json").write_text(json.dumps(fewer | {"annotations": []}))
    adapter = TorchvisionAdapter(mask_detector(), "tiny", torch.device("cpu"))
    paths = (tmp_path / "images", tmp_path / "d.parquet", tmp_path / "a.json")
    with pytest.raises(ShapeError, match=f"{CLASSES} foreground classes"):
        write_masks(MaskRun(adapter, Dataset.read(tmp_path / "fewer.json"), *paths))
    for column, value in (("image_id", 99), ("category_id", 15)):
        strange = table.set_column(
            table.schema.get_field_index(column), DETECTIONS_SCHEMA.field(column), pa.array([value], pa.int64())
        )
        pq.write_table(strange, tmp_path / "strange.parquet")
        with pytest.raises(InputError, match=f"{value} is not in"):
            run(mask_detector(), tmp_path / "strange.parquet")
    place = table.schema.get_field_index("x2")
    turned = table.set_column(place, DETECTIONS_SCHEMA.field("x2"), pa.array([-9.0], pa.float32()))
    pq.write_table(turned, tmp_path / "turned.parquet")
    with pytest.raises(InputError, match="detection 0 has a negative side"):
        run(mask_detector(), tmp_path / "turned.parquet")
    assert not (tmp_path / "a.json").exists()
