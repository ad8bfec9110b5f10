"""hdBPMN's files become a COCO set: categories, boxes in pixels, the repository's own splits."""

import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from calib.annotations import Annotations
from calib.errors import ExistsError, FormatError, MissingFileError

from ..scripts import load_script

SHAPE = (
    '<di:BPMNShape bpmnElement="{0}"{2}><dc:Bounds x="{1[0]}" y="{1[1]}" width="{1[2]}" height="{1[3]}"/>'
    "</di:BPMNShape>"
)
ELEMENTS = {
    "t": "<task id='t'/>", "e": "<startEvent id='e'><timerEventDefinition id='d'/></startEvent>",
    "d": "<dataObjectReference id='d'/>", "s": "<subProcess id='s'/>", "o": "<subProcess id='o'/>",
    "n": "<textAnnotation id='n'/>", "g": "<inclusiveGateway id='g'/>",
}  # fmt: skip


@pytest.fixture(scope="module")
def hdbpmn() -> ModuleType:
    return load_script("studies/hdbpmn.py")


def write(clone: Path, name: str, boxes: dict[str, tuple[float, ...]], size: tuple[int, int] = (400, 200)) -> Path:
    """A diagram with elements of ``boxes`` and its picture."""
    shapes = "".join(SHAPE.format(key, box, ' isExpanded="true"' if key == "o" else "") for key, box in boxes.items())
    path = clone / "data" / "annotations" / name[:4] / f"{name}.bpmn"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<?xml version="1.0"?><!-- {"backgroundSize":1000} --><definitions xmlns="m" xmlns:di="di" xmlns:dc="dc">'
        f"<process>{''.join(ELEMENTS[key] for key in boxes)}</process><di:BPMNPlane>{shapes}</di:BPMNPlane>"
        "</definitions>"
    )
    picture = clone / "data" / "images" / name[:4] / f"{name}.jpg"
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(picture)
    return picture


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    root = tmp_path / "clone"
    write(root, "ex00_writer0001", {"t": (100, 50, 200, 100), "e": (-10, 0, 30, 20), "n": (0, 0, 9, 9)})
    write(root, "ex01_writer0001", {"s": (0, 0, 50, 50), "o": (0, 0, 50, 50), "d": (300, 100, 10, 20)}, (100, 200))
    write(root, "ex00_writer0002", {"t": (0, 0, 10, 10), "g": (0, 0, 10, 10)})
    write(root, "ex00_writer0003", {"t": (0, 0, 10, 10)})
    write(root, "ex01_writer0003", {"t": (0, 0, 10, 10)}).unlink()
    (root / "data" / "writer_split.csv").write_text("writer,split\nwriter0001,train\nwriter0002,val\nwriter0003,test\n")
    return root


def test_shapes_become_boxes_of_the_shrunk_picture(hdbpmn: ModuleType, clone: Path, tmp_path: Path) -> None:
    said = hdbpmn.make(clone, tmp_path / "set", side=100)
    assert said["train"] == {"pictures": 2, "boxes": 5} and said["without_picture"] == 1 and said["categories"] == 5
    train = json.loads((tmp_path / "set" / "train.json").read_text())
    names = {c["id"]: c["name"] for c in train["categories"]}
    assert list(names.values()) == ["dataObject", "startEvent, timer", "subProcess, closed", "subProcess, open", "task"]
    boxes = {(a["image_id"], names[a["category_id"]]): a["bbox"] for a in train["annotations"]}
    assert boxes[1, "task"] == [10, 5, 20, 10] and boxes[1, "startEvent, timer"] == [0, 0, 2, 2]
    assert boxes[2, "dataObject"][2:] == [1, 2]  # the longer side is the height
    assert [(i["width"], i["height"]) for i in train["images"]] == [(100, 50), (50, 100)]
    with Image.open(tmp_path / "set" / "pictures" / "ex01_writer0001.jpg") as picture:
        assert picture.size == (50, 100)
    tune = json.loads((tmp_path / "set" / "tune.json").read_text())
    assert [names[a["category_id"]] for a in tune["annotations"]] == ["task"]  # train has no inclusive gateway
    for split in ("train", "tune", "val"):
        Annotations.read(tmp_path / "set" / f"{split}.json")


def test_what_is_no_clone_is_refused(hdbpmn: ModuleType, clone: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        hdbpmn.make(tmp_path / "nothing", tmp_path / "set")
    broken = clone / "data" / "annotations" / "ex00" / "ex00_writer0002.bpmn"
    broken.write_text("<definitions>")
    with pytest.raises(FormatError, match="writer0002"):
        hdbpmn.make(clone, tmp_path / "set")
    assert not list(tmp_path.glob("*set*"))
    (tmp_path / "set").mkdir()
    with pytest.raises(ExistsError):
        hdbpmn.make(clone, tmp_path / "set")
