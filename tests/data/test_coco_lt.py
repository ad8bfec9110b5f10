"""COCO-LT: rare classes lose annotations and not pictures; the index decides, or a profile."""

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.data.coco_lt import Profile, build, profiled, read_index
from calib.errors import CalibError, ExistsError, FormatError, InputError, SettingError

Fails = Callable[..., str]

# Category ids have gaps, as COCO's have, and stand in no order; (image, category) of every object.
OBJECTS = [(1, 7), (1, 7), (1, 3), (2, 7), (2, 3), (3, 3), (3, 90), (4, 90)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    document = {
        "info": {"year": 2017},
        "images": [{"id": i, "height": 9, "width": 9, "file_name": f"{i}.jpg"} for i in (4, 3, 2, 1, 5)],
        "annotations": [
            {"id": k, "image_id": i, "category_id": c, "bbox": [0, 0, 2, 2], "area": 4}
            for k, (i, c) in enumerate(OBJECTS)
        ],
        "categories": [{"id": c, "name": f"c{c}"} for c in (90, 3, 7)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(document))
    return tmp_path / "coco.json"


def write_index(folder: Path, kind: str, lists: list[list[int]]) -> Path:
    if kind == "npz":
        offsets = np.cumsum([0, *map(len, lists)])
        np.savez(folder / "i.npz", image_ids=np.concatenate([*map(np.asarray, lists)]), class_offsets=offsets)
    else:
        entries = {k + 1: {"img_id": v, "isntance_count": 0, "category_id": k + 1} for k, v in enumerate(lists)}
        (folder / "i.pt").write_bytes(pickle.dumps(entries))
    return folder / f"i.{kind}"


@pytest.mark.parametrize("kind", ["pt", "npz"])
def test_an_annotation_stays_if_its_image_is_in_the_list_of_its_class(
    kind: str, source: Path, calib: Callable[..., Any], tmp_path: Path
) -> None:
    index = write_index(tmp_path, kind, [[2], [1, 2], [3]])  # of categories 3, 7, 90
    done = calib("data", "coco-lt", "--annotations", source, "--index", index, "--out", tmp_path / "lt.json", "--json")
    assert done.exit_code == 0, done.stderr
    written = json.loads((tmp_path / "lt.json").read_bytes())
    assert [a["id"] for a in written["annotations"]] == [0, 1, 3, 4, 6]
    assert [r["id"] for r in written["images"]] == [3, 2, 1] and written["info"] == {"year": 2017}
    counts = {c["id"]: (c["instance_count"], c["image_count"]) for c in written["categories"]}
    assert counts == {3: (1, 1), 7: (3, 2), 90: (1, 1)}
    summary = json.loads(done.stdout)
    assert (summary["images"], summary["annotations"], summary["smallest"], summary["largest"]) == (3, 5, 1, 3)
    assert summary["categories_per_bin"] == [3, 0, 0, 0]


def test_a_profile_falls_exponentially_and_keeps_whole_images() -> None:
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(5), [4000, 3000, 2500, 2000, 1500])
    image_id = rng.integers(0, 900, len(label))
    index = profiled(image_id, label, 5, Profile(0.01, seed=3))
    kept = np.concatenate([(label == k) & np.isin(image_id, index[k]) for k in range(5)]).reshape(5, -1).sum(1)
    wanted = 4000 * 0.01 ** (np.arange(5) / 4)  # 4000, 1265, 400, 126, 40
    most = [max(Counter(image_id[label == k].tolist()).values()) for k in range(5)]
    assert all(w <= n < w + m for n, w, m in zip(kept, wanted, most, strict=True)) and kept[0] == 4000
    again = profiled(image_id, label, 5, Profile(0.01, seed=3))
    assert all(np.array_equal(a, b) for a, b in zip(index, again, strict=True))
    assert any(
        not np.array_equal(a, b) for a, b in zip(index, profiled(image_id, label, 5, Profile(0.01)), strict=True)
    )


def test_a_profile_writes_a_set_that_can_be_read(source: Path, tmp_path: Path) -> None:
    from calib.extract.dataset import Dataset

    summary = build(source, tmp_path / "out.json", Profile(0.5))
    dataset = Dataset.read(tmp_path / "out.json")
    assert summary["annotations"] == len(dataset.annotations["id"]) == dataset.categories.instance_count.sum()
    assert build(source, tmp_path / "all.json", Profile(1.0))["annotations"] == len(OBJECTS)


def test_what_cannot_be_built_says_why(source: Path, tmp_path: Path, fails: Fails) -> None:
    cases: list[tuple[list[list[int]], type[CalibError], str]] = [
        ([[2], [1]], InputError, "the index has 2 classes"),
        ([[4], [1], [3]], InputError, "keeps category 3 in image 4"),
    ]
    for lists, error, message in cases:
        with pytest.raises(error, match=message):
            build(source, tmp_path / "o.json", read_index(write_index(tmp_path, "npz", lists)))
    (tmp_path / "bad.pt").write_bytes(pickle.dumps({1: [3]}))
    with pytest.raises(FormatError, match="no dict of classes"):
        read_index(tmp_path / "bad.pt")
    np.savez(tmp_path / "bad.npz", image_ids=np.arange(3), class_offsets=np.asarray([0, 2]))
    with pytest.raises(FormatError, match="do not divide 3 image_ids"):
        read_index(tmp_path / "bad.npz")
    with pytest.raises(SettingError, match="ratio is 2"):
        Profile(2)
    (tmp_path / "o.json").write_text("")
    with pytest.raises(ExistsError):
        build(source, tmp_path / "o.json", Profile())
    assert "one of --index and --ratio" in fails(
        "data", "coco-lt", "--annotations", source, "--out", tmp_path / "p.json"
    )
