"""One set of rules for annotation files, whichever command reads them; and judging by a cache as by its file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calib.annotations import Annotations
from calib.data.coco_lt import Profile, build
from calib.documents import flags
from calib.errors import CalibError, FormatError
from calib.evaluate import Detections, GroundTruth
from calib.extract.dataset import Dataset

Document = dict[str, Any]
NAN = float("nan")


def coco(images: int = 3, **more: Any) -> Document:
    """A COCO json of pictures of 100 x 100 pixels, an object in each."""
    return {
        "images": [{"id": i + 1, "file_name": f"{i}.jpg", "height": 100, "width": 100} for i in range(images)],
        "categories": [{"id": 3, "name": "a"}, {"id": 1, "name": "b"}],
        "annotations": [
            {"id": i + 1, "image_id": i + 1, "category_id": 1 + 2 * (i % 2), "bbox": [10, 10, 30, 30], "area": 900}
            for i in range(images)
        ],
    } | more


def changed(rows: str, key: str, value: Any, row: int = 0) -> Document:
    document = coco()
    document[rows][row][key] = value
    return document


def read_by_all(document: Document, folder: Path) -> list[type[CalibError] | None]:
    """What every reader of the file makes of it."""
    path = folder / "a.json"
    path.write_text(json.dumps(document))
    readers: list[Callable[[], Any]] = [
        lambda: Annotations.read(path),
        lambda: Dataset.read(path),  # extract, import, masks, report
        lambda: Dataset.read(path, counts_from=path),
        lambda: GroundTruth.read(path, style="coco"),  # evaluate
        lambda: build(path, folder / "lt.json", Profile(), overwrite=True),  # data coco-lt
    ]
    found: list[type[CalibError] | None] = []
    for reader in readers:
        try:
            reader()
            found.append(None)
        except CalibError as e:
            found.append(type(e))
    return found


@pytest.mark.parametrize("key", ["iscrowd", "ignore"])
@pytest.mark.parametrize("value", [False, 0, 0.0, None, True, 1, 1.0])
def test_a_flag_is_yes_or_no(key: str, value: Any, tmp_path: Path) -> None:
    document = changed("annotations", key, value)
    assert read_by_all(document, tmp_path) == [None] * 5
    assert flags(document["annotations"], key, "a").tolist() == [value in (True, 1), False, False]


@pytest.mark.parametrize("key", ["iscrowd", "ignore"])
@pytest.mark.parametrize("value", ["0", "false", "", NAN, 2, -1, 0.5, [], [0], {}])
def test_what_is_no_flag_is_refused_by_all(key: str, value: Any, tmp_path: Path) -> None:
    assert read_by_all(changed("annotations", key, value), tmp_path) == [FormatError] * 5


IDS = [("images", "id"), ("categories", "id"), ("annotations", "id")]
REFERENCES = [("annotations", "image_id"), ("annotations", "category_id")]


@pytest.mark.parametrize(("rows", "key"), IDS + REFERENCES + [("images", "height"), ("images", "width")])
def test_whole_floats_are_whole_numbers_everywhere(rows: str, key: str, tmp_path: Path) -> None:
    document = coco()
    for row in document[rows]:
        row[key] = float(row[key])
    assert read_by_all(document, tmp_path) == [None] * 5
    (tmp_path / "b.json").write_text(json.dumps(coco()))
    assert Dataset.read(tmp_path / "a.json").digest() == Dataset.read(tmp_path / "b.json").digest()


@pytest.mark.parametrize(("rows", "key"), IDS + REFERENCES)
@pytest.mark.parametrize("value", ["3", True, 1e20, 2**63, 3.5, NAN, None, [3], float("inf")])
def test_ids_that_are_none_are_refused_by_all(rows: str, key: str, value: Any, tmp_path: Path) -> None:
    assert read_by_all(changed(rows, key, value), tmp_path) == [FormatError] * 5


@pytest.mark.parametrize("lists", [[3.0], [3]])
def test_lists_of_categories_take_whole_floats(lists: list[Any], tmp_path: Path) -> None:
    document = coco()
    for row in document["images"]:
        row |= {"neg_category_ids": lists, "not_exhaustive_category_ids": []}
    assert read_by_all(document, tmp_path) == [None] * 5
    assert Dataset.read(tmp_path / "a.json").images[0]["neg_category_ids"] == [3]
    assert Annotations.read(tmp_path / "a.json").style == "lvis"


BAD_TEXT = ["cat \ud83d", "caf\udce9.jpg", 3.5, ["a"], True]


@pytest.mark.parametrize("value", BAD_TEXT)
@pytest.mark.parametrize(
    ("rows", "key"), [("categories", "name"), ("images", "file_name"), ("images", "coco_url"), ("images", "flickr_url")]
)
def test_text_that_no_file_can_hold_is_refused_by_all(rows: str, key: str, value: Any, tmp_path: Path) -> None:
    assert read_by_all(changed(rows, key, value), tmp_path) == [FormatError] * 5


@pytest.mark.parametrize("rows", ["categories", "annotations", "images"])
def test_text_that_nobody_reads_hinders_nobody(rows: str, tmp_path: Path) -> None:
    """Only the command that writes the document again has to refuse it."""
    assert read_by_all(changed(rows, "synonyms", ["\ud83d"]), tmp_path) == [None] * 4 + [FormatError]


@pytest.mark.parametrize("name", ["\u732b [bold]", "", 5, None])
def test_names_that_are_taken(name: Any, tmp_path: Path) -> None:
    assert read_by_all(changed("categories", "name", name), tmp_path) == [None] * 5
    names = Annotations.read(tmp_path / "a.json").categories.name
    assert names == ("b", "3" if name is None else str(name))


def test_frequency_is_a_letter_for_all(tmp_path: Path) -> None:
    for word, expected in (("r", None), ("rare", FormatError), (1, FormatError), ([], FormatError)):
        document = coco()
        for row in document["categories"]:
            row["frequency"] = word
        assert read_by_all(document, tmp_path) == [expected] * 5
    assert read_by_all(changed("categories", "frequency", "r"), tmp_path) == [FormatError] * 5  # of one only


def test_an_area_that_is_missing_is_that_of_the_box_and_said(tmp_path: Path) -> None:
    for value in ("absent", None):
        document = changed("annotations", "area", value)
        if value == "absent":
            del document["annotations"][0]["area"]
        assert read_by_all(document, tmp_path) == [None] * 5
        dataset, truth = Dataset.read(tmp_path / "a.json"), GroundTruth.read(tmp_path / "a.json", style="coco")
        assert dataset.annotations["area"].tolist() == truth.area.tolist() == [900, 900, 900]
        assert len(dataset.notices) == len(truth.notices) == 1 and "1 of 3" in dataset.notices[0]
    assert read_by_all(changed("annotations", "area", "900"), tmp_path) == [FormatError] * 5


def test_images_with_and_without_lists_do_not_go_together(tmp_path: Path) -> None:
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        assert read_by_all(changed("images", key, [], 1), tmp_path) == [FormatError] * 5


@pytest.mark.parametrize("document", [[], 3, None, {}, {"images": []}, coco(categories=None), coco(annotations=3)])
def test_what_is_no_annotation_file(document: Any, tmp_path: Path) -> None:
    assert read_by_all(document, tmp_path) == [FormatError] * 5


def test_boxes_of_two_corners_are_said(tmp_path: Path) -> None:
    document = coco()
    document["annotations"] = [row | {"bbox": [60, 60, 90, 90]} for row in document["annotations"]]
    assert len(Annotations.from_document(document, tmp_path).notices) == 1
    assert not Annotations.from_document(coco(), tmp_path).notices
    truth = GroundTruth.from_document(coco(), style="coco")
    rows = [{"image_id": 1, "category_id": 1, "bbox": [60, 60, 90, 90], "score": 0.5}] * 9
    inside = {"image_id": 1, "category_id": 1, "bbox": [60, 60, 40.5, 30], "score": 0.5}
    assert len(Detections.from_document([*rows, inside]).notices(truth)) == 1
    assert not Detections.from_document([*rows[:3], *[inside] * 3]).notices(truth)
    for image in document["images"]:
        del image["height"], image["width"]
    unknown = GroundTruth.from_document(document, style="coco")
    assert not unknown.notices and not Detections.from_document(rows).notices(unknown)
