"""What annotation files say by themselves: every fault is found with its code and details, a healthy set has none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.annotations import Annotations
from calib.doctor import Case, Examination, examine
from calib.doctor.boxes import AS_IS, corner, format_of_numbers
from calib.errors import FormatError, MissingFileError, SettingError

from .conftest import found, look

Altered = Callable[..., Path]
Document = dict[str, Any]


def boxes(change: Callable[[list[float], Document], list[float]]) -> Callable[[Document], None]:
    """Every box of a document changed; the change is given its image, too."""

    def apply(document: Document) -> None:
        image = {i["id"]: i for i in document["images"]}
        for a in document["annotations"]:
            a["bbox"] = change(a["bbox"], image[a["image_id"]])

    return apply


def test_a_healthy_set_has_no_error_and_no_warning(shapes_set: Path, images: Path) -> None:
    report = look(shapes_set / "train.json", val=shapes_set / "val.json", tune=shapes_set / "tune.json", images=images)
    assert not report.has_errors and not report.of("warning")
    train = report.data["train"]
    assert (train["images"], train["categories"], train["categories_with_objects"]) == (72, 192, 192)
    assert sum(train["categories_per_bin"]) == 192 and train["style"] == "lvis"
    assert report.data["val"]["in_train"]["share"] == 0 and report.data["val"]["in_train"]["compared"] == 24
    assert found(report, "federated").severity == "note"
    json.dumps(report.record())
    assert dict(report.tables())["findings"][0]["code"] in report.codes


def test_without_pictures_and_detector_there_is_less_to_say(shapes_set: Path) -> None:
    report = look(shapes_set / "train.json")
    assert set(report.codes) <= {"federated", "rare"} and report.detector == {} and set(report.data) == {"train"}


def test_ids_that_stand_twice_are_named_and_the_rest_is_looked_at(altered: Altered) -> None:
    def twice(d: Document) -> None:
        d["annotations"] += [dict(d["annotations"][0]), dict(d["annotations"][1])]
        d["images"].append(dict(d["images"][5]))
        d["categories"].append(dict(d["categories"][3]))

    report = look(altered(twice))
    same = [f.details for f in report.findings if f.code == "duplicate-ids"]
    assert same == [{"list": w, "ids": n, "rows": n} for w, n in (("images", 1), ("categories", 1), ("annotations", 2))]
    assert report.data["train"]["images"] == 72 and "counts-stale" not in report.codes


def test_annotations_of_nothing_and_boxes_that_are_none_are_named(altered: Altered) -> None:
    def spoil(d: Document) -> None:
        a = d["annotations"]
        a[0]["image_id"] = 999
        a[1]["category_id"] = 7777
        a[2]["bbox"] = [1, 2, -3, 4]
        a[3]["bbox"] = [1, 2, None, 4]
        a[4]["bbox"] = [1, 2, 1e9, 4]
        a[5]["bbox"][3] = 0

    report = look(altered(spoil))
    for code, n in (("unknown-images", 1), ("unknown-categories", 1)):
        assert found(report, code).details["annotations"] == n and found(report, code).severity == "error"
    assert found(report, "boxes-negative").details["boxes"] == 1
    assert found(report, "boxes-not-numbers").details["boxes"] == 2
    assert found(report, "boxes-empty").severity == "warning" and found(report, "boxes-empty").details["boxes"] == 1


def test_what_no_reader_takes_is_a_finding_with_the_readers_words(altered: Altered, shapes_set: Path) -> None:
    report = look(shapes_set / "train.json", val=altered(lambda d: d["images"][0].update(height=0), "val"))
    assert (
        found(report, "json-refused").where.endswith("val.json") and "height" in found(report, "json-refused").message
    )
    assert set(report.data) == {"train"}
    assert look(altered(lambda d: d.update(images="none"))).codes == ("json-refused",)
    assert look(altered(lambda d: d.update(images=[], annotations=[]))).codes == ("empty",)


def test_what_is_no_annotation_file_is_refused(tmp_path: Path, shapes_set: Path) -> None:
    (tmp_path / "results.json").write_text("[]")
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(FormatError, match="got a list"):
        look(tmp_path / "results.json")
    with pytest.raises(FormatError):
        look(tmp_path / "cut.json")
    with pytest.raises(MissingFileError):
        look(tmp_path / "none.json")
    with pytest.raises(MissingFileError, match="folder of pictures"):
        look(shapes_set / "train.json", images=tmp_path / "none")
    for wrong in ({"sample": 0}, {"seconds": -1.0}, {"bins": (10, 5)}):
        with pytest.raises(SettingError):
            Examination(**wrong)  # type: ignore[arg-type]


def xyxy(b: list[float]) -> list[float]:
    return [b[0], b[1], b[0] + b[2], b[1] + b[3]]


def centre(b: list[float]) -> list[float]:
    return [b[0] + b[2] / 2, b[1] + b[3] / 2, b[2], b[3]]


@pytest.mark.parametrize(
    ("code", "meaning", "change"),
    [
        ("boxes-xyxy", "x1, y1, x2, y2", lambda b, i: xyxy(b)),
        ("boxes-centre", "centre x, centre y, width, height", lambda b, i: centre(b)),
        ("boxes-scale", "x, y, width, height of pictures 2 times as large", lambda b, i: [2 * x for x in b]),
        ("boxes-normalised", "x, y, width, height as shares of the picture", lambda b, i: [x / 144 for x in b]),
        ("boxes-normalised", "x1, y1, x2, y2 as shares of the picture", lambda b, i: [x / 144 for x in xyxy(b)]),
        (
            "boxes-normalised",
            "centre x, centre y, width, height as shares of the picture",
            lambda b, i: [x / 144 for x in centre(b)],
        ),
    ],
)
def test_boxes_of_another_format_are_told_from_their_numbers(
    altered: Altered, code: str, meaning: str, change: Callable[..., list[float]]
) -> None:
    report = look(altered(boxes(change)))
    finding = found(report, code)
    assert finding.severity == "error" and finding.details["meaning"] == meaning
    assert "boxes-beyond" not in report.codes and "b = " in finding.remedy


def test_the_edit_of_a_remedy_mends_the_boxes(altered: Altered, shapes_set: Path) -> None:
    own = Annotations.read(shapes_set / "train.json").box
    path = altered(boxes(lambda b, i: [x / 144 for x in centre(b)]))
    edit = found(look(path), "boxes-normalised").remedy.partition("for every annotation: ")[2]
    document = json.loads(path.read_bytes())
    image = {i["id"]: i for i in document["images"]}
    for a in document["annotations"]:
        names = {"b": a["bbox"], "image": image[a["image_id"]]}
        exec(edit, names)
        a["bbox"] = names["b"]
    assert np.allclose([a["bbox"] for a in document["annotations"]], own)


def test_other_sets_are_not_taken_for_another_format() -> None:
    """One object that fills each picture; objects in the middle; a few boxes that reach beyond."""
    rng = np.random.default_rng(0)
    size = np.tile([640.0, 480.0], (200, 1))
    full = np.column_stack([np.zeros((200, 2)), size])
    middle = np.column_stack([rng.uniform(100, 200, (200, 2)), rng.uniform(50, 150, (200, 2))])
    spread = np.column_stack([rng.uniform(0, 400, (200, 2)), rng.uniform(20, 80, (200, 2))])
    some = spread.copy()
    some[:30, :2] = size[:30] - 10
    for own in (full, middle, spread, some, spread[:5] / 1.5):
        assert format_of_numbers(own, size[: len(own)]) is AS_IS
    assert corner(full, size) is None and corner(middle, size) is None and corner(spread, size) is None
    square = np.column_stack([rng.uniform(0, 420, (200, 2)), rng.uniform(20, 60, (200, 2))])
    assert corner(square / 2, np.tile([480.0, 480.0], (200, 1))) == pytest.approx(2, rel=0.1)
    wide = np.column_stack([rng.uniform(0, 560, 200), rng.uniform(0, 400, 200), rng.uniform(20, 80, (200, 2))])
    assert format_of_numbers(wide[:, [1, 0, 3, 2]], size).code == "boxes-yx"


def test_boxes_at_half_scale_all_lie_in_a_corner(altered: Altered) -> None:
    finding = found(look(altered(boxes(lambda b, i: [x / 2 for x in b]))), "boxes-in-a-corner")
    assert finding.severity == "warning" and finding.details["factor"] == pytest.approx(2, rel=0.05)


def test_boxes_beyond_doubled_and_crowded_are_counted(altered: Altered) -> None:
    def spoil(d: Document) -> None:
        a = d["annotations"]
        for k in range(20):
            a[k]["bbox"][0] = 140
        a[30]["bbox"] = [500, 500, 10, 10]
        a.append(a[40] | {"id": 90001})
        other = next(c["id"] for c in d["categories"] if c["id"] != a[41]["category_id"])
        a.append(a[41] | {"id": 90002, "category_id": other})
        a[50]["iscrowd"], a[51]["ignore"] = 1, 1

    report = look(altered(spoil))
    beyond = found(report, "boxes-beyond")
    assert beyond.severity == "warning" and beyond.details["boxes"] == 21 and beyond.details["outside"] == 1
    assert found(report, "boxes-duplicate").details["boxes"] == 1
    assert found(report, "boxes-of-two-categories").details["boxes"] == 1
    assert found(report, "crowds").details["annotations"] == found(report, "ignored").details["annotations"] == 1
    assert found(report, "counts-stale").details["categories"] == 2


def test_categories_are_counted_and_compared(altered: Altered, shapes_set: Path) -> None:
    def spoil(d: Document) -> None:
        lost = {c["id"] for c in d["categories"][:2]}
        d["annotations"] = [a for a in d["annotations"] if a["category_id"] not in lost]
        d["categories"] = [*d["categories"][2:], *d["categories"][:2]]
        d["categories"][0]["name"] = d["categories"][1]["name"]

    train = look(altered(spoil))
    lacking = found(train, "categories-without-objects")
    assert lacking.details["categories"] == 2 and lacking.details["ids"] == [1, 2]
    assert found(train, "category-ids-unsorted").details["position"] == 190
    assert found(train, "category-names-twice").details["names"] == 1
    assert found(train, "counts-stale").details["categories"] == 2

    def gap(d: Document) -> None:
        for c in d["categories"]:
            c["id"] += c["id"] > 100
        for a in d["annotations"]:
            a["category_id"] += a["category_id"] > 100
        for i in d["images"]:
            i["neg_category_ids"] = []

    report = look(altered(gap), val=shapes_set / "val.json")
    assert found(report, "category-ids-gaps").details == {"categories": 192, "first": 1, "last": 193}
    assert found(report, "categories-differ").details["ids"] == [101, 193]

    def rename(d: Document) -> None:
        names = [c["name"] for c in d["categories"]]
        for c, name in zip(d["categories"], [*names[1:], names[0]], strict=True):
            c["name"] = name

    moved = found(look(shapes_set / "train.json", val=altered(rename, "val")), "category-names-differ")
    assert moved.severity == "error" and moved.details["ids"] == 192
    one = found(
        look(shapes_set / "train.json", val=altered(lambda d: d["categories"][0].update(name="x"), "val")),
        "category-names-differ",
    )
    assert one.severity == "warning" and one.details["ids"] == 1


def test_what_an_image_is_said_not_to_show_and_shows(altered: Altered) -> None:
    def contradict(d: Document) -> None:
        a = d["annotations"][0]
        next(i for i in d["images"] if i["id"] == a["image_id"])["neg_category_ids"].append(a["category_id"])

    finding = found(look(altered(contradict)), "federated-contradiction")
    assert finding.details["annotations"] >= 1 and finding.severity == "warning"


def coco(d: Document) -> None:
    for i in d["images"]:
        del i["neg_category_ids"], i["not_exhaustive_category_ids"]


def test_styles_and_support_are_told(altered: Altered, shapes_set: Path) -> None:
    def few(d: Document) -> None:
        d["annotations"] = d["annotations"][:4]

    report = look(altered(coco), val=altered(few, "val"))
    assert found(report, "not-federated").severity == "note" and "styles-differ" in report.codes
    rare = found(report, "few-rare")
    assert rare.severity == "warning" and rare.details["at_least_1"] <= 4 and rare.details["at_least_5"] == 0
    bare = look(altered(lambda d: d.pop("annotations")))
    assert found(bare, "not-annotated").severity == "error"
    assert "no-rare-categories" in look(shapes_set / "train.json", Examination(bins=(1, 2))).codes


def test_exchanged_splits_are_told(shapes_set: Path) -> None:
    exchanged = look(shapes_set / "val.json", val=shapes_set / "train.json")
    finding = found(exchanged, "train-smaller")
    assert finding.severity == "warning" and finding.details["val"] > finding.details["train"] > 0
    assert "train-smaller" not in look(shapes_set / "train.json", val=shapes_set / "val.json").codes


def test_a_case_is_what_it_says(shapes_set: Path) -> None:
    assert examine(Case(shapes_set / "train.json")).codes == look(shapes_set / "train.json").codes
