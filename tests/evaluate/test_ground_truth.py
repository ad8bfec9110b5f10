"""Reading LVIS ground truth: what is kept, what is mended, what is refused."""

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.errors import CalibError, FormatError, MissingFileError, NonFiniteError
from calib.evaluate import Detections, GroundTruth, evaluate
from calib.evaluate.ground_truth import NEGATIVE, NOT_EXHAUSTIVE, POSITIVE

Document = dict[str, Any]


def found(document: Document) -> Detections:
    """A perfect detection of the one object."""
    row = document["annotations"][0]
    return Detections.from_document([{**{k: row[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.9}])


def test_categories_are_sorted_by_id_and_keep_their_facts(one_object: Document) -> None:
    truth = GroundTruth.from_document(one_object)
    assert truth.category_ids.tolist() == [3, 8, 9]
    assert truth.names == ("a", "b", "c")
    assert truth.frequency == ("r", "c", "f")
    assert truth.instance_count is not None and truth.instance_count.tolist() == [5, 50, 5000]
    assert truth.image_count is not None and truth.image_count.tolist() == [4, 20, 900]


def test_labels_say_what_is_known_of_each_category(one_object: Document) -> None:
    one_object["images"][0]["not_exhaustive_category_ids"] = [3, 1234]
    truth = GroundTruth.from_document(one_object)
    assert truth.labels.tolist() == [[POSITIVE | NOT_EXHAUSTIVE, NEGATIVE, 0]]


def test_the_document_is_left_as_it_is(one_object: Document) -> None:
    one_object["annotations"][0]["id"] = 0
    before = copy.deepcopy(one_object)
    evaluate(GroundTruth.from_document(one_object), found(one_object))
    assert one_object == before


def test_annotation_id_zero_is_renumbered_with_a_notice_and_counts(one_object: Document) -> None:
    one_object["annotations"][0]["id"] = 0
    truth = GroundTruth.from_document(one_object)
    assert truth.annotation_id.tolist() == [1]
    assert len(truth.notices) == 1 and "renumbered" in truth.notices[0]
    assert evaluate(truth, found(one_object)).AP[0] == pytest.approx(1.0)


def test_annotations_without_area_do_not_count(one_object: Document) -> None:
    one_object["annotations"][0]["area"] = 0.0
    truth = GroundTruth.from_document(one_object)
    assert len(truth.annotation_id) == 0 and not truth.labels[0, 0]


def test_plain_and_gzipped_files_are_equal(one_object: Document, tmp_path: Path) -> None:
    text = json.dumps(one_object).encode()
    (tmp_path / "a.json").write_bytes(text)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(text))
    a, b = (GroundTruth.read(tmp_path / name) for name in ("a.json", "b.json.gz"))
    assert a.names == b.names
    np.testing.assert_array_equal(a.box, b.box)


def test_counts_and_frequency_may_be_absent(one_object: Document) -> None:
    for row in one_object["categories"]:
        del row["frequency"], row["instance_count"], row["image_count"]
    summary = evaluate(GroundTruth.from_document(one_object), found(one_object)).summary()
    assert summary["AP"] == pytest.approx(1.0)
    assert [summary[key] for key in ("APr", "AP1", "AP4", "bAP", "nr", "n1")] == [-1, -1, -1, -1, 0, 0]


def _set(rows: str, key: str, value: Any) -> Callable[[Document], Any]:
    return lambda document: document[rows][0].update({key: value})


def _drop(rows: str, key: str) -> Callable[[Document], Any]:
    return lambda document: document[rows][0].pop(key)


def _twice(rows: str) -> Callable[[Document], Any]:
    return lambda document: document[rows].append(dict(document[rows][0]))


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (_twice("annotations"), FormatError, "annotations: id 1 occurs 2 times"),
        (_twice("images"), FormatError, "images: id 5 occurs 2 times"),
        (_twice("categories"), FormatError, "categories: id 8 occurs 2 times"),
        (_set("annotations", "id", -4), FormatError, r"annotations\[0\] has id -4"),
        (_set("annotations", "image_id", 6), FormatError, r"annotations\[0\]: image_id 6 is not among"),
        (_set("annotations", "category_id", 4), FormatError, "category_id 4 is not among"),
        (_set("annotations", "bbox", [1, 2, 3]), FormatError, "'bbox' must be a list of 4 numbers"),
        (_set("annotations", "bbox", "1,2,3,4"), FormatError, "'bbox' must be a list of 4 numbers"),
        (_set("annotations", "bbox", [1, 2, None, 4]), FormatError, "'bbox' must be a list of 4 numbers"),
        (_set("annotations", "bbox", [1, 2, float("nan"), 4]), NonFiniteError, r"annotations\[0\]: 'bbox'"),
        (_set("annotations", "area", float("inf")), NonFiniteError, "'area' must be finite"),
        (_set("annotations", "area", "12"), FormatError, "'area' must be a number"),
        (_set("annotations", "image_id", 5.5), FormatError, "'image_id' must be a whole number"),
        (_drop("images", "neg_category_ids"), FormatError, "has no 'neg_category_ids'"),
        (_set("images", "neg_category_ids", 3), FormatError, "must be a list of category ids"),
        (_set("categories", "frequency", "x"), FormatError, "category 3 has frequency 'x'"),
        (_set("categories", "instance_count", -1), FormatError, "instance_count -1"),
        (_drop("categories", "instance_count"), FormatError, "has no 'instance_count'"),
        (_drop("categories", "id"), FormatError, r"categories\[0\] has no 'id'"),
        (lambda document: document.pop("images"), FormatError, "list of objects under 'images'"),
    ],
)
def test_inconsistent_ground_truth_is_refused(
    one_object: Document, damage: Callable[[Document], Any], kind: type[CalibError], message: str
) -> None:
    one_object["categories"].sort(key=lambda row: row["id"] != 3)
    if "8 occurs" in message:
        one_object["categories"].sort(key=lambda row: row["id"] != 8)
    damage(one_object)
    with pytest.raises(kind, match=message):
        GroundTruth.from_document(one_object)


def test_a_results_list_is_not_ground_truth() -> None:
    with pytest.raises(FormatError, match="expected a LVIS or COCO ground-truth object, got a list"):
        GroundTruth.from_document([])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"images": []}')
    (tmp_path / "cut.json.gz").write_bytes(whole[:-9])
    (tmp_path / "cut.json").write_text('{"images": [')
    (tmp_path / "empty.json").write_text("")
    for name, message in (
        ("cut.json.gz", "damaged gzip"),
        ("cut.json", "not valid JSON"),
        ("empty.json", "JSON"),
    ):
        with pytest.raises(FormatError, match=message) as caught:
            GroundTruth.read(tmp_path / name)
        assert name in str(caught.value) and caught.value.hint
    with pytest.raises(FormatError, match="cannot be read"):
        GroundTruth.read(tmp_path)
    with pytest.raises(MissingFileError, match="absent"):
        GroundTruth.read(tmp_path / "absent.json")


def test_annotation_id_zero_beside_the_largest_id_gets_a_free_one(one_object: Document) -> None:
    first = one_object["annotations"][0]
    one_object["annotations"] = [first | {"id": i} for i in (0, 1, 2**63 - 1)]
    truth = GroundTruth.from_document(one_object)
    assert truth.annotation_id.tolist() == [2, 1, 2**63 - 1] and "renumbered to 2" in truth.notices[0]
