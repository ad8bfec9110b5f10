"""Extraction as a whole: what the rows are, and that they depend on nothing but the request."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from calib.boxes import pairwise_iou
from calib.cache import Cache
from calib.cache.schema import PROPOSAL_BOX, Manifest
from calib.errors import ExistsError, InputError, MissingFileError, SettingError, ShapeError
from calib.extract import proof
from calib.extract.dataset import Dataset
from calib.extract.extraction import extract
from calib.extract.options import Extraction
from calib.extract.torchvision import TorchvisionAdapter

pytest.importorskip("torchvision")

Document = Callable[..., dict[str, Any]]
Read = Callable[[dict[str, Any]], Dataset]
Run = Callable[..., Cache]

SIZES = [(40, 60), (40, 60), (50, 30), (7, 9), (40, 60)]
# Image 3 has none; image 4 is smaller than the smallest anchor; one box is a single row of pixels.
BOXES = [(1, 10, 5, 5, 20, 20), (1, 40, 30, 10, 25, 1), (2, 20, 0, 0, 60, 40), (4, 30, 1, 1, 4, 4), (5, 10, 9, 9, 9, 9)]


@pytest.fixture
def run(adapter: TorchvisionAdapter, document: Document, read: Read, tmp_path: Path) -> Run:
    """``run(name, resume=False, **settings)``: a cache of the five pictures by the tiny detector."""
    dataset = read(document(SIZES, list(BOXES)))

    def make(name: str, resume: bool = False, **settings: Any) -> Cache:
        chosen = replace(Extraction(dtype="float32", images_per_shard=2), **settings)
        extract(adapter, dataset, tmp_path / "images", tmp_path / name, chosen, resume=resume)
        return Cache(tmp_path / name)

    return make


def table(cache: Cache) -> dict[str, Any]:
    names = ("image_id", "roi_id", "label", "max_iou", "gt_id", "is_gt", "objectness", *PROPOSAL_BOX)
    return dict(zip(names, cache.meta(*names), strict=True))


def test_test_mode_keeps_every_proposal_and_labels_it(run: Run) -> None:
    cache = run("c")
    t = table(cache)
    assert cache.n_rows == len(t["label"]) > 100 and not t["is_gt"].any()
    for image, n in zip(cache.images.to_pylist(), np.diff(cache.image_start), strict=True):
        rows = t["image_id"] == image["image_id"]
        assert t["roi_id"][rows].tolist() == list(range(n)) and n <= 30
    assert set(t["label"].tolist()) <= {0, 1, 2, 3, 4}
    without = t["image_id"] == 3
    assert (t["label"][without] == 4).all() and (t["gt_id"][without] == -1).all()
    assert (t["max_iou"][without] == 0).all()


def test_labels_are_those_of_the_original_pictures(run: Run) -> None:
    """IoU computed the other way round: proposals brought back to the original pixels."""
    cache = run("c")
    t = table(cache)
    for image in cache.images.to_pylist():
        rows = t["image_id"] == image["image_id"]
        ratio = np.asarray([image["net_width"] / image["width"], image["net_height"] / image["height"]] * 2)
        proposals = np.stack([t[n][rows] for n in PROPOSAL_BOX], 1) / ratio
        objects = np.asarray([b[2:] for b in BOXES if b[0] == image["image_id"]], np.float64).reshape(-1, 4)
        objects[:, 2:] += objects[:, :2]
        iou = pairwise_iou(proposals, objects).max(axis=1, initial=0)
        assert t["max_iou"][rows] == pytest.approx(iou, abs=1e-5)
    assert t["max_iou"].max() > 0.1 and ((t["gt_id"] == -1) == (t["max_iou"] == 0)).all()


def test_train_mode_appends_ground_truth_and_samples(run: Run) -> None:
    cache = run("c", mode="train")
    t = table(cache)
    assert np.bincount(t["image_id"], minlength=6).max() <= 24  # rows_per_image of the detector
    gt = np.flatnonzero(t["is_gt"])
    assert {(int(t["gt_id"][r]), int(t["label"][r])) for r in gt} == {(1, 0), (2, 3), (3, 1), (4, 2), (5, 0)}
    assert t["max_iou"][gt] == pytest.approx(1) and (t["objectness"][gt] == 1).all()
    for r in gt:  # the appended box is the object's, in network pixels
        image = cache.images.to_pylist()[t["image_id"][r] - 1]
        x, y, w, h = BOXES[t["gt_id"][r] - 1][2:]
        ratio = np.asarray([image["net_width"] / image["width"], image["net_height"] / image["height"]] * 2)
        assert [t[n][r] for n in PROPOSAL_BOX] == pytest.approx(np.asarray([x, y, x + w, y + h]) * ratio, rel=1e-6)
    for image in range(1, 6):
        labels = t["label"][t["image_id"] == image]
        n = int((labels < 4).sum())
        assert n <= 6 and (labels[:n] < 4).all() and (np.diff(labels[:n]) >= 0).all() and (labels[n:] == 4).all()


def test_features_of_sampled_proposals_are_the_detectors(run: Run, detector: Any, draw: Callable[..., Any]) -> None:
    """Row by row: RoI pooling and the box head, called by hand on the proposals of the cache."""
    cache = run("c", mode="train", batch_size=1)
    boxes = torch.from_numpy(np.stack(cache.meta(*PROPOSAL_BOX), 1))
    for i, (height, width) in enumerate(SIZES):
        rows = slice(*cache.image_start[i : i + 2].tolist())
        pixels = torch.from_numpy(draw(height, width, i)).permute(2, 0, 1).float() / 255
        with torch.no_grad():
            images, _ = detector.transform([pixels])
            maps = {"0": detector.backbone(images.tensors)}
            pooled = detector.roi_heads.box_roi_pool(maps, [boxes[rows]], images.image_sizes)
            expected = detector.roi_heads.box_head(pooled).numpy()
        assert np.array_equal(cache.features.read(rows.start, rows.stop), expected)


def test_the_same_request_gives_the_same_bytes_and_another_seed_other_rows(
    run: Run, content: Callable[[Path], dict[str, bytes]]
) -> None:
    first, again, other = run("a", mode="train"), run("b", mode="train"), run("c", mode="train", seed=1)
    for cache in (first, again, other):
        (cache.path / ".verified.json").unlink()  # holds times
    assert content(first.path) == content(again.path)
    assert first.digest != other.digest


def test_rows_do_not_depend_on_shards(run: Run) -> None:
    one, two = run("a", images_per_shard=256), run("b", images_per_shard=1)
    assert len(one.manifest.shards) == 1 and len(two.manifest.shards) == 5
    # Images that shared a batch differ in the last bits from images alone.
    assert np.allclose(one.features.read(0, one.n_rows), two.features.read(0, two.n_rows), atol=1e-5)
    assert np.array_equal(one.meta("roi_id")[0], two.meta("roi_id")[0])


def test_unlike_sizes_never_share_a_batch(adapter: TorchvisionAdapter, document: Document, read: Read) -> None:
    from calib.extract.plan import plan

    dataset = read(document(SIZES))
    records = dataset.images
    assert [[r["id"] for r in b] for b in plan(records, 8)] == [[1, 2], [3], [4], [5]]
    assert [[r["id"] for r in b] for b in plan(records, 1)] == [[1], [2], [3], [4], [5]]
    unknown = [{k: v for k, v in r.items() if k != "height"} for r in records]
    assert [[r["id"] for r in b] for b in plan(unknown, 8)] == [[1], [2], [3], [4], [5]]


@pytest.mark.parametrize("size", [(3, 6000), (6000, 3)])
def test_a_picture_that_vanishes_when_resized_is_named(
    adapter: TorchvisionAdapter, document: Document, read: Read, tmp_path: Path, size: tuple[int, int]
) -> None:
    dataset = read(document([(40, 60), size]))
    with pytest.raises(InputError, match=rf"image 2 is {size[0]} x {size[1]}: one side vanishes"):
        extract(adapter, dataset, tmp_path / "images", tmp_path / "cache", Extraction())


def test_negative_image_ids_are_ids(
    adapter: TorchvisionAdapter, document: Document, read: Read, tmp_path: Path
) -> None:
    data = document([(40, 60)], [(1, 10, 5, 5, 20, 20)])
    data["images"][0]["id"] = data["annotations"][0]["image_id"] = -5
    extract(adapter, read(data), tmp_path / "images", tmp_path / "cache", Extraction(mode="train"))
    assert set(Cache(tmp_path / "cache").meta("image_id")[0].tolist()) == {-5}


def test_a_wrong_folder_of_pictures_is_noticed_before_a_cache_is_begun(
    adapter: TorchvisionAdapter, document: Document, read: Read, tmp_path: Path
) -> None:
    with pytest.raises(MissingFileError, match="image 1 not found"):
        extract(adapter, read(document([(40, 60)])), tmp_path / "elsewhere", tmp_path / "cache", Extraction())
    assert not (tmp_path / "cache").exists()


def test_sizes_that_the_json_does_not_tell_are_the_pictures_own(
    run: Run, adapter: TorchvisionAdapter, document: Document, read: Read, tmp_path: Path
) -> None:
    data = document(SIZES, list(BOXES))
    for r in data["images"]:
        del r["height"], r["width"]
    extract(adapter, read(data), tmp_path / "images", tmp_path / "b", Extraction(dtype="float32", images_per_shard=2))
    told, untold = run("a", batch_size=1), Cache(tmp_path / "b")
    assert untold.images["height"].to_pylist() == [h for h, _ in SIZES]
    assert told.digest == untold.digest


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_float16_is_float32_rounded(run: Run, dtype: str) -> None:
    exact, cache = run("a"), run("b", dtype=dtype)
    x = exact.features.read(0, exact.n_rows)
    assert cache.features.dtype == dtype
    assert np.array_equal(cache.features.read(0, cache.n_rows), x.astype(dtype).astype(np.float32))


def test_logits_can_be_left_out(run: Run) -> None:
    full, probe, none = run("a"), run("b", logits="probe", dtype="float16"), run("c", logits="none")
    assert full.logits is not None and probe.logits is None and none.logits is None
    first = pq.read_table(probe.path / "shards/00000/logits.parquet")["logits"].to_pylist()
    assert len(first) == 16
    assert b"".join(first) == full.logits.read(0, 16).tobytes()  # float32, also in a float16 cache


def test_resuming_a_finished_cache_touches_nothing(run: Run, tmp_path: Path) -> None:
    cache = run("c")
    before = {p: p.stat().st_mtime_ns for p in sorted(cache.path.rglob("*"))}
    assert run("c", resume=True).digest == cache.digest
    assert {p: p.stat().st_mtime_ns for p in sorted(cache.path.rglob("*")) if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }


def test_a_finished_cache_is_not_overwritten(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("c")
    monkeypatch.delattr(proof, "prove")  # it is refused before the detector runs
    with pytest.raises(ExistsError, match="holds a cache already"):
        run("c")


def test_a_run_that_failed_goes_on_where_it_stopped(run: Run, tmp_path: Path) -> None:
    whole = run("whole")
    picture = tmp_path / "images" / "4.png"
    hidden = picture.rename(tmp_path / "4.png")
    with pytest.raises(MissingFileError, match=r"4\.png"):
        run("c", check_images=1)  # the check does not reach so far
    assert [s.name for s in Manifest.read(tmp_path / "c").shards] == ["00000"]
    hidden.rename(picture)
    assert run("c", resume=True).digest == whole.digest


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"mode": "train"}, "mode"), ({"batch_size": 3}, "batch_size"), ({"images_per_shard": 3}, "images_per_shard")],
)
def test_resuming_with_other_settings_is_refused(run: Run, changes: dict[str, Any], named: str) -> None:
    run("c")
    with pytest.raises(InputError, match=rf"other settings \({named}\)"):
        run("c", resume=True, **changes)


def test_resuming_with_other_annotations_is_refused(
    run: Run, adapter: TorchvisionAdapter, document: Document, read: Read, tmp_path: Path
) -> None:
    run("c")
    data = document(SIZES, list(BOXES))
    data["annotations"][0]["bbox"][0] += 1
    with pytest.raises(InputError, match=r"other settings \(annotations_xxh3\)"):
        extract(
            adapter,
            read(data),
            tmp_path / "images",
            tmp_path / "c",
            Extraction(dtype="float32", images_per_shard=2),
            resume=True,
        )


def test_what_does_not_fit_is_refused_before_anything_is_written(
    adapter: TorchvisionAdapter, document: Document, read: Read, tmp_path: Path
) -> None:
    data = document([(40, 60)])
    with pytest.raises(InputError, match="no annotations to label proposals with") as e:
        extract(adapter, read(data), tmp_path / "images", tmp_path / "c", Extraction("train"))
    assert "--mode test" in e.value.hint
    data["categories"] = data["categories"][:3]
    with pytest.raises(ShapeError, match=r"has 4 foreground classes, .*a\.json lists 3 categories"):
        extract(adapter, read(data), tmp_path / "images", tmp_path / "c", Extraction())
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"mode": "val"}, {"dtype": "bfloat16"}, {"logits": "some"}, {"batch_size": 0}, {"images_per_shard": -1}],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        replace(Extraction(), **wrong)


def test_ground_truth_of_the_split_is_in_the_cache(run: Run) -> None:
    annotations = run("c").annotations().to_pylist()
    assert [a["category_id"] for a in annotations] == [10, 40, 20, 30, 10]
    assert annotations[1] | {"area": 25.0, "y2": 11.0, "x2": 55.0} == annotations[1]
    assert json.dumps(annotations)  # plain numbers
