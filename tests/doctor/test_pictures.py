"""Pictures that are missing, damaged, of other sizes; splits that share them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from .conftest import found, look

Altered = Callable[..., Path]
Document = dict[str, Any]


@pytest.fixture
def own_images(images: Path, tmp_path: Path) -> Path:
    """A copy of the pictures, to be damaged."""
    return Path(shutil.copytree(images, tmp_path / "images"))


def test_missing_and_damaged_pictures_are_counted(altered: Altered, own_images: Path) -> None:
    names = [i["file_name"] for i in json.loads(altered().read_bytes())["images"]]
    (own_images / names[3]).unlink()
    (own_images / names[7]).unlink()
    content = (own_images / names[10]).read_bytes()
    (own_images / names[10]).write_bytes(content[: len(content) // 2])
    (own_images / names[11]).write_text("no picture")
    report = look(altered(), images=own_images)
    missing = found(report, "pictures-missing")
    assert missing.severity == "error" and missing.details == {"pictures": 2, "of": 72}
    assert names[3] in missing.message and "--images" in missing.remedy
    faults = found(report, "pictures-unreadable")
    assert faults.details["opened"] == 70 and names[11] in " ".join(faults.examples)


def test_the_right_folder_is_named_where_it_lies_near(altered: Altered, images: Path) -> None:
    wrong = found(look(altered(), images=images.parent), "pictures-missing")
    assert wrong.details["pictures"] == 72 and wrong.remedy.endswith(f"--images {images}")


def test_a_name_that_may_be_two_files_is_told(altered: Altered, own_images: Path, tmp_path: Path) -> None:
    names = [i["file_name"] for i in json.loads(altered().read_bytes())["images"]]
    folder, _, name = names[0].partition("/")
    inner = own_images / folder
    (inner / folder).mkdir()
    shutil.copy(inner / name, inner / folder / name)
    report = look(altered(), images=inner)
    assert found(report, "pictures-ambiguous").details["pictures"] == 1


def scaled(factor: float) -> Callable[[Document], None]:
    def apply(d: Document) -> None:
        for i in d["images"]:
            i["width"], i["height"] = round(i["width"] * factor), round(i["height"] * factor)
        for a in d["annotations"]:
            a["bbox"] = [x * factor for x in a["bbox"]]

    return apply


def test_a_json_at_half_scale_is_told_with_its_ratio(altered: Altered, images: Path) -> None:
    report = look(altered(scaled(0.5)), images=images)
    finding = found(report, "json-scale")
    assert finding.severity == "error" and finding.details["ratio"] == 2.0 and finding.details["is_constant"]
    assert finding.details["pictures"] == finding.details["of"] == 72 and "72 x 72" in finding.examples[0]
    assert "by 2" in finding.remedy and "boxes-in-a-corner" not in report.codes


def test_other_sizes_and_exchanged_sides_are_told_apart(altered: Altered, own_images: Path) -> None:
    def resize(d: Document) -> None:
        rng = np.random.default_rng(0)
        for i in d["images"]:
            i["width"], i["height"] = (int(x) for x in rng.integers(50, 300, 2))

    assert found(look(altered(resize), images=own_images), "picture-sizes").details["pictures"] == 72
    d = json.loads(altered().read_bytes())
    for i in d["images"]:
        Image.new("RGB", (200, 144)).save(own_images / i["file_name"])

    def swap(d: Document) -> None:
        for i in d["images"]:
            i["width"], i["height"] = 144, 200

    assert found(look(altered(swap), images=own_images), "sizes-swapped").severity == "error"

    def unsized(d: Document) -> None:
        for i in d["images"]:
            del i["width"], i["height"]

    report = look(altered(unsized), images=own_images)
    assert found(report, "sizes-missing").details["images"] == 72 and not report.has_errors


def test_exif_orientation_is_told(altered: Altered, own_images: Path) -> None:
    names = [i["file_name"] for i in json.loads(altered().read_bytes())["images"]]
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in names[:2]:
        Image.new("RGB", (200, 100)).save(own_images / name, exif=exif)

    def sizes(d: Document) -> None:
        d["images"][0].update(width=100, height=200)  # as it is seen
        d["images"][1].update(width=200, height=100)  # as it is stored
        d["annotations"] = [a for a in d["annotations"] if a["image_id"] not in (1, 2)]

    finding = found(look(altered(sizes), images=own_images), "pictures-turned")
    assert finding.severity == "warning" and finding.details == {"turned": 2, "as_stored": 1, "opened": 72}


def test_a_picture_of_two_images_is_told(altered: Altered, images: Path) -> None:
    def change(d: Document) -> None:
        d["images"][1]["file_name"] = d["images"][0]["file_name"]

    assert found(look(altered(change), images=images), "pictures-twice").details["pictures"] == 1


def test_val_that_is_train_is_an_error(altered: Altered, images: Path) -> None:
    for more in ({"images": images}, {}):
        report = look(altered(), val=altered(name="val"), tune=altered(split="tune"), **more)
        finding = found(report, "val-is-train")
        assert finding.severity == "error" and finding.details["same"] == 72 and finding.details["share"] == 1.0
        assert report.data["val"]["in_train"]["same_ids"] == 72


def test_a_share_in_common_is_a_warning_with_its_figure(altered: Altered, images: Path) -> None:
    train = json.loads(altered().read_bytes())

    def mix(d: Document) -> None:
        d["images"] += [i | {"id": 10**6 + i["id"]} for i in train["images"][:6]]

    finding = found(look(altered(), val=altered(mix, "val"), images=images), "val-overlaps-train")
    assert finding.severity == "warning" and finding.details["same"] == 6
    assert finding.details["share"] == pytest.approx(6 / 30)


def test_equal_contents_under_other_names_are_found(altered: Altered, own_images: Path) -> None:
    names = [i["file_name"] for i in json.loads(altered().read_bytes())["images"]]
    for k, name in enumerate(names):
        shutil.copy(own_images / name, own_images / f"copy{k}.png")

    def rename(d: Document) -> None:
        for k, i in enumerate(d["images"]):
            i["file_name"] = f"copy{k}.png"

    report = look(altered(), val=altered(rename, name="val"), images=own_images)
    finding = found(report, "val-is-train")
    assert finding.details["same"] == 0 and finding.details["same_content"] == finding.details["compared"] == 72


def test_pictures_of_val_may_lie_apart(altered: Altered, images: Path, tmp_path: Path) -> None:
    """The same names in another folder are other pictures."""
    other = tmp_path / "other"
    for i in json.loads(altered().read_bytes())["images"]:
        (other / i["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (144, 144), (i["id"] % 256, 3, 7)).save(other / i["file_name"])
    report = look(altered(), val=altered(name="val"), images=images, val_images=other)
    assert not [c for c in report.codes if c.startswith("val-")] and not report.has_errors


def test_tune_that_is_val_is_told(altered: Altered, images: Path) -> None:
    report = look(altered(), val=altered(split="val"), tune=altered(split="val", name="tune"), images=images)
    assert found(report, "val-is-tune").severity == "error" and "tune-is-train" not in report.codes
