"""``calib data split``: every image in one part, nothing lost, shares kept, rare categories in all parts."""

import copy
import gzip
import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.annotations import Annotations
from calib.cache import Categories
from calib.data.shares import fold_shares, parse_shares, sizes, weights
from calib.data.split import Division, split_file, split_images
from calib.errors import CalibError, ExistsError, FormatError, InputError, SettingError, ShapeError, UnknownNameError
from calib.evaluate import GroundTruth
from calib.extract.dataset import Dataset

Calib = Callable[..., Any]
Fails = Callable[..., str]
Document = dict[str, Any]
HALVES = {"a": 0.5, "b": 0.5}


def document(n_images: int, objects: list[tuple[int, int]], n_categories: int = 5) -> Document:
    """LVIS-like; ``objects`` are of (image, category), numbered from 0. Ids have gaps and stand in no order."""
    return {
        "info": {"year": 2020},
        "licenses": [{"id": 1, "name": "CC BY 4.0"}],
        "images": [
            {
                "id": 3 * i + 1,
                "file_name": f"scene{i // 4:02d}_{i}.jpg",
                "height": 9,
                "width": 9,
                "scene": i // 4,
                "neg_category_ids": [10 * (i % n_categories) + 2],
                "not_exhaustive_category_ids": [],
                "mine": {"kept": i},
            }
            for i in reversed(range(n_images))
        ],
        "annotations": [
            {"id": k, "image_id": 3 * i + 1, "category_id": 10 * c + 2, "bbox": [0, 0, 2, 2], "area": 4, "mine": k}
            for k, (i, c) in enumerate(objects)
        ],
        "categories": [
            {"id": 10 * c + 2, "name": f"c{c}", "instance_count": 9 * 10**c, "image_count": 5 * 10**c, "frequency": "r"}
            for c in reversed(range(n_categories))
        ],
        "captions": [{"image_id": 3 * i + 1, "text": f"picture {i}"} for i in range(n_images)],
    }


# Categories 0 to 4 are in 2, 2, 4, 10 and 24 of 40 images, frequent ones several times; 14 images have none.
IMAGES = [(0, 0), (1, 0), (1, 1), (2, 1), *((i, 2) for i in range(2, 6)), *((i, 3) for i in range(4, 14))]
OBJECTS = [*IMAGES, *((i, 4) for i in range(2, 26)), *((i, 4) for i in range(10, 20))]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "val.json"
    path.write_text(json.dumps(document(40, OBJECTS)))
    return path


def load(path: Path) -> Document:
    found: Document = json.loads(path.read_bytes())
    return found


def read(doc: Document) -> Annotations:
    return Annotations.from_document(doc, Path("val.json"))


# Images, objects, groups, shares, seed.
drawn = st.integers(4, 40).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, 4)), max_size=80),
        st.none() | st.lists(st.integers(0, 9), min_size=n, max_size=n).filter(lambda g: len(set(g)) > 3),
        st.lists(st.integers(1, 9), min_size=2, max_size=4),
        st.integers(0, 2**40),
    )
)


@given(drawn, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_every_image_is_in_one_part_of_its_size_and_groups_are_whole(case: Any, random: Any) -> None:
    n, objects, groups, wanted, seed = case
    shares = {f"part{j}": Fraction(w, sum(wanted)) for j, w in enumerate(wanted)}
    doc = document(n, objects)
    group = None if groups is None else np.array(groups)
    parts = split_images(read(doc), shares, groups=group, seed=seed)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == [3 * i + 1 for i in range(n)]
    assert all((np.diff(ids) > 0).all() for ids in parts.values())

    # A group that fits nowhere goes to where most room is, which it exceeds by less than its size.
    largest = 1 if groups is None else max(Counter(groups).values())
    for ids, size in zip(parts.values(), sizes(weights(shares), n), strict=True):
        assert len(ids) >= 1 and abs(len(ids) - size) <= (len(wanted) - 1) * (largest - 1)
    if groups is not None:
        found = [{groups[(i - 1) // 3] for i in ids.tolist()} for ids in parts.values()]
        assert sum(map(len, found)) == len(set(groups))

    for key in ("images", "annotations", "categories"):
        random.shuffle(doc[key])
    again = split_images(read(doc), shares, groups=group, seed=seed)
    assert all(np.array_equal(parts[name], again[name]) for name in shares)


def test_another_seed_divides_otherwise() -> None:
    found = {tuple(split_images(read(document(40, OBJECTS)), HALVES, seed=s)["a"].tolist()) for s in range(5)}
    assert len(found) == 5


@pytest.mark.parametrize("seed", range(8))
def test_categories_and_images_without_objects_have_their_shares(seed: int) -> None:
    parts = split_images(read(document(40, OBJECTS)), {"tune": 0.4, "test": 0.6}, seed=seed)
    images = {name: {(i - 1) // 3 for i in ids.tolist()} for name, ids in parts.items()}
    of = [{i for i, c in OBJECTS if c == k} for k in range(5)]
    assert {name: len(i) for name, i in images.items()} == {"tune": 16, "test": 24}
    for k, wanted in enumerate((1, 1, 1.6, 4, 9.6)):
        assert abs(len(of[k] & images["tune"]) - wanted) <= 1
        assert of[k] & images["tune"] and of[k] & images["test"]
    assert abs(len(images["tune"] - set.union(*of)) - 0.4 * 14) < 1


def test_crowds_and_ignored_objects_are_no_objects() -> None:
    doc = document(20, [(i, 0) for i in range(10)])
    for a in doc["annotations"]:
        a["iscrowd" if a["id"] % 2 else "ignore"] = 1
    doc["annotations"] += document(20, [(i, 1) for i in range(0, 20, 5)])["annotations"]
    for k, a in enumerate(doc["annotations"]):
        a["id"] = k
    parts = split_images(read(doc), HALVES)
    assert sorted(sum((i - 1) // 3 % 5 == 0 for i in ids.tolist()) for ids in parts.values()) == [2, 2]


def test_nothing_is_lost_and_each_part_says_what_it_is(source: Path, calib: Calib, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = calib("data", "split", source, "--into", "tune=0.4,test=0.6", "--seed", 3, "--out", out, "--json")
    assert done.exit_code == 0, done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["test.json", "tune.json"]
    whole, tune, test = load(source), load(out / "tune.json"), load(out / "test.json")
    assert list(tune) == list(whole)
    for key, name in (("images", "id"), ("annotations", "image_id"), ("captions", "image_id")):
        ids = {row["id"] for row in tune["images"]}
        assert tune[key] == [row for row in whole[key] if row[name] in ids]
        assert test[key] == [row for row in whole[key] if row[name] not in ids]
    for part, name in ((tune, "tune"), (test, "test")):
        assert part["licenses"] == whole["licenses"] and part["categories"] == whole["categories"]
        assert part["info"]["year"] == 2020
        about = part["info"]["calib_split"]
        assert (about["part"], about["seed"], about["source"]) == (name, 3, "val.json")
        assert about["shares"] == {"tune": 0.4, "test": 0.6} and len(about["source_xxh3_64"]) == 16
        assert (about["is_rest"], about["images"]) == (False, len(part["images"]))
        GroundTruth.from_document(part)
    summary = json.loads(done.stdout)
    assert (summary["out"], summary["seed"], summary["counts"]) == (str(out), 3, "counts in the file")
    metrics = summary["parts"]["tune"]
    assert (metrics["images"], metrics["share"], metrics["wanted"]) == (16, 0.4, 0.4)
    assert metrics["objects"] == len(tune["annotations"]) and metrics["lacking"] == []
    assert [b["bin"] for b in metrics["per_bin"]] == ["<10", "10-99", "100-999", ">=1000"]
    assert [b["categories"] for b in metrics["per_bin"]] == [1, 1, 1, 2]
    assert sum(b["objects"] for b in metrics["per_bin"]) == metrics["objects"]


def test_the_table_has_every_part_and_what_it_lacks(calib: Calib, tmp_path: Path) -> None:
    (tmp_path / "val.json").write_text(json.dumps(document(20, [(0, 0), *((i, 1) for i in range(9))])))
    done = calib("data", "split", tmp_path / "val.json", "--into", "left=1/2,right=1/2", "--out", tmp_path / "o")
    assert done.exit_code == 0, done.stderr
    assert all(word in done.stdout for word in ("left", "right", "<10", ">=1000", "without objects", "c0"))
    grouped = calib(
        "data", "split", tmp_path / "val.json", "--folds", 2, "--group-by", "scene", "--out", tmp_path / "g"
    )
    assert "groups" in grouped.stdout and "groups" not in done.stdout


def test_a_part_can_be_divided_again(source: Path, tmp_path: Path) -> None:
    split_file(source, tmp_path / "o", Division(HALVES))
    split_file(tmp_path / "o" / "a.json", tmp_path / "p", Division({"x": 0.5, "y": 0.5}))
    about = load(tmp_path / "p" / "x.json")["info"]["calib_split"]
    assert about["part"] == "x" and about["earlier"]["part"] == "a"


def test_folds_and_their_rests(source: Path, calib: Calib, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert calib("data", "split", source, "--folds", 4, "--rest", "--out", out).exit_code == 0
    names = [f"fold{k}{end}.json" for k in range(4) for end in ("", "-rest")]
    assert sorted(p.name for p in out.iterdir()) == sorted(names)
    whole = {row["id"] for row in load(source)["images"]}
    held_out = [{row["id"] for row in load(out / f"fold{k}.json")["images"]} for k in range(4)]
    assert set.union(*held_out) == whole and sum(map(len, held_out)) == len(whole)
    for k in range(4):
        rest = load(out / f"fold{k}-rest.json")
        assert {row["id"] for row in rest["images"]} == whole - held_out[k]
        assert {a["image_id"] for a in rest["annotations"]} <= whole - held_out[k]
        assert rest["info"]["calib_split"]["part"] == f"fold{k}" and rest["info"]["calib_split"]["is_rest"]


@pytest.mark.parametrize("group_by", ["scene", r"file_name:^scene\d+", r"file_name:^(scene)(\d+)_", "file_name:[^_]*"])
def test_groups_stay_whole(group_by: str, source: Path, tmp_path: Path) -> None:
    parts = split_file(source, tmp_path / "o", Division({"a": 0.4, "b": 0.6}, group_by=group_by))
    a, b = ({row["scene"] for row in load(tmp_path / "o" / f"{n}.json")["images"]} for n in "ab")
    assert not a & b and a | b == set(range(10))
    assert [parts.record()["parts"][n]["groups"] for n in "ab"] == [4, 6]


def test_a_group_larger_than_its_part_is_told_of(source: Path, calib: Calib, tmp_path: Path) -> None:
    doc = load(source)
    for k, row in enumerate(doc["images"]):
        row["scene"] = max(0, k - 30)
    source.write_text(json.dumps(doc))
    args = ("data", "split", source, "--group-by", "scene", "--into", "a=0.4,b=0.6", "--out", tmp_path / "o", "--json")
    done = calib(*args)
    assert done.exit_code == 0 and "31 of 40 images" in done.stderr
    assert json.loads(done.stdout)["parts"]["b"]["images"] == 31


def test_counts_stay_those_of_train(source: Path, tmp_path: Path) -> None:
    """Never a part's own: calib would take them for the counts of TRAIN."""
    whole = Categories.of(Annotations.read(source))
    split_file(source, tmp_path / "o", Division(HALVES))
    assert np.array_equal(Dataset.read(tmp_path / "o" / "a.json").categories.instance_count, whole.instance_count)

    coco = load(source)
    for row in coco["categories"]:
        del row["instance_count"], row["image_count"], row["frequency"]
    source.write_text(json.dumps(coco))
    parts = split_file(source, tmp_path / "p", Division(HALVES))
    assert parts.counted == "annotations of the file" and any("TRAIN counts" in text for text in parts.notices)
    assert load(tmp_path / "p" / "a.json")["categories"] == coco["categories"]


def test_counts_from_train_are_written_into_the_parts(source: Path, calib: Calib, tmp_path: Path) -> None:
    train = document(9, [(0, 0), *[(i, 1) for i in range(9)] * 2, *[(1, 4)] * 1200])
    for row in train["categories"]:
        del row["instance_count"], row["image_count"], row["frequency"]
    (tmp_path / "train.json").write_text(json.dumps(train))
    args = ["--into", "a=0.5,b=0.5", "--counts-from", tmp_path / "train.json", "--json", "--bins", "2,100"]
    done = calib("data", "split", source, *args, "--out", tmp_path / "o")
    assert done.exit_code == 0 and "TRAIN" not in done.stderr
    written = {row["id"]: row for row in load(tmp_path / "o" / "a.json")["categories"]}
    assert [written[i]["instance_count"] for i in (2, 12, 22, 32, 42)] == [1, 18, 0, 0, 1200]
    assert [written[i]["image_count"] for i in (2, 12, 22, 32, 42)] == [1, 9, 0, 0, 1]
    assert written[2]["frequency"] == "r" and list(written) == [42, 32, 22, 12, 2]
    summary = json.loads(done.stdout)
    assert summary["counts"] == "from train.json"
    assert [b["categories"] for b in summary["parts"]["b"]["per_bin"]] == [3, 1, 1]


@pytest.mark.parametrize("kind", ["coco", "not annotated", "gzip", "whole floats", "no info", "odd info", "no objects"])
def test_kinds_of_files(kind: str, source: Path, tmp_path: Path) -> None:
    doc = load(source)
    if kind == "coco":
        for row in doc["images"]:
            del row["neg_category_ids"], row["not_exhaustive_category_ids"]
    elif kind == "not annotated":
        del doc["annotations"]
        for row in doc["images"]:
            del row["neg_category_ids"], row["not_exhaustive_category_ids"]
    elif kind == "whole floats":
        for row in doc["images"]:
            row["id"] = float(row["id"])
    elif kind == "no info":
        del doc["info"]
    elif kind == "odd info":
        doc["info"] = "from a camera"
    elif kind == "no objects":
        doc["annotations"] = []
    content = json.dumps(doc).encode()
    source.write_bytes(gzip.compress(content) if kind == "gzip" else content)
    split_file(source, tmp_path / "o", Division(HALVES, counts_from=None))
    parts = [load(tmp_path / "o" / f"{name}.json") for name in HALVES]
    assert [len(part["images"]) for part in parts] == [20, 20]
    for key in ("images", "annotations"):
        assert [key in part for part in parts] == [key in doc] * 2
        rows = [str(row) for part in parts for row in part.get(key, [])]
        assert sorted(rows) == sorted(map(str, doc.get(key, [])))
    assert [Annotations.from_document(part, tmp_path).style for part in parts] == [read(doc).style] * 2
    if kind == "odd info":
        assert parts[0]["info"]["info"] == "from a camera"


def test_lists_that_do_not_name_images_of_the_file_go_into_every_part(source: Path, tmp_path: Path) -> None:
    doc = load(source)
    doc |= {"captions": [*doc["captions"], {"image_id": 99999}], "notes": [{"image_id": None}], "version": 7}
    source.write_text(json.dumps(doc))
    split_file(source, tmp_path / "o", Division(HALVES))
    for name in HALVES:
        part = load(tmp_path / "o" / f"{name}.json")
        assert {k: part[k] for k in ("captions", "notes", "version")} == {
            k: doc[k] for k in ("captions", "notes", "version")
        }


def test_files_that_are_there_are_replaced_only_on_request(source: Path, fails: Fails, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split_file(source, out, Division(HALVES))
    before = (out / "a.json").read_bytes()
    with pytest.raises(ExistsError):
        split_file(source, out, Division({"new": 0.5, "b": 0.5}, seed=1))
    assert sorted(p.name for p in out.iterdir()) == ["a.json", "b.json"]
    assert "--overwrite" in fails("data", "split", source, "--into", "a=0.5,b=0.5", "--out", out)
    split_file(source, out, Division(HALVES, seed=1), overwrite=True)
    assert (out / "a.json").read_bytes() != before


def test_folds_of_another_division_are_not_mixed_with_new_ones(source: Path, tmp_path: Path) -> None:
    split_file(source, tmp_path / "o", Division(fold_shares(4)))
    with pytest.raises(ExistsError, match=r"fold3\.json"):
        split_file(source, tmp_path / "o", Division(fold_shares(3)), overwrite=True)
    split_file(source, tmp_path / "o", Division(fold_shares(4), seed=1), overwrite=True)


def test_the_source_is_never_written_over(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(SettingError):
        split_file(source, tmp_path, Division({"val": 0.5, "other": 0.5}), overwrite=True)
    assert source.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["val.json"]


def test_all_files_or_none(source: Path, tmp_path: Path) -> None:
    """The last part holds text that JSON cannot."""
    doc = load(source)
    ids = split_images(read(doc), {"a": 0.9, "b": 0.1})["b"].tolist()
    next(row for row in doc["images"] if row["id"] == ids[0])["mine"] = "\ud800"
    source.write_text(json.dumps(doc))
    with pytest.raises(FormatError):
        split_file(source, tmp_path / "o", Division({"a": 0.9, "b": 0.1}))
    assert list((tmp_path / "o").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tune=0.4,test=0.5", "sum to 0.9"),
        ("tune=0.33,test=0.33,more=0.33", "sum to 0.99"),
        ("tune=0.4,test=0.6,more=0", "'more' is 0"),
        ("tune=-0.4,test=1.4", "'-0.4'"),
        ("tune=1/0,test=1", "'1/0'"),
        ("tune=nan,test=1", "'nan'"),
        ("tune=1e-1,test=0.9", "'1e-1'"),
        ("tune=,test=1", "'tune' is ''"),
        ("tune=0.5,tune=0.5", "named twice"),
        ("tune=0.5,Tune=0.5", "in case only"),
        ("a/b=0.5,c=0.5", "'a/b' is no name"),
        ("..=0.5,c=0.5", "'..' is no name"),
        ("=0.5,c=0.5", "'' is no name"),
        ("tune:0.5,test=0.5", "'tune:0.5' is no NAME=SHARE"),
        ("", "'' is no NAME=SHARE"),
        ("all=1", "at least 2"),
    ],
)
def test_bad_shares_are_refused(text: str, message: str, source: Path, fails: Fails, tmp_path: Path) -> None:
    with pytest.raises(SettingError):
        parse_shares(text)
    assert message in fails("data", "split", source, "--into", text, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_shares_are_numbers_or_fractions_and_thousandths_are_rounding() -> None:
    assert parse_shares("a=1/3, b=2/3") == {"a": Fraction(1, 3), "b": Fraction(2, 3)}
    assert list(parse_shares("a=.333,b=.333,c=.333")) == ["a", "b", "c"]
    assert sizes([333, 333, 333], 10) == [4, 3, 3] and sizes([1, 99], 10) == [1, 9] and sizes([4, 6], 2) == [1, 1]
    with pytest.raises(SettingError):
        split_images(read(document(9, [])), {"a": float("inf"), "b": 0.5})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"group_by": "scenes"}, UnknownNameError, "Did you mean 'scene'"),
        ({"group_by": "mine"}, InputError, r"images\[0\] has no text or number in 'mine'"),
        ({"group_by": r"file_name:^(scene0\d)_1"}, InputError, "matches"),
        ({"group_by": "file_name:(("}, SettingError, "no regular expression"),
        ({"group_by": "height"}, InputError, "1 groups of images"),
        ({"shares": fold_shares(41)}, InputError, "40 images"),
        ({"counts_from": Path("absent.json")}, CalibError, "absent.json"),
        ({"seed": -1}, SettingError, "seed"),
        ({"bins": (10, 5)}, SettingError, "ascending"),
        ({"shares": {"a": 0.5, "a-rest": 0.5}, "rest": True}, SettingError, "the rest of another"),
    ],
)
def test_what_cannot_be_divided(
    changed: dict[str, Any], error: type[CalibError], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        split_file(source, tmp_path / "o", Division(**({"shares": HALVES} | changed)))
    assert not (tmp_path / "o").exists()


def test_fields_that_some_images_lack_are_no_groups(source: Path, tmp_path: Path) -> None:
    doc = load(source)
    del doc["images"][7]["scene"]
    source.write_text(json.dumps(doc))
    with pytest.raises(InputError, match=r"images\[7\]"):
        split_file(source, tmp_path / "o", Division(HALVES, group_by="scene"))


def test_groups_are_one_number_per_image() -> None:
    with pytest.raises(ShapeError):
        split_images(read(document(9, [])), HALVES, groups=np.zeros(8, np.int64))


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_images_than_parts(n: int, source: Path, fails: Fails, tmp_path: Path) -> None:
    source.write_text(json.dumps(document(n, [(0, 0)] * n)))
    assert f"has {n} images" in fails("data", "split", source, "--folds", 2, "--out", tmp_path / "o")


def test_the_command_takes_parts_or_folds(source: Path, fails: Fails, tmp_path: Path) -> None:
    for more in ([], ["--folds", 2, "--into", "a=0.5,b=0.5"]):
        assert "one of --into and --folds" in fails("data", "split", source, *more, "--out", tmp_path / "o")
    assert "at least 2" in fails("data", "split", source, "--folds", 1, "--out", tmp_path / "o")
    assert "whole numbers" in fails("data", "split", source, "--folds", 2, "--bins", "x", "--out", tmp_path / "o")


def test_the_document_is_left_as_it_is(source: Path) -> None:
    doc = load(source)
    before = copy.deepcopy(doc)
    split_images(read(doc), HALVES)
    assert doc == before
