"""Training as a whole: same request, same bytes, also after kill -9; and what cannot be trained is refused."""

import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.artifact import load
from calib.cache import Cache
from calib.errors import (
    ExistsError,
    FitError,
    InputError,
    NonFiniteError,
    SettingError,
    UnknownNameError,
    UnsupportedError,
)
from calib.files import lock
from calib.layout import LOCK
from calib.training import train

Content = Callable[[Path], dict[str, bytes]]
QUICK: dict[str, Any] = {"steps": 40, "warmup_steps": 0, "checkpoint_every": 10, "lr": 0.1}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_same_request_gives_the_same_bytes(train_cache: Cache, tmp_path: Path, content: Content) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train("crt", train_cache, tmp_path / name, QUICK, seed=seed)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a")["head.safetensors"] != content(tmp_path / "c")["head.safetensors"]
    assert names(tmp_path) == ["a", "b", "c"]


def test_everything_about_the_run_is_in_the_head(train_cache: Cache, tmp_path: Path) -> None:
    train("crt", train_cache.path, tmp_path / "h", {"lr": "0.05", "steps": 3, "warmup_steps": 0}, seed=5)
    info = load(tmp_path / "h").info
    assert (info.method, info.seed, info.cache_digest) == ("crt", 5, train_cache.digest)
    assert info.settings["loop"]["lr"] == 0.05 and info.settings["loop"]["steps"] == 3
    assert info.detector_digest == train_cache.manifest.detector.digest
    assert info.instance_counts == train_cache.categories.instance_count.tolist()
    assert [step for step, _ in info.losses] == [0, 2]


class StopError(Exception):
    """Stands for a process that ends in the midst."""


class StoppingBar:
    """A bar that stops the training at its n-th step."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, label: str, *, total: int, unit: str) -> Any:
        from contextlib import nullcontext

        return nullcontext(self)

    def advance(self, n: int = 1, **metrics: float) -> None:
        self.left -= n
        if self.left < 0:
            raise StopError


@pytest.mark.parametrize(("method", "options"), [("crt", {}), ("bags", {}), ("disalign", {}), ("simcal", {})])
@pytest.mark.parametrize("at", [5, 10, 33])
def test_interrupted_it_ends_in_the_same_bytes(
    train_cache: Cache, tmp_path: Path, content: Content, method: str, options: dict[str, Any], at: int
) -> None:
    settings = QUICK | options
    if method in ("bags", "disalign"):
        settings = settings | {"chunks": 1}
    train(method, train_cache, tmp_path / "whole", settings)
    with pytest.raises(StopError):
        train(method, train_cache, tmp_path / "cut", settings, progress=StoppingBar(at))
    assert not (tmp_path / "cut").exists()
    assert (tmp_path / ".cut.training").exists() == (at >= 10)
    resumed: list[int] = []

    class Note(StoppingBar):
        def advance(self, n: int = 1, **metrics: float) -> None:
            resumed.append(n)

    train(method, train_cache, tmp_path / "cut", settings, progress=Note(0))
    assert resumed[0] == at // 10 * 10  # it went on from the last checkpoint
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert names(tmp_path) == ["cut", "whole"]


def test_checkpoints_of_other_settings_are_not_used(train_cache: Cache, tmp_path: Path, content: Content) -> None:
    """Both runs share loop, seed and cache; only what the sampler does differs."""
    few, many = QUICK | {"background_share": 0.1}, QUICK | {"background_share": 0.9}
    with pytest.raises(StopError):
        train("crt", train_cache, tmp_path / "a", few, progress=StoppingBar(25))
    train("crt", train_cache, tmp_path / "a", many)
    train("crt", train_cache, tmp_path / "b", many)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert names(tmp_path) == ["a", "b"]


def test_a_damaged_checkpoint_is_not_used(train_cache: Cache, tmp_path: Path, content: Content) -> None:
    with pytest.raises(StopError):
        train("crt", train_cache, tmp_path / "a", QUICK, progress=StoppingBar(25))
    (tensors,) = (tmp_path / ".a.training").rglob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:100])
    train("crt", train_cache, tmp_path / "a", QUICK)
    train("crt", train_cache, tmp_path / "b", QUICK)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_killed_and_run_again_the_command_ends_in_the_same_bytes(
    train_cache: Cache,
    tmp_path: Path,
    content: Content,
    start: Callable[..., subprocess.Popen[str]],
    calib: Callable[..., Any],
) -> None:
    arguments = ["train", "crt", "--cache", train_cache.path, "--device", "cpu"]
    for key, value in (QUICK | {"steps": 400}).items():
        arguments += ["--set", f"{key}={value}"]
    process = start(*arguments, "--out", tmp_path / "killed")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".killed.training/*/*/state.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed").exists()
    for name in ("killed", "whole"):
        outcome = calib(*arguments, "--out", tmp_path / name)
        assert outcome.exit_code == 0, outcome.output
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert names(tmp_path) == ["killed", "whole"]


def test_a_training_that_diverges_leaves_nothing(train_cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(FitError, match="crt") as e:
        train("crt", train_cache, tmp_path / "h", {"lr": 1e38, "steps": 60, "warmup_steps": 0, "checkpoint_every": 1})
    assert "lower the rate" in e.value.hint
    assert names(tmp_path) == []


def test_an_existing_head_is_kept(train_cache: Cache, tmp_path: Path) -> None:
    train("softmax", train_cache, tmp_path / "h")
    with pytest.raises(ExistsError, match="h exists"):
        train("softmax", train_cache, tmp_path / "h", seed=1)
    train("softmax", train_cache, tmp_path / "h", seed=1, overwrite=True)
    assert load(tmp_path / "h").info.seed == 1


def test_a_folder_of_other_things_is_not_overwritten(train_cache: Cache, tmp_path: Path, content: Content) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    with pytest.raises(ExistsError, match="work is no head folder"):
        train("softmax", train_cache, tmp_path / "work", overwrite=True)
    assert content(tmp_path) == {"work/thesis.txt": b"mine"}


def test_what_cannot_be_trained_is_refused(train_cache: Cache, val_cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "h"
    with pytest.raises(UnknownNameError, match=r"unknown method 'bag'\. Did you mean 'bags'"):
        train("bag", train_cache, out)
    with pytest.raises(SettingError, match=r"unknown setting 'betta'\. Did you mean 'beta'"):
        train("bags", train_cache, out, {"betta": 1})
    with pytest.raises(SettingError, match="seed is -1"):
        train("bags", train_cache, out, seed=-1)
    with pytest.raises(UnsupportedError, match=r"bags learns from labelled proposals; .* --mode test") as e:
        train("bags", val_cache, out)
    assert "--mode train" in e.value.hint
    sigmoid = Cache(train_cache.path)
    sigmoid.manifest = replace(sigmoid.manifest, detector=replace(sigmoid.manifest.detector, activation="sigmoid"))
    with pytest.raises(UnsupportedError, match="simcal is defined for softmax detectors"):
        train("simcal", sigmoid, out)
    assert names(tmp_path) == []


def test_features_that_are_not_finite_stop_the_training(
    train_cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(train_cache.path)
    real = cache.features.stored

    def spoil(rows: Any, out: Any = None) -> Any:
        out = real(rows, out)
        out[:] = np.nan
        return out

    monkeypatch.setattr(cache.features, "stored", spoil)
    with pytest.raises(NonFiniteError, match=f"cache {cache.path} holds NaN"):
        train("crt", cache, tmp_path / "h", QUICK)
    assert names(tmp_path) == []


def test_a_cache_without_foreground_is_refused(train_cache: Cache, tmp_path: Path) -> None:
    cache = Cache(train_cache.path)
    cache.labels = np.full(cache.n_rows, cache.background, np.int32)
    for method in ("crt", "simcal"):
        with pytest.raises(InputError, match=f"cache {cache.path} none"):
            train(method, cache, tmp_path / "h", QUICK)
    assert names(tmp_path) == [] and torch.get_default_dtype() == torch.float32


def test_two_trainings_for_one_place(train_cache: Cache, tmp_path: Path) -> None:
    held = lock(tmp_path / ".head.training" / LOCK, "training")
    with pytest.raises(ExistsError, match="another process is training"):
        train("softmax", train_cache, tmp_path / "head")
    held.close()
    train("softmax", train_cache, tmp_path / "head")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["head"]
