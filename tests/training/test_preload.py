"""Training from features in a device's memory."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from calib.cache import Cache
from calib.cache.rows import RowMatrix
from calib.errors import InputError, NonFiniteError
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches
from calib.training import train
from calib.training.loader import BatchLoader, BatchSource
from calib.training.preload import preload

from ..toy import Toy

CPU = torch.device("cpu")
SHORT = {"steps": 12, "warmup_steps": 0}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Toy().write(tmp_path / "train")


def test_batches_are_those_of_the_files_and_nothing_is_read(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    source = BatchSource(cache, cache.features, InstanceSampler(cache, ImageBatches(), seed=3))
    with BatchLoader(source, 0, 5, CPU) as feed:
        read = [(p.features.clone(), p.labels) for p in feed]
    preload(cache, CPU)
    assert cache.features.preloaded is not None and cache.features.preloaded.shape == cache.features.shape

    def fails(*_: object) -> None:
        raise AssertionError("a file is read")

    monkeypatch.setattr(RowMatrix, "checked", fails)
    monkeypatch.setattr(RowMatrix, "ask", fails)
    with BatchLoader(source, 0, 5, CPU) as feed:
        for (features, labels), portion in zip(read, feed, strict=True):
            assert torch.equal(portion.features, features) and torch.equal(portion.labels, labels)


@pytest.mark.parametrize("stages", [1, 2])
def test_heads_have_the_same_bytes(tmp_path: Path, stages: int, calib: Callable[..., Any]) -> None:
    Toy(stages=stages).write(tmp_path / "train")
    for method in ("crt", "simcal"):
        train(method, tmp_path / "train", tmp_path / "read" / method / "1", SHORT)
    calib("train", "crt", "--preload", "--set", "steps=12", "--set", "warmup_steps=0", "--device", "cpu",
          "--cache", tmp_path / "train", "--out", tmp_path / "held" / "crt" / "1")  # fmt: skip
    calib("train", "simcal", "--one-pass", "--preload", "--set", "steps=12", "--set", "warmup_steps=0",
          "--device", "cpu", "--cache", tmp_path / "train", "--out", tmp_path / "held")  # fmt: skip
    for method in ("crt", "simcal"):
        one, other = [(tmp_path / k / method / "1" / "head.safetensors").read_bytes() for k in ("read", "held")]
        assert one == other


def test_what_does_not_fit_is_refused() -> None:
    rows = SimpleNamespace(shape=(1 << 45, 1024), dtype=np.dtype(np.float16))
    cache = SimpleNamespace(path="big", stages=[SimpleNamespace(features=rows)], n_rows=rows.shape[0])
    with pytest.raises(InputError, match=r"features of big take .* GB, which cpu does not have"):
        preload(cast(Cache, cache), CPU)


def test_numbers_that_are_not_finite_are_refused(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = RowMatrix.stored

    def broken(self: RowMatrix, rows: Any, out: Any = None) -> Any:
        found = stored(self, rows, out)
        found[-1, 0] = np.inf
        return found

    monkeypatch.setattr(RowMatrix, "stored", broken)
    with pytest.raises(NonFiniteError):
        preload(cache, CPU)
    assert cache.features.preloaded is None


@pytest.mark.gpu
def test_a_gpu_holds_them(cache: Cache, tmp_path: Path) -> None:
    gpu = torch.device("cuda")
    train("crt", cache, tmp_path / "read", SHORT, device=gpu)
    preload(cache, gpu)
    train("crt", cache, tmp_path / "held", SHORT, device=gpu)
    one, other = [(tmp_path / k / "head.safetensors").read_bytes() for k in ("read", "held")]
    assert one == other
