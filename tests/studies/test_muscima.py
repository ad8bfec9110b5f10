"""The data set of the study from files as the repository has them: pixels, boxes, what is known, and which split."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from calib.annotations import Annotations
from calib.errors import ExistsError, FormatError, MissingFileError, SettingError

from ..scripts import load_script


@pytest.fixture(scope="module")
def muscima() -> ModuleType:
    return load_script("studies/muscima.py")


def node(name: str, top: int, left: int, mask: list[str]) -> str:
    """XML of a symbol; ``mask`` are its rows, # for ink."""
    ink = "".join(mask)
    runs = " ".join(f"{int(c == '#')}:1" for c in ink)
    place = f"<Top>{top}</Top><Left>{left}</Left><Width>{len(mask[0])}</Width><Height>{len(mask)}</Height>"
    return f"<Node><Id>0</Id><ClassName>{name}</ClassName>{place}<Mask>{runs}</Mask></Node>"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Three scores in seven versions; a clef is in the first score alone, a trill in one version that train lacks."""
    folder = tmp_path / "clone" / "v2.0" / "data" / "annotations"
    folder.mkdir(parents=True)
    for score in (1, 2, 3):
        for k in range(7):
            nodes = [node("staffLine", 2, 0, ["#####"]), node("staff", 0, 0, ["#####"] * 5)]
            nodes += [node("notehead", 1 + k, 1, ["##", ".#"]), node("unclassified", 9, 0, ["#"])]
            nodes += [node("clef", 12, 3, ["#"])] if score == 1 else []
            nodes += [node("trill", 14, 3, ["#"])] if score == 2 and k == 3 else []
            name = f"CVC-MUSCIMA_W-{2 * k + score:02d}_N-{score:02d}_D-ideal.xml"
            (folder / name).write_text(f"<Nodes>{''.join(nodes)}</Nodes>")
    return tmp_path / "clone"


def test_versions_are_divided_and_boxes_are_where_the_ink_is(muscima: ModuleType, clone: Path, tmp_path: Path) -> None:
    told = muscima.make(clone, tmp_path / "set")
    assert [told[split]["pages"] for split in ("train", "tune", "val")] == [12, 3, 6]
    assert told["categories"] == 2 and told["boxes_without_category"] == 1  # the trill
    seen: set[str] = set()
    for split in ("train", "tune", "val"):
        content = json.loads((tmp_path / "set" / f"{split}.json").read_bytes())
        assert not Annotations.read(tmp_path / "set" / f"{split}.json").notices
        names = {record["id"]: record["file_name"] for record in content["images"]}
        assert not seen & set(names.values()) and {record["score"] for record in content["images"]} == {1, 2, 3}
        seen |= set(names.values())
        assert [c["name"] for c in content["categories"]] == ["clef", "notehead"]
        assert [c["instance_count"] for c in content["categories"]] == [4, 12]
        for record in content["images"]:
            assert record["neg_category_ids"] == ([] if record["score"] == 1 else [1])
        for a in content["annotations"]:
            with Image.open(tmp_path / "set" / "pages" / names[a["image_id"]]) as picture:
                ink = ~np.array(picture.convert("1"))
            x, y, width, height = a["bbox"]
            assert a["area"] == (3 if a["category_id"] == 2 else 1) <= ink[y : y + height, x : x + width].sum()
            assert not ink[0].any() and ink[2, :5].all() and ink[9, 0]  # no staff, but its line, and what has no class
    assert len(seen) == 21


def test_scores_are_divided_and_stay_whole(muscima: ModuleType, clone: Path, tmp_path: Path) -> None:
    muscima.make(clone, tmp_path / "set", "score")
    scores = [
        {record["score"] for record in json.loads((tmp_path / "set" / f"{split}.json").read_bytes())["images"]}
        for split in ("train", "tune", "val")
    ]
    assert sorted(score for own in scores for score in own) == [1, 2, 3]


def test_wrong_input_is_named_and_nothing_is_left(muscima: ModuleType, clone: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        muscima.make(tmp_path, tmp_path / "set")
    with pytest.raises(SettingError):
        muscima.make(clone, tmp_path / "set", "writer")
    broken = next(clone.glob("v2.0/data/annotations/*.xml"))
    for content in (
        "<Nodes>",
        f"<Nodes>{node('clef', 0, 0, ['##']).replace('1:1 1:1', '1:1')}</Nodes>",
        "<Nodes><Node/></Nodes>",
    ):
        broken.write_text(content)
        with pytest.raises(FormatError, match=broken.name):
            muscima.make(clone, tmp_path / "set")
    assert not [p for p in tmp_path.iterdir() if p.name != "clone"]
    (tmp_path / "set").mkdir()
    with pytest.raises(ExistsError):
        muscima.make(clone, tmp_path / "set")
