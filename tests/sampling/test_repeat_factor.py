"""Repeat-factor sampling: factors by hand, passes of any length, the cache's images."""

from collections import Counter
from pathlib import Path

import numpy as np

from calib.sampling.instance import InstanceSampler
from calib.sampling.repeat_factor import RepeatCycle, cache_repeat_factors, ceil_copies, repeat_factors
from calib.settings import ImageBatches

from ..toy import Toy


def test_factors_by_hand() -> None:
    # 8 images; class 0 in 4 of them (f = 1/2), class 1 in 1 (f = 1/8). t = 1/2: r_0 = 1, r_1 = sqrt(4) = 2.
    image, category = np.asarray([0, 0, 1, 2, 3, 3]), np.asarray([0, 0, 0, 0, 0, 1])
    factors = repeat_factors(image, category, 8, 0.5)
    assert factors.tolist() == [1, 1, 1, 2, 1, 1, 1, 1]
    assert ceil_copies(np.asarray([1.0, 1.2, 2.0])).tolist() == [1, 2, 2]


def test_no_object_at_all_gives_factors_of_one() -> None:
    empty = np.empty(0, np.int64)
    assert repeat_factors(empty, empty, 3, 0.5).tolist() == [1, 1, 1]


def test_any_pieces_are_the_same_sequence_and_every_pass_holds_every_image() -> None:
    items, factors = np.arange(10, 17), np.asarray([1, 1.5, 2, 3.25, 1, 1, 1.1])
    whole = RepeatCycle(items, factors, 3).take(0, 60)
    cycle = RepeatCycle(items, factors, 3)
    assert np.array_equal(np.concatenate([cycle.take(s, 7) for s in range(0, 56, 7)]), whole[:56])
    assert np.array_equal(cycle.take(23, 9), whole[23:32])
    first = Counter(whole[: len(RepeatCycle(items, factors, 3)._pass(0))].tolist())
    assert all(int(f) <= first[int(i)] <= int(np.ceil(f)) for i, f in zip(items, factors, strict=True))


def test_images_with_rare_classes_come_more_often(tmp_path: Path) -> None:
    cache = Toy(counts=(400, 2), images=30, most=80).write(tmp_path / "cache")
    factors = cache_repeat_factors(cache, 0.9)
    batches = ImageBatches(1, 1, sampling="repeat-factor", repeat_threshold=0.9)
    sampler = InstanceSampler(cache, batches, seed=0)
    seen = Counter(
        int(np.searchsorted(cache.image_start, sampler.step(i).rows[0], side="right")) - 1 for i in range(3000)
    )
    rare = {int(m) for m in np.flatnonzero(factors > 1.01)}
    assert rare
    mean = sum(seen.values()) / sum(factors[m] for m in seen)
    for m, n in seen.items():
        assert abs(n - mean * factors[m]) < 0.35 * mean * factors[m]
