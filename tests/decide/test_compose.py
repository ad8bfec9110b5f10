"""Combining fitted heads, and choosing a setting on a tune cache."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.artifact import load
from calib.cache import Cache
from calib.decide.assess import ground_truth
from calib.decide.choose import choose
from calib.decide.compose import combine
from calib.evaluate import GroundTruth
from calib.training import train

from ..toy import Toy


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    cache = Toy().write(folder / "cache")
    train("softmax", cache, folder / "softmax")
    train("crt", cache, folder / "crt", {"steps": 20, "rows_per_step": 40})
    train("bags", cache, folder / "bags", {"steps": 5})
    train("softmax", Toy(seed=1).write(folder / "other-cache"), folder / "other-detector")
    return folder


@pytest.mark.parametrize("kind", ["dual", "average", "select"])
def test_what_is_combined_is_what_the_parts_say(kind: str, models: Path, tmp_path: Path) -> None:
    threshold = None if kind == "average" else 12
    combine(kind, models / "softmax", models / "crt", tmp_path / "1", threshold=threshold)
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    one, other, both = (load(p).head.full_scores(x) for p in (models / "softmax", models / "crt", tmp_path / "1"))
    rare = torch.tensor(load(models / "crt").info.instance_counts) <= 12
    if kind == "average":
        torch.testing.assert_close(both, (one + other) / 2)
    elif kind == "dual":
        torch.testing.assert_close(both[:, :-1][:, rare], other[:, :-1][:, rare])
        torch.testing.assert_close(both[:, :-1][:, ~rare], one[:, :-1][:, ~rare])
    else:
        for i in range(30):
            top = int(other[i].argmax())
            taken = int(one[i].argmax()) != 7 and top != 7 and bool(rare[top])
            torch.testing.assert_close(both[i], other[i] if taken else one[i])


def test_combinations_combine(models: Path, tmp_path: Path) -> None:
    combine("average", models / "softmax", models / "crt", tmp_path / "a")
    combine("dual", tmp_path / "a", models / "bags", tmp_path / "b", threshold=5)
    x = torch.randn(4, 8)
    scores = load(tmp_path / "b").head.scores(x)
    assert torch.equal(load(tmp_path / "b").head.scores(x), scores)
    assert load(tmp_path / "b").info.settings["one"]["method"] == "combine"


def test_the_command(models: Path, tmp_path: Path, calib: Callable[..., Any], fails: Callable[..., str]) -> None:
    one, other, out = models / "softmax", models / "crt", tmp_path / "1"
    done = calib("combine", "dual", "--one", one, "--other", other, "--out", out, "--threshold", 5, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["threshold"] == 5
    assert "exists" in fails("combine", "dual", "--one", one, "--other", other, "--out", out)
    new = tmp_path / "2"
    assert "expected one of" in fails("combine", "triple", "--one", one, "--other", other, "--out", new)
    assert "takes none" in fails("combine", "average", "--one", one, "--other", other, "--out", new, "--threshold", 5)
    strange = models / "other-detector"
    assert "different detectors" in fails("combine", "dual", "--one", one, "--other", strange, "--out", new)
    assert "not found" in fails("combine", "dual", "--one", one, "--other", models / "nothing", "--out", new)
    assert not new.exists()


def test_the_ground_truth_of_a_cache_is_that_of_its_file(val_cache: Cache, shapes_set: Path) -> None:
    ours, theirs = ground_truth(val_cache), GroundTruth.read(shapes_set / "val.json")
    assert (ours.labels == theirs.labels).all() and (ours.category == theirs.category).all()
    assert (ours.area == theirs.area).all() and abs(ours.box - theirs.box).max() < 1e-9
    assert (ours.instance_count == theirs.instance_count).all() and ours.frequency == theirs.frequency


def test_the_best_value_on_tune_wins(train_cache: Cache, val_cache: Cache, tmp_path: Path) -> None:
    choice = choose("tau-norm", train_cache, val_cache, "tau", ["0", "0.5", "3"], {})
    assert set(choice.tried) == {"0", "0.5", "3"}
    assert choice.tried[choice.value] == max(choice.tried.values()) > choice.tried["3"]


def test_choosing_from_the_command_line(
    train_cache: Cache, val_cache: Cache, tmp_path: Path, calib: Callable[..., Any], fails: Callable[..., str]
) -> None:
    base = ["train", "tau-norm", "--cache", train_cache.path, "--out", tmp_path / "1"]
    done = calib(*base, "--tune", val_cache.path, "--choose", "tau=0,3", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["chosen"] == {"tau": "0"} and report["settings"]["tau"] == 0
    base[-1] = tmp_path / "2"
    assert "belong together" in fails(*base, "--choose", "tau=1,2")
    assert "belong together" in fails(*base, "--tune", val_cache.path)
    assert "unknown setting" in fails(*base, "--tune", val_cache.path, "--choose", "tua=1,2")
    assert "no value" in fails(*base, "--tune", val_cache.path, "--choose", "tau=")
    assert "--mode train" in fails(*base, "--tune", train_cache.path, "--choose", "tau=1")
