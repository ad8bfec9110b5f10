"""``calib data tile``: pixels, boxes and masks in their places; of a tile is known what its page says, and no more."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from calib.annotations import Annotations
from calib.cache import Categories
from calib.errors import (
    CalibError,
    ExistsError,
    FormatError,
    InputError,
    MissingFileError,
    SettingError,
)
from calib.tiles.cut import MARK, CutSet, cut_file
from calib.tiles.grid import Tiling, starts

from .conftest import COLOURS, as_coco

Pages = Callable[..., Path]
Document = dict[str, Any]
TILING = Tiling(40, 10)
# A whole one, one across a border, one that is nearly all in the next tile; categories 3, 5, 8.
BOXES = [(3, 4, 5, 12, 9), (3, 33, 50, 20, 20), (5, 66, 2, 20, 10), (8, 90, 70, 9, 9)]


def cut(source: Path, tiling: Tiling = TILING, **options: Any) -> tuple[CutSet, Document]:
    """Cut into a folder beside the source."""
    found = cut_file(source, source.parent / "pictures", source.parent / "tiles", tiling, **options)
    return found, json.loads(found.path.read_bytes())


def pixels_of(tile: Document, source: Path) -> Any:
    path = source.parent / "tiles" / "images" / tile["file_name"]
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.array(picture.convert("RGB"))


@given(st.integers(1, 500), st.integers(1, 200), st.integers(0, 199))
@settings(deadline=None)
def test_tiles_cover_a_side_and_share_what_is_asked_for(length: int, size: int, overlap: int) -> None:
    found = starts(length, size, overlap % size)
    assert found[0] == 0 and found[-1] == max(0, length - size)
    for before, after in pairwise(found):
        assert before < after <= before + size - overlap % size


def test_tiles_show_the_pixels_of_their_place(pages: Pages) -> None:
    source = pages([BOXES, [], BOXES[:1]])
    found, document = cut(source)
    seen = {100: np.zeros((100, 130), int), 99: np.zeros((100, 130), int), 98: np.zeros((100, 130), int)}
    for tile in document["images"]:
        with Image.open(source.parent / "pictures" / tile["page_file_name"]) as picture:
            page = np.array(picture)
        x, y = tile["tile_x"], tile["tile_y"]
        assert np.array_equal(pixels_of(tile, source), page[y : y + 40, x : x + 40])
        assert (tile["height"], tile["width"]) == (40, 40)
        assert (tile["page_height"], tile["page_width"], tile["tile_scale_x"], tile["tile_scale_y"]) == (100, 130, 1, 1)
        seen[tile["page_id"]][y : y + 40, x : x + 40] += 1
    assert all(count.min() >= 1 for count in seen.values())
    assert found.counts.tiles == len(document["images"]) == 3 * 3 * 4
    assert [tile["id"] for tile in document["images"]] == list(range(1, 37))
    assert [tile["page_id"] for tile in document["images"]] == sorted(tile["page_id"] for tile in document["images"])


def test_boxes_are_where_the_picture_shows_their_objects(pages: Pages) -> None:
    source = pages([BOXES, BOXES])
    found, document = cut(source)
    tiles = {tile["id"]: tile for tile in document["images"]}
    rows = {a["id"]: a for a in json.loads(source.read_bytes())["annotations"]}
    for a in document["annotations"]:
        x, y, width, height = (int(v) for v in a["bbox"])
        shown = pixels_of(tiles[a["image_id"]], source)
        assert (shown[y : y + height, x : x + width] == COLOURS[a["category_id"]]).all()
        assert (shown == COLOURS[a["category_id"]]).all(axis=-1).sum() == width * height == a["area"]
        page = rows[a["page_annotation_id"]]
        assert width * height >= 0.5 * page["area"] and a["mine"] == page["mine"]
    assert found.counts.kept == len(document["annotations"]) and found.counts.lost == 0
    assert 0 < found.counts.cut < found.counts.kept and found.counts.left_out > 0
    assert [a["id"] for a in document["annotations"]] == list(range(1, found.counts.kept + 1))
    assert not Annotations.read(found.path).notices


def test_a_share_is_of_the_area_and_a_side_is_of_what_is_shown(pages: Pages) -> None:
    source = pages([[(3, 35, 0, 20, 10)]], size=(40, 80))  # 5 columns are in the first tile, 15 in the second
    kept = {}
    for share in (0.25, 0.26, 0.75, 0.76):
        found, document = cut(source, Tiling(40, min_visible=share), overwrite=True)
        kept[share] = [a["bbox"] for a in document["annotations"]]
        assert found.counts.lost == (0 if kept[share] else 1)
    both = [[35, 0, 5, 10], [0, 0, 15, 10]]
    assert kept == {0.25: both, 0.26: both[1:], 0.75: both[1:], 0.76: []}
    for side, number in ((5, 2), (5.1, 1), (10, 1), (10.1, 0)):
        found, document = cut(source, Tiling(40, min_visible=0.1, min_side=side), overwrite=True)
        assert len(document["annotations"]) == number


def test_of_a_tile_is_known_what_the_page_says(pages: Pages) -> None:
    """Category 3 is cut by the border of two tiles, 5 is in the second alone, 8 is not exhaustive, 9 is absent."""
    source = pages([[(3, 38, 0, 10, 10), (5, 60, 20, 5, 5), (8, 45, 30, 5, 5)]], size=(40, 80))
    _, document = cut(source, Tiling(40))
    first, second = document["images"]
    assert (first["neg_category_ids"], first["not_exhaustive_category_ids"]) == ([5, 9], [3, 8])
    assert (second["neg_category_ids"], second["not_exhaustive_category_ids"]) == ([9], [8])
    _, document = cut(pages([[(5, 60, 20, 5, 5)], [(3, 0, 0, 2, 2)]], change=as_coco), Tiling(40), overwrite=True)
    assert not any("neg_category_ids" in tile for tile in document["images"])


def test_fields_of_the_page_stay_and_those_that_would_be_wrong_go(pages: Pages) -> None:
    def change(document: Document) -> None:
        document["images"][0] |= {"coco_url": "http://x/p0.png", "license": 4}
        document["annotations"][0] |= {"keypoints": [1, 2, 2], "num_keypoints": 1, "iscrowd": 0}
        document["captions"] = [{"image_id": 100, "text": "a page"}]
        document["licenses"] = [{"id": 4}]
        document["info"] = {"year": 2020}

    found, document = cut(pages([BOXES], change=change))
    assert {tile["license"] for tile in document["images"]} == {4} and document["licenses"] == [{"id": 4}]
    assert {tile["scene"] for tile in document["images"]} == {0}
    assert not any("coco_url" in tile for tile in document["images"])
    assert not any("keypoints" in a or "num_keypoints" in a for a in document["annotations"])
    assert "captions" not in document and any("captions" in notice for notice in found.notices)
    assert document["info"]["year"] == 2020 and document["info"]["calib_tiles"]["size"] == 40


def test_crowds_and_ignored_objects_are_kept_however_little_is_shown(pages: Pages) -> None:
    def change(document: Document) -> None:
        document["annotations"][0]["iscrowd"] = 1
        document["annotations"][1]["ignore"] = True

    boxes = [(3, 38, 0, 30, 10), (5, 38, 10, 30, 10), (8, 38, 20, 30, 10)]
    _, document = cut(pages([boxes], size=(40, 80), change=change), Tiling(40))
    first = [a for a in document["annotations"] if a["image_id"] == 1]
    assert [(a["category_id"], a["bbox"], a["area"]) for a in first] == [
        (3, [38, 0, 2, 10], 20),
        (5, [38, 10, 2, 10], 20),
    ]


def test_empty_boxes_are_in_one_tile(pages: Pages) -> None:
    def change(document: Document) -> None:
        document["annotations"][0]["bbox"] = [40, 7, 0, 5]

    found, document = cut(pages([[(3, 40, 7, 1, 5)]], size=(40, 80), change=change), Tiling(40))
    assert [(a["image_id"], a["bbox"]) for a in document["annotations"]] == [(2, [0, 7, 0, 5])]
    assert (found.counts.cut, found.counts.lost) == (0, 0)


def triangle(x: float, y: float) -> list[float]:
    return [x, y, x + 21.5, y + 2.25, x + 3.5, y + 17]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools' decode
def test_masks_are_those_of_the_page(pages: Pages) -> None:
    """Whole polygons move, what is cut and run lengths become the page's pixels: compared on every tile."""
    polygons = {0: [triangle(4, 5)], 1: [triangle(33, 50), triangle(40, 60)], 2: [triangle(60, 2)]}
    code = coco_mask.encode(np.asfortranarray(np.random.default_rng(0).random((100, 130)) < 0.5, np.uint8))

    def change(document: Document) -> None:
        for k, polygon in polygons.items():
            xy = np.array([v for part in polygon for v in part]).reshape(-1, 2)
            low, high = xy.min(axis=0), xy.max(axis=0)
            document["annotations"][k] |= {"segmentation": polygon, "bbox": [*low, *(high - low)]}
        crowd = {"size": [100, 130], "counts": code["counts"].decode()}
        document["annotations"][3] |= {"segmentation": crowd, "bbox": [0, 0, 130, 100], "iscrowd": 1}

    source = pages([BOXES], change=change)
    found, document = cut(source)
    whole = {k: coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(p, 100, 130))) for k, p in polygons.items()}
    whole[3] = coco_mask.decode(code)
    tiles = {tile["id"]: tile for tile in document["images"]}
    forms = set()
    for a in document["annotations"]:
        x, y = (tiles[a["image_id"]][key] for key in ("tile_x", "tile_y"))
        expected = whole[a["mine"]][y : y + 40, x : x + 40]
        segmentation = a["segmentation"]
        if isinstance(segmentation, list):
            shown = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, 40, 40)))
        else:
            shown = coco_mask.decode(segmentation)
            assert a["area"] == expected.sum()
        assert np.array_equal(shown, expected)
        forms.add(type(segmentation))
    assert forms == {list, dict} and found.counts.masks_dropped == 0

    found, document = cut(source, Tiling(25, 5, scale=0.5), overwrite=True)
    with_mask = [a for a in document["annotations"] if "segmentation" in a]
    assert {a["mine"] for a in with_mask} <= {0, 1, 2} and len(with_mask) >= 2
    assert found.counts.masks_dropped == len(document["annotations"]) - len(with_mask) > 0
    first = next(a for a in with_mask if a["mine"] == 0 and a["image_id"] == 1)
    assert first["segmentation"] == [[v / 2 for v in polygons[0][0]]]


@pytest.mark.parametrize("segmentation", [[["a", 1, 2, 3, 4, 5]], [[1, 2, 3]], 7])
def test_a_malformed_mask_is_named(pages: Pages, segmentation: Any) -> None:
    source = pages([BOXES], change=lambda d: d["annotations"][0].update(segmentation=segmentation))
    with pytest.raises(FormatError, match="segmentation"):
        cut(source)
    assert not list((source.parent / "tiles").rglob("*.json"))


def test_pages_are_scaled_before_they_are_cut(pages: Pages) -> None:
    source = pages([BOXES], size=(100, 131))  # 131 halved is rounded to 66, whose scale is not 0.5
    _, document = cut(source, Tiling(50, scale=0.5))
    tile = document["images"][0]
    assert len(document["images"]) == 2 and (tile["tile_scale_y"], tile["tile_scale_x"]) == (0.5, 66 / 131)
    with Image.open(source.parent / "pictures" / "p0.png") as picture:
        page = np.array(picture.resize((66, 50), Image.Resampling.BOX))
    assert np.array_equal(pixels_of(tile, source), page[:, :50])
    box = next(a["bbox"] for a in document["annotations"] if a["mine"] == 0)
    assert box == pytest.approx([4 * 66 / 131, 2.5, 12 * 66 / 131, 4.5], rel=1e-12)


def test_small_pages_are_filled_up_and_grey_ones_stay_grey(pages: Pages) -> None:
    source = pages([[(3, 0, 0, 4, 4)]], size=(20, 30))
    path = source.parent / "pictures" / "p0.png"
    with Image.open(path) as picture:
        picture.convert("L").save(path)
    found, document = cut(source, Tiling(40, fill=77))
    (tile,) = document["images"]
    shown = pixels_of(tile, source)
    assert shown.shape == (40, 40, 3) and (shown[20:] == 77).all() and (shown[:, 30:] == 77).all()
    with Image.open(path) as page, Image.open(found.path.parent / "images" / tile["file_name"]) as picture:
        assert picture.mode == "L" and np.array_equal(np.array(picture)[:20, :30], np.array(page))


def test_tiles_without_objects_are_drawn_by_the_seed(pages: Pages) -> None:
    source = pages([BOXES[:1]] * 8)
    numbers = {}
    for share in (0.0, 0.5, 1.0):
        found, document = cut(source, Tiling(20, empty=share), overwrite=True)
        filled = {a["image_id"] for a in document["annotations"]}
        numbers[share] = len(document["images"]) - len(filled)
        assert found.counts.empty == numbers[share] + found.counts.empty_dropped
    assert numbers[0.0] == 0 and numbers[0.5] == pytest.approx(0.5 * numbers[1.0], rel=0.25)
    drawn = [
        {
            (t["page_id"], t["tile_x"], t["tile_y"])
            for t in cut(source, Tiling(20, empty=0.5, seed=s), overwrite=True)[1]["images"]
        }
        for s in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_counts_are_those_of_the_file_or_of_the_tiles(pages: Pages) -> None:
    source = pages([BOXES, BOXES])
    _, document = cut(source)
    assert document["categories"] == json.loads(source.read_bytes())["categories"]
    found, document = cut(source, recount=True, overwrite=True)
    objects = [a["category_id"] for a in document["annotations"]]
    images = {(a["category_id"], a["image_id"]) for a in document["annotations"]}
    for record in document["categories"]:
        assert record["instance_count"] == objects.count(record["id"])
        assert record["image_count"] == sum(c == record["id"] for c, _ in images)
        assert record["frequency"] == ("r" if record["image_count"] <= 10 else "c")
    counted = Categories.of(Annotations.read(found.path))
    assert counted.instance_count.sum() == len(objects)


def test_threads_do_not_change_what_is_written(pages: Pages, content: Callable[[Path], dict[str, bytes]]) -> None:
    source = pages([BOXES, [], BOXES[1:], BOXES[:2], BOXES[2:]])
    sets = []
    for threads in (1, 4):
        cut(source, Tiling(40, 10, empty=0.3), threads=threads, overwrite=True)
        sets.append(content(source.parent / "tiles"))
    assert sets[0] == sets[1] and len(sets[0]) > 10
    assert [name for name in sets[0] if name.startswith(".")] == []


def test_images_that_nobody_annotated_are_cut_too(pages: Pages) -> None:
    found, document = cut(pages([BOXES], change=lambda d: d.pop("annotations")))
    assert "annotations" not in document and found.counts.tiles == len(document["images"]) == 12
    assert Annotations.read(found.path).style == "none"


def test_nothing_is_left_of_what_failed(pages: Pages) -> None:
    source = pages([BOXES, BOXES])
    missing = source.parent / "pictures" / "p1.png"
    missing.unlink()
    with pytest.raises(MissingFileError, match=r"p1\.png"):
        cut(source)
    assert not [p for p in (source.parent / "tiles").rglob("*") if p.is_file() and p.suffix in (".png", ".json")]
    missing.write_bytes(b"no picture")
    with pytest.raises(FormatError, match=r"p1\.png"):
        cut(source)
    assert not [p for p in (source.parent / "tiles").rglob("*") if p.is_file() and p.suffix in (".png", ".json")]


def test_what_a_killed_process_left_is_replaced(pages: Pages) -> None:
    """Killed while pictures were written, and killed before the json was."""
    source = pages([BOXES])
    _, expected = cut(source)
    tiles = source.parent / "tiles"
    shutil.copytree(tiles / "images" / "pages", tiles / "images" / ".pages.tmp")
    (tiles / "images" / ".pages.tmp" / "old.png").write_bytes(b"")
    (tiles / "pages.json").unlink()
    assert cut(source)[1] == expected
    assert not (tiles / "images" / ".pages.tmp").exists() and not list(tiles.rglob("old.png"))


def test_what_is_there_is_replaced_only_on_request_and_only_if_it_is_tiles(pages: Pages) -> None:
    source = pages([BOXES])
    cut(source)
    with pytest.raises(ExistsError):
        cut(source)
    _, document = cut(source, Tiling(60), overwrite=True)
    folder = source.parent / "tiles" / "images" / "pages"
    assert {p.name for p in folder.iterdir()} == {Path(t["file_name"]).name for t in document["images"]} | {MARK}
    (folder / MARK).unlink()
    with pytest.raises(ExistsError, match="no tiles"):
        cut(source, overwrite=True)
    with pytest.raises(SettingError):
        cut_file(source, source.parent / "pictures", source.parent, TILING, overwrite=True)
    assert json.loads(source.read_bytes())["images"]


def test_tiles_are_not_cut_again(pages: Pages) -> None:
    source = pages([BOXES])
    found, _ = cut(source)
    with pytest.raises(InputError, match="a tile already"):
        cut_file(found.path, found.path.parent / "images", source.parent / "more", TILING)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"size": 40, "overlap": 40},
        {"size": 40, "overlap": -1},
        {"size": 40, "scale": 0},
        {"size": 40, "scale": float("nan")},
        {"size": 40, "scale": 17},
        {"size": 40, "min_visible": 0},
        {"size": 40, "min_visible": 1.1},
        {"size": 40, "empty": 1.1},
        {"size": 40, "fill": 256},
        {"size": 40, "seed": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        Tiling(**wrong)
    assert issubclass(SettingError, CalibError)


def test_the_command_tells_counts_and_errors(
    pages: Pages, calib: Callable[..., Any], fails: Callable[..., str]
) -> None:
    source = pages([BOXES, BOXES])
    home = source.parent
    options = ["--images", home / "pictures", "--size", 40, "--out", home / "out"]
    done = calib("data", "tile", source, *options, "--overlap", 10, "--name", "mine", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["annotations"] == str(home / "out" / "mine.json") and told["pages"] == 2
    assert len(list((home / "out" / "images" / "mine").glob("*.png"))) == told["tiles"]
    assert "overlap" in fails("data", "tile", source, *options, "--overlap", 50)
    assert "--images" in fails("data", "tile", source, "--images", home / "none", "--size", 40, "--out", home / "out")
    assert "no name" in fails("data", "tile", source, *options, "--name", "a/b")
    (home / "text.json").write_text("{")
    assert "not valid JSON" in fails("data", "tile", home / "text.json", *options)


def test_pages_stay_together_where_tiles_are_divided(pages: Pages, calib: Callable[..., Any]) -> None:
    source = pages([BOXES] * 6)
    found, _ = cut(source)
    into = ["--into", "tune=0.5,test=0.5", "--group-by", "page_id", "--out", source.parent / "split"]
    assert calib("data", "split", found.path, *into).exit_code == 0
    parts = [json.loads((source.parent / "split" / f"{n}.json").read_bytes()) for n in ("tune", "test")]
    own = [{tile["page_id"] for tile in part["images"]} for part in parts]
    assert len(own[0]) == len(own[1]) == 3 and not own[0] & own[1]
