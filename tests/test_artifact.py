"""Heads on disk: the same bits come back, and what is damaged, foreign or in the way is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.artifact import Artifact, HeadInfo, check_fits, describe, load, save
from calib.cache import Cache
from calib.errors import CalibError, ExistsError, FormatError, InputError, MissingFileError, VersionError
from calib.heads.detector import detector_head
from calib.layout import DESCRIPTION, TENSORS


@pytest.fixture
def artifact(val_cache: Cache) -> Artifact:
    return Artifact(detector_head(val_cache), HeadInfo.of(val_cache, "softmax", {}, 7, [(0, 2.5)]))


@pytest.fixture
def saved(artifact: Artifact, tmp_path: Path) -> Path:
    save(tmp_path / "models" / "softmax" / "1", artifact)
    return tmp_path / "models" / "softmax" / "1"


def test_a_head_comes_back_with_the_same_bits(saved: Path, artifact: Artifact, val_cache: Cache) -> None:
    back = load(saved)
    assert back.info == artifact.info and not back.head.training
    x = torch.from_numpy(val_cache.features.read(0, 200))
    assert torch.equal(back.head.scores(x), artifact.head.scores(x))
    assert not any(p.requires_grad for p in back.head.parameters())
    assert sorted(p.name for p in saved.iterdir()) == [DESCRIPTION, TENSORS]
    assert [p.name for p in saved.parent.iterdir()] == ["1"]


def test_a_head_is_described_without_being_built(saved: Path, artifact: Artifact) -> None:
    head, described = artifact.head, describe(saved)
    assert (described.kind, described.info, described.feature_size) == (head.kind, artifact.info, head.feature_size)
    assert described.parameters == sum(t.numel() for t in head.state_dict().values())


def test_saving_again_gives_the_same_bytes(
    saved: Path, artifact: Artifact, tmp_path: Path, content: Callable[[Path], dict[str, bytes]]
) -> None:
    save(tmp_path / "again", load(saved))
    assert content(tmp_path / "again") == content(saved)


def test_a_head_is_replaced_only_when_asked(saved: Path, artifact: Artifact) -> None:
    other = replace(artifact, info=replace(artifact.info, seed=8))
    with pytest.raises(ExistsError, match=r"models/softmax/1 exists") as e:
        save(saved, other)
    assert "--overwrite" in e.value.hint and load(saved).info.seed == 7
    save(saved, other, overwrite=True)
    assert load(saved).info.seed == 8 and [p.name for p in saved.parent.iterdir()] == ["1"]


@pytest.mark.parametrize("name", ["notes.txt", "1/head.json"])
def test_what_is_no_head_is_never_replaced(
    artifact: Artifact, tmp_path: Path, content: Callable[[Path], dict[str, bytes]], name: str
) -> None:
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ExistsError, match="is no head folder"):
        save(tmp_path / "mine", artifact, overwrite=True)
    assert content(tmp_path / "mine") == {name: b"mine"}


@pytest.mark.parametrize("name", [DESCRIPTION, TENSORS])
def test_missing_files_are_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(MissingFileError, match=name):
        load(saved)
    with pytest.raises(MissingFileError, match="head not found"):
        load(saved.parent / "2")


def test_damaged_tensors_are_refused(saved: Path) -> None:
    whole = (saved / TENSORS).read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for content in (b"", whole[:100], whole[:-1], flipped):
        (saved / TENSORS).write_bytes(content)
        with pytest.raises(FormatError, match=rf"{TENSORS} is damaged"):
            load(saved)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: d.update(format="else"), FormatError, "does not describe a calib head"),
        (lambda d: d.update(version=2), VersionError, "format version 2; this calib reads version 1"),
        (lambda d: d.pop("tensors_xxh3"), FormatError, "is damaged"),
        (lambda d: d.pop("head"), FormatError, "cannot be loaded: 'head'"),
        (lambda d: d["head"].update(kind="os:system"), FormatError, "cannot be loaded: 'os:system'"),
        (lambda d: d["head"]["config"]["classifier"].update(outputs=5), FormatError, "cannot be loaded"),
        (lambda d: d["info"].pop("seed"), FormatError, "cannot be loaded.*seed"),
        (lambda d: d["info"].update(more=1), FormatError, "cannot be loaded.*more"),
        (lambda d: d["info"]["category_ids"].pop(), FormatError, "has 192 classes and 191 category ids"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    saved: Path, change: Callable[[dict[str, Any]], object], error: type[CalibError], message: str
) -> None:
    description = json.loads((saved / DESCRIPTION).read_text())
    change(description)
    (saved / DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(error, match=message) as e:
        load(saved)
    assert str(saved) in str(e.value)


def test_a_head_fits_the_caches_of_its_detector_only(saved: Path, artifact: Artifact, val_cache: Cache) -> None:
    check_fits(artifact, val_cache, saved)
    other = replace(artifact, info=replace(artifact.info, detector_digest="0"))
    with pytest.raises(InputError, match=rf"{saved} was fitted for detector 0; cache {val_cache.path} was written by"):
        check_fits(other, val_cache, saved)
    ids = replace(artifact, info=replace(artifact.info, category_ids=[1] * 192))
    with pytest.raises(InputError, match="different categories"):
        check_fits(ids, val_cache, saved)
