"""Annotation files and pictures: what is wrong with them is said with file and row; what is merely odd is taken."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calib.errors import CalibError, FormatError, InputError, NonFiniteError
from calib.extract.dataset import Dataset

Document = Callable[..., dict[str, Any]]
Read = Callable[[dict[str, Any]], Dataset]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def two(document: Document) -> dict[str, Any]:
    """Two pictures; the first has an object of category 10 and one of 30."""
    return document([(40, 60), (30, 30)], [(1, 10, 2, 3, 20, 10), (1, 30, 5, 5, 9, 9)])


def test_images_are_sorted_and_objects_grouped(two: dict[str, Any], read: Read) -> None:
    two["images"].reverse()
    dataset = read(two)
    assert [r["id"] for r in dataset.images] == [1, 2]
    objects = dataset.objects(1)
    assert objects.boxes.tolist() == [[2, 3, 22, 13], [5, 5, 14, 14]] and objects.label.tolist() == [0, 2]
    assert objects.annotation_id.tolist() == [1, 2]
    assert dataset.objects(2).boxes.shape == (0, 4)  # an image without objects
    assert dataset.categories.instance_count.tolist() == [1, 0, 1, 0]  # and categories without annotations


def test_crowds_ignored_and_empty_boxes_match_nothing(two: dict[str, Any], read: Read) -> None:
    """COCO has a few boxes without height; they stay among the annotations and are no objects."""
    for extra in ({"iscrowd": 1}, {"ignore": 1}, {"bbox": [1, 1, 0, 5]}, {"bbox": [1, 1, 5, 0]}):
        one = {"id": len(two["annotations"]) + 1, "image_id": 2, "category_id": 10, "bbox": [1, 1, 5, 5]}
        two["annotations"].append(one | extra)
    dataset = read(two)
    assert dataset.objects(2).boxes.shape == (0, 4) and len(dataset.annotations["id"]) == 6
    assert dataset.annotations["ignore"].tolist() == [False, False, False, True, False, False]
    assert dataset.annotations["crowd"].tolist() == [False, False, True, False, False, False]


def test_a_gzipped_file_is_the_same(two: dict[str, Any], read: Read, tmp_path: Path) -> None:
    plain = read(two)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(two).encode()))
    assert Dataset.read(tmp_path / "a.json.gz").digest() == plain.digest()


def test_the_digest_sees_every_change_that_matters(two: dict[str, Any], read: Read) -> None:
    digests = [read(two).digest()]
    assert read(two | {"info": "another day"}).digest() == digests[0]
    changes: list[Change] = [
        lambda d: d["annotations"][0].update(category_id=20),
        lambda d: d["annotations"][0]["bbox"].__setitem__(0, 2.5),
        lambda d: d["images"][0].update(file_name="2.png"),
        lambda d: [i.update(neg_category_ids=[40], not_exhaustive_category_ids=[]) for i in d["images"]],
        lambda d: d["categories"][0].update(name="other"),
    ]
    for change in changes:
        change(two)
        digests.append(read(two).digest())
    assert len(set(digests)) == 6


def test_counts_come_from_another_file(two: dict[str, Any], read: Read, tmp_path: Path) -> None:
    train = two | {"annotations": two["annotations"][:1] * 1}
    (tmp_path / "train.json").write_text(json.dumps(train))
    read(two)
    dataset = Dataset.read(tmp_path / "a.json", counts_from=tmp_path / "train.json")
    assert dataset.categories.instance_count.tolist() == [1, 0, 0, 0] and len(dataset.annotations["id"]) == 2
    (tmp_path / "train.json").write_text(json.dumps(train | {"categories": train["categories"][:3]}))
    read(train | {"annotations": []})
    with pytest.raises(InputError, match=r"a\.json and .*train\.json list different categories"):
        Dataset.read(tmp_path / "a.json", counts_from=tmp_path / "train.json")


WRONG: list[tuple[Change, type[CalibError], str]] = [
    (lambda d: d.pop("images"), FormatError, "objects under 'images', got nothing"),
    (lambda d: d.update(images=[], annotations=[]), InputError, "lists no images"),
    (lambda d: d.update(images={"1": 2}), FormatError, "expected a list of objects under 'images'"),
    (lambda d: d.update(annotations=[3]), FormatError, "expected a list of objects under 'annotations'"),
    (lambda d: d.update(categories=[], annotations=[]), InputError, "has no categories"),
    (lambda d: d["images"][1].pop("id"), FormatError, r"images\[1\] has no 'id'"),
    (lambda d: d["images"][1].update(id=1), FormatError, "images: id 1 occurs 2 times"),
    (lambda d: d["images"][1].update(id="two"), FormatError, r"images\[1\]: 'id' must be a whole number"),
    (lambda d: d["images"][1].update(height=0), FormatError, "every height must be at least 1"),
    (lambda d: d["images"][1].update(width="wide"), FormatError, "'width' must be a whole number"),
    (
        lambda d: [i.update(neg_category_ids=["a"], not_exhaustive_category_ids=[]) for i in d["images"]],
        FormatError,
        r"images\[0\]\[0\]: 'neg_category_ids' must be a whole number",
    ),
    (
        lambda d: [i.update(neg_category_ids=[], not_exhaustive_category_ids=7) for i in d["images"]],
        FormatError,
        r"images\[0\]: 'not_exhaustive_category_ids' must be a list",
    ),
    (lambda d: d["categories"][1].update(id=10), FormatError, "categories: id 10 occurs 2 times"),
    (lambda d: d["categories"][1].pop("id"), FormatError, r"categories\[1\] has no 'id'"),
    (lambda d: d["annotations"][1].update(id=1), FormatError, "annotations: id 1 occurs 2 times"),
    (lambda d: d["annotations"][1].update(image_id=9), FormatError, r"annotations\[1\]: image_id 9 is not among"),
    (lambda d: d["annotations"][1].update(category_id=9), FormatError, r"annotations\[1\]: category_id 9 is not among"),
    (lambda d: d["annotations"][1].pop("bbox"), FormatError, r"annotations\[1\] has no 'bbox'"),
    (
        lambda d: d["annotations"][1].update(bbox=[1, 2, 3]),
        FormatError,
        r"annotations\[1\]: 'bbox' must be a list of 4",
    ),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, None]), FormatError, r"annotations\[1\]: 'bbox'"),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, -3, 4]), FormatError, r"annotations\[1\]: bbox .* negative side"),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, 3, float("nan")]), NonFiniteError, r"annotations\[1\]: 'bbox'"),
    (lambda d: d["annotations"][1].update(bbox=[1, 2, 1e30, 4]), FormatError, r"annotations\[1\]: bbox .* no box of"),
    (
        lambda d: [c.update(instance_count=-4, image_count=1) for c in d["categories"]],
        FormatError,
        "category 10 has instance_count -4",
    ),
    (lambda d: d["annotations"][1].update(area="large"), FormatError, r"annotations\[1\]: 'area' must be a number"),
    (
        lambda d: [c.update(instance_count="x", image_count=1) for c in d["categories"]],
        FormatError,
        r"categories\[0\]: 'instance_count' must be a whole number",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_what_is_wrong_is_named(
    two: dict[str, Any], read: Read, tmp_path: Path, change: Change, error: type[CalibError], message: str
) -> None:
    change(two)
    with pytest.raises(error, match=message) as e:
        read(two)
    assert str(tmp_path / "a.json") in str(e.value)


@pytest.mark.parametrize("text", ["", '{"images": [', "[]", "3", "\x1f\x8b broken"])
def test_a_file_that_is_no_annotation_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin1"))
    with pytest.raises(FormatError, match=r"a\.json"):
        Dataset.read(tmp_path / "a.json")
