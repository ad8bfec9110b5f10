"""The feed: the sampler's batches in its order, in bounded memory, with a thread that never outlives it."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.cache import Cache
from calib.errors import NonFiniteError
from calib.sampling import Sampler
from calib.sampling.instance import InstanceSampler
from calib.settings import ImageBatches
from calib.training.loader import SLOTS, BatchLoader, BatchSource

from ..toy import Toy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Toy().write(tmp_path_factory.mktemp("toy") / "cache")


def sampler_of(cache: Cache) -> Sampler:
    return InstanceSampler(cache, ImageBatches(3, 2), seed=2)


def feed_of(cache: Cache, first: int = 0, stop: int = 9) -> BatchLoader:
    return BatchLoader(BatchSource(cache, cache.features, sampler_of(cache)), first, stop, CPU)


def feed_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "calib-feed"]


@pytest.mark.parametrize("first", [0, 5, 9])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("slow", ["reading", "learning"])
def test_batches_are_those_of_the_sampler_in_order(
    first: int, half: bool, slow: str, toy: Cache, train_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = train_cache if half else toy
    plain, rows = sampler_of(cache), cache.features
    assert rows.dtype == (np.float16 if half else np.float32)
    real = rows.stored

    def stored(chosen: Any, out: Any = None) -> Any:
        time.sleep(0.005 if slow == "reading" else 0)
        return real(chosen, out)

    monkeypatch.setattr(rows, "stored", stored)
    seen = 0
    with feed_of(cache, first) as feed:
        for step, portion in zip(range(first, 9), feed, strict=True):
            time.sleep(0.005 if slow == "learning" else 0)
            wanted = plain.step(step)
            assert portion.step == step and portion.n_chunks == wanted.n_chunks
            assert torch.equal(portion.features, torch.from_numpy(rows.take(wanted.rows)))
            assert portion.features.dtype == torch.float32 and portion.labels.dtype == torch.int64
            assert portion.labels.tolist() == cache.labels[wanted.rows].tolist()
            assert portion.chunk.tolist() == wanted.chunk.tolist()
            seen += 1
    assert seen == 9 - first and feed_threads() == []


def test_it_reads_no_further_ahead_than_its_places(toy: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, asked = sampler_of(toy), []
    real = sampler.step
    monkeypatch.setattr(sampler, "step", lambda i: asked.append(i) or real(i))
    with BatchLoader(BatchSource(toy, toy.features, sampler), 0, 10**9, CPU) as feed:
        for portion in feed:
            deadline = time.monotonic() + 5
            while len(asked) < portion.step + 1 + SLOTS and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.01)
            assert asked == list(range(portion.step + 1 + SLOTS))
            if portion.step == 4:
                break
    assert feed_threads() == []


def test_an_error_of_reading_comes_at_its_step_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Toy().write(tmp_path / "cache")
    sampler = InstanceSampler(cache, ImageBatches(1, 1), seed=2)
    bad = int(sampler.step(4).rows[0])
    real = cache.features.stored

    def spoil(rows: Any, out: Any = None) -> Any:
        out = real(rows, out)
        out[rows == bad] = np.nan
        return out

    monkeypatch.setattr(cache.features, "stored", spoil)
    seen = []
    feed = BatchLoader(BatchSource(cache, cache.features, sampler), 0, 9, CPU)
    with pytest.raises(NonFiniteError, match=f"cache {cache.path} holds NaN"), feed:
        for portion in feed:
            seen.append(portion.step)
    assert seen == [0, 1, 2, 3] and feed_threads() == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_with_what_it_feeds(kind: type[BaseException], toy: Cache) -> None:
    with pytest.raises(kind), feed_of(toy, 0, 10**6) as feed:
        for _ in feed:
            raise kind
    assert feed_threads() == []


@pytest.mark.gpu
def test_on_a_gpu_the_batches_are_the_same(train_cache: Cache) -> None:
    with feed_of(train_cache) as here:
        wanted = [p.features.clone() for p in here]
    source = BatchSource(train_cache, train_cache.features, sampler_of(train_cache))
    with BatchLoader(source, 0, 9, torch.device("cuda")) as there:
        for features, portion in zip(wanted, there, strict=True):
            assert torch.equal(portion.features.cpu(), features)
