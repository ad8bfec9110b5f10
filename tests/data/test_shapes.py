"""The procedural set: true to LVIS format, to the LVIS curve, and to what is painted."""

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calib.data.deal import deal, lvis_curve, shrink_to, train_counts
from calib.data.families import default_families, make_categories
from calib.data.federated import label
from calib.data.plan import ShapesSettings, make_plan
from calib.data.render import Instance, Scene, render
from calib.data.resources import shipped
from calib.data.shapes import build
from calib.errors import ExistsError, InputError, MissingFileError, SettingError

SMALL = ShapesSettings(categories=24, images=40, tune_per_category=3, val_per_category=6)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("shapes") / "set"
    return out, build(out, SMALL)


def _load(folder: Path, split: str) -> dict[str, Any]:
    dataset: dict[str, Any] = json.loads((folder / f"{split}.json").read_bytes())
    return dataset


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def test_same_seed_gives_same_bytes_for_any_number_of_workers(
    small: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    summary = build(tmp_path / "two", SMALL, processes=2)
    assert summary == small[1]
    assert _digest(tmp_path / "two") == _digest(small[0])


def test_another_seed_gives_another_set(small: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    settings = ShapesSettings(seed=1, categories=24, images=40, tune_per_category=1, val_per_category=1)
    build(tmp_path / "other", settings)
    first = "images/train/000001.png"
    assert (tmp_path / "other" / first).read_bytes() != (small[0] / first).read_bytes()


@pytest.mark.parametrize("split", ["train", "tune", "val"])
def test_every_record_has_the_fields_of_lvis_and_its_picture(small: tuple[Path, dict[str, Any]], split: str) -> None:
    folder, summary = small
    dataset = _load(folder, split)
    assert len(dataset["images"]) == summary["images"][split]
    assert len(dataset["annotations"]) == summary["annotations"][split]
    for record in dataset["images"]:
        with Image.open(folder / "images" / record["file_name"]) as picture:
            assert picture.size == (record["width"], record["height"])
            assert picture.mode == "RGB"
    images, categories = {r["id"] for r in dataset["images"]}, {c["id"] for c in dataset["categories"]}
    assert [a["id"] for a in dataset["annotations"]] == list(range(1, len(dataset["annotations"]) + 1))
    for a in dataset["annotations"]:
        x, y, w, h = a["bbox"]
        assert a["image_id"] in images and a["category_id"] in categories
        assert x >= 0 and y >= 0 and x + w <= 144 and y + h <= 144
        assert 20 <= a["area"] <= w * h


def test_the_lvis_package_reads_every_split(small: tuple[Path, dict[str, Any]]) -> None:
    lvis = pytest.importorskip("lvis")
    for split in ("train", "tune", "val"):
        dataset = lvis.LVIS(str(small[0] / f"{split}.json"))
        assert len(dataset.get_cat_ids()) == 24


def test_image_ids_do_not_repeat_over_splits(small: tuple[Path, dict[str, Any]]) -> None:
    ids = [r["id"] for split in ("train", "tune", "val") for r in _load(small[0], split)["images"]]
    assert len(ids) == len(set(ids))


def test_category_counts_are_those_of_train_in_every_split(small: tuple[Path, dict[str, Any]]) -> None:
    train = _load(small[0], "train")
    instances = Counter(a["category_id"] for a in train["annotations"])
    images = Counter(c for _, c in {(a["image_id"], a["category_id"]) for a in train["annotations"]})
    for split in ("train", "tune", "val"):
        for c in _load(small[0], split)["categories"]:
            assert c["instance_count"] == instances[c["id"]] >= 1
            assert c["image_count"] == images[c["id"]]
            n = images[c["id"]]
            assert c["frequency"] == ("r" if n <= 10 else "c" if n <= 100 else "f")


def test_federated_lists_are_disjoint_from_and_within_the_positives(
    small: tuple[Path, dict[str, Any]],
) -> None:
    for split in ("train", "tune", "val"):
        dataset = _load(small[0], split)
        family = {c["id"]: c["family"] for c in dataset["categories"]}
        positive = defaultdict(set)
        for a in dataset["annotations"]:
            positive[a["image_id"]].add(a["category_id"])
        for record in dataset["images"]:
            here, negative = positive[record["id"]], set(record["neg_category_ids"])
            assert not here & negative
            assert set(record["not_exhaustive_category_ids"]) <= here
            shown = {family[c] for c in here}
            siblings = {c for c in family if family[c] in shown} - here
            # a sibling that shows but is too hidden to annotate may be missing
            assert len(siblings - negative) <= 1


def _instance(rank: int, *, is_clear: bool = True) -> Instance:
    return Instance(rank, (0, 0, 10, 10), 60, is_clear)


def test_labels_of_a_hidden_object_claim_nothing_false() -> None:
    categories = make_categories(24, 2, np.random.default_rng(0))
    ids = {c.rank: c.category_id for c in categories}
    picture = (_instance(0), _instance(0, is_clear=False), _instance(3, is_clear=False))
    labels = label(picture, categories, verified=1.0, left_out=0.0, rng=np.random.default_rng(0))
    assert [i.rank for i in labels.kept] == [0]
    assert labels.not_exhaustive == [ids[0]]  # one of its objects has no annotation
    assert set(labels.negative) == set(ids.values()) - {ids[0], ids[3]}  # 3 is there, though hidden


def test_left_out_objects_mark_their_category_and_one_always_stays() -> None:
    categories = make_categories(24, 2, np.random.default_rng(0))
    picture = (_instance(0), _instance(0), _instance(0), _instance(5))
    labels = label(picture, categories, verified=0.0, left_out=1.0, rng=np.random.default_rng(0))
    assert sorted(i.rank for i in labels.kept) == [0, 5]
    assert labels.not_exhaustive == [categories[0].category_id]


def test_boxes_and_areas_are_those_of_the_visible_pixels() -> None:
    """Without noise and decoys, the pixels that differ from the bare background are the object's."""
    looks = [c.look for c in make_categories(60, 60, np.random.default_rng(3))]
    scene = Scene(decoys=0.0, noise=0.0)
    for rank in range(0, 60, 7):
        picture = render([rank], looks, frozenset(), scene, np.random.default_rng([5, rank]))
        bare = render([], looks, frozenset(), scene, np.random.default_rng([5, rank]))
        # the last random number of a picture is its brightness, which the object shifts: compare up to that
        ratio = np.median(picture.pixels / np.maximum(bare.pixels, 1).astype(float))
        differs = np.abs(picture.pixels - ratio * bare.pixels).max(2) > 24
        (instance,) = picture.instances
        x, y, w, h = instance.box
        inside = np.zeros_like(differs)
        inside[y - 1 : y + h + 1, x - 1 : x + w + 1] = True
        assert not differs[~inside].any()
        assert differs.sum() <= 1.25 * instance.area + 20


def test_every_category_has_a_train_annotation_even_where_objects_hide_each_other(tmp_path: Path) -> None:
    crowd = Scene(size_px=68, decoys=60.0)  # nearly everything is painted over
    settings = ShapesSettings(categories=24, images=9, tune_per_category=1, val_per_category=1, scene=crowd, seed=4)
    summary = build(tmp_path / "crowd", settings)
    assert summary["train_instances"]["least"] >= 1
    assert summary["images"]["train"] > 9  # pictures were added for the hidden ones


def test_the_demo_set_follows_the_lvis_curve_and_fills_four_bins() -> None:
    plan = make_plan(ShapesSettings())
    counts = Counter(rank for image in plan.images["train"] for rank in image)
    placed = np.array([counts[rank] for rank in range(192)])
    assert np.histogram(placed, [1, 10, 100, 1000, 10**6])[0].tolist() == [74, 73, 40, 5]
    assert np.array_equal(placed[5:], np.maximum(3, np.round(0.8 * lvis_curve(192)))[5:])
    assert len(plan.images["train"]) == round(placed.sum() / 8)
    for split, n in (("tune", 13), ("val", 25)):
        balanced = Counter(rank for image in plan.images[split] for rank in image)
        assert set(balanced.values()) == {n} and len(balanced) == 192


def test_category_ids_say_nothing_about_frequency() -> None:
    ids = np.array([c.category_id for c in make_plan(ShapesSettings()).categories])
    assert sorted(ids) == list(range(1, 193))
    assert abs(np.corrcoef(ids, np.arange(192))[0, 1]) < 0.2


def test_looks_and_names_are_unique_at_the_largest_size() -> None:
    categories = make_categories(1260, 60, np.random.default_rng(0))
    assert len({c.look for c in categories}) == len({c.name for c in categories}) == 1260


def test_number_of_images_is_exact_and_counts_shrink_to_the_floor() -> None:
    plan = make_plan(ShapesSettings(images=150))
    counts = Counter(rank for image in plan.images["train"] for rank in image)
    assert len(plan.images["train"]) == 150
    assert min(counts.values()) == 3 and len(counts) == 192
    assert abs(sum(counts.values()) - 150 * 8) <= 30


def test_dealing_keeps_every_instance() -> None:
    counts = np.array([50, 20, 3, 1])
    images = deal(counts, counts >= 20, 9, np.random.default_rng(0))
    assert len(images) == 9
    assert Counter(r for image in images for r in image) == {0: 50, 1: 20, 2: 3, 3: 1}


def test_shrinking_to_the_own_total_changes_nothing() -> None:
    counts = train_counts(48, scale=0.8, floor=3, crowded=2, crowd_factor=1.5)
    assert np.array_equal(shrink_to(counts, int(counts.sum()), 3), counts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"categories": 0}, "categories must be at least 1"),
        ({"images": 10}, "10 train images .* cannot hold 192"),
        ({"families": 500}, "families must lie between 1 and 60"),
        ({"categories": 100, "families": 2}, "more than 21 per family"),
        ({"categories": 2000}, "more than 21 per family"),
        ({"verified": 1.5}, "verified must lie in"),
        ({"scale": float("nan")}, "scale must be a number above 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"scene": Scene(size_px=30)}, "image size must be at least 68"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=message):
        build(tmp_path / "out", ShapesSettings(**settings))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_it_is_such_a_set(small: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    tiny = ShapesSettings(categories=2, images=1, tune_per_category=1, val_per_category=1)
    out = tmp_path / "set"
    out.mkdir()
    build(out, tiny)  # an empty folder is no loss
    with pytest.raises(ExistsError, match="exists already"):
        build(out, tiny)
    build(out, tiny, overwrite=True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(ExistsError, match="not a set written by this command"):
        build(tmp_path / "letters", tiny, overwrite=True)
    assert (tmp_path / "letters" / "a.txt").read_text() == "dear"


def test_an_unwritable_place_is_named_and_an_interrupt_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    tiny = ShapesSettings(categories=2, images=1, tune_per_category=1, val_per_category=1)
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        build(tmp_path / "file" / "set", tiny)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calib.data.shapes._complete", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "set", tiny)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_families_default_to_about_twelve_categories() -> None:
    assert [default_families(c) for c in (1, 12, 13, 192, 1203)] == [1, 1, 2, 16, 60]


def test_lvis_metrics_hold_counts_of_both_versions() -> None:
    with np.load(shipped("lvis_counts.npz")) as metrics:
        assert {name: metrics[name].shape for name in metrics.files} == {
            "v0_5_instance_count": (1230,),
            "v0_5_image_count": (1230,),
            "v1_instance_count": (1203,),
            "v1_image_count": (1203,),
        }
        assert int(metrics["v1_instance_count"].sum()) == 1_270_141  # annotations of LVIS v1 train


def test_a_missing_shipped_file_is_named() -> None:
    with pytest.raises(MissingFileError, match=r"'nothing\.npz' not found"):
        shipped("nothing.npz")
