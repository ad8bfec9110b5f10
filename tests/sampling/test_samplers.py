"""Which rows a step sees."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.cache import Cache
from calib.cache.index import ClassIndex
from calib.errors import InputError
from calib.sampling.bilevel import HARD_NEGATIVE_IOU, BilevelSampler, draw_episode
from calib.sampling.class_balanced import ClassBalancedSampler
from calib.sampling.instance import InstanceSampler
from calib.sampling.step import Cycle, Sampler
from calib.settings import ImageBatches

from ..toy import Toy


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Toy().write(tmp_path_factory.mktemp("toy") / "cache")


def samplers(cache: Cache, seed: int = 0) -> dict[str, Sampler]:
    index = ClassIndex.build(cache)
    return {
        "instance": InstanceSampler(cache, ImageBatches(3, 2), seed=seed),
        "class-balanced": ClassBalancedSampler(index, rows_per_step=30, background_share=0.4, seed=seed),
        "bilevel": BilevelSampler(index, cache.meta("max_iou")[0], classes_per_step=5, seed=seed),
    }


@pytest.mark.parametrize("name", ["instance", "class-balanced", "bilevel"])
def test_a_step_depends_on_seed_and_number_alone(name: str, cache: Cache) -> None:
    one, other = samplers(cache)[name], samplers(cache)[name]
    forward = [one.step(i) for i in range(8)]
    for i in (5, 2, 7, 0):
        assert np.array_equal(other.step(i).rows, forward[i].rows)
        assert np.array_equal(other.step(i).chunk, forward[i].chunk)
    assert any(not np.array_equal(samplers(cache, 1)[name].step(i).rows, forward[i].rows) for i in range(8))


@pytest.mark.parametrize("name", ["instance", "class-balanced", "bilevel"])
def test_ignored_rows_are_never_drawn(name: str, cache: Cache) -> None:
    sampler = samplers(cache)[name]
    assert all((cache.labels[sampler.step(i).rows] >= 0).all() for i in range(20))


@given(
    items=st.lists(st.integers(0, 99), min_size=1, max_size=9, unique=True),
    cuts=st.lists(st.integers(0, 12), min_size=1, max_size=12),
)
def test_a_cycle_is_the_same_in_any_pieces_and_visits_everything_once_per_pass(
    items: list[int], cuts: list[int]
) -> None:
    rows = np.asarray(items)
    whole = Cycle(rows, 7).take(0, sum(cuts))
    pieces, cycle = [], Cycle(rows, 7)
    for start, count in zip(np.cumsum([0, *cuts[:-1]]), cuts, strict=True):
        pieces.append(cycle.take(int(start), count))
    assert np.array_equal(np.concatenate(pieces), whole)
    for start in range(0, len(whole) - len(items) + 1, len(items)):
        assert sorted(whole[start : start + len(items)]) == sorted(items)


def test_every_pass_of_a_cycle_has_its_own_order() -> None:
    passes = Cycle(np.arange(40), 7).take(0, 200).reshape(5, 40)
    assert len({tuple(p) for p in passes.tolist()}) == 5


def test_whole_images_with_foreground_come_once_per_pass(cache: Cache) -> None:
    sampler = InstanceSampler(cache, ImageBatches(chunks=1, images_per_chunk=1), seed=0)
    labels, start = cache.labels, cache.image_start
    with_foreground = [
        m for m in range(len(start) - 1) if ((labels[start[m] : start[m + 1]] % cache.background) >= 0).any()
    ]
    usable = [m for m in with_foreground if any(0 <= y < cache.background for y in labels[start[m] : start[m + 1]])]
    seen = Counter()
    for i in range(len(usable)):
        rows = sampler.step(i).rows
        m = int(np.searchsorted(start, rows[0], side="right")) - 1
        expected = [r for r in range(start[m], start[m + 1]) if labels[r] >= 0]
        assert rows.tolist() == expected
        seen[m] += 1
    assert seen == Counter(usable)
    assert len(usable) < len(start) - 1  # the last image is background only


def test_chunks_hold_their_own_images(cache: Cache) -> None:
    step = InstanceSampler(cache, ImageBatches(chunks=4, images_per_chunk=2), seed=0).step(3)
    image = np.searchsorted(cache.image_start, step.rows, side="right") - 1
    assert step.n_chunks == 4 and set(step.chunk) == {0, 1, 2, 3}
    assert all(len(set(image[step.chunk == k])) <= 2 for k in range(4))
    assert (np.diff(step.chunk) >= 0).all()


def test_every_class_equally_often_and_background_in_its_share(cache: Cache) -> None:
    index = ClassIndex.build(cache)
    sampler = ClassBalancedSampler(index, rows_per_step=30, background_share=0.4, seed=0)
    drawn = Counter(cache.labels[np.concatenate([sampler.step(i).rows for i in range(400)])].tolist())
    assert drawn[cache.background] == 12 * 400
    foreground = [drawn[int(c)] for c in index.present]
    assert len(foreground) == 6 and max(foreground) - min(foreground) <= 4
    own = Counter(np.concatenate([sampler.step(i).rows for i in range(400)]).tolist())
    for label in index.present:
        of_class = [own[int(r)] for r in index.rows(int(label))]
        assert max(of_class) - min(of_class) <= 1


@pytest.mark.parametrize(("rows", "share", "expected"), [(30, 0.999, 29), (1, 0.9, 0), (8, 0.5, 4), (8, 0.0, 0)])
def test_a_class_balanced_step_has_foreground_whatever_the_share(
    rows: int, share: float, expected: int, cache: Cache
) -> None:
    sampler = ClassBalancedSampler(ClassIndex.build(cache), rows_per_step=rows, background_share=share, seed=0)
    for i in range(12):
        labels = cache.labels[sampler.step(i).rows]
        assert len(labels) == rows and int((labels == cache.background).sum()) == expected


def test_class_balanced_visits_go_on_from_step_to_step(cache: Cache) -> None:
    """Steps of 5 rows cut visits of 4 rows anywhere; joined, they are whole visits in whole passes over the classes."""
    index = ClassIndex.build(cache)
    sampler = ClassBalancedSampler(index, rows_per_step=5, background_share=0.0, seed=0, draws_per_visit=4)
    labels = cache.labels[np.concatenate([sampler.step(i).rows for i in range(24)])].reshape(-1, 4)
    assert (labels == labels[:, :1]).all()
    for order in labels[:, 0].reshape(-1, len(index.present)):
        assert sorted(order) == index.present.tolist()


def test_bilevel_steps_hold_positives_of_drawn_classes_and_as_many_hard_negatives(cache: Cache) -> None:
    index, max_iou = ClassIndex.build(cache), cache.meta("max_iou")[0]
    sampler = BilevelSampler(index, max_iou, classes_per_step=4, seed=0)
    short = 0
    for i in range(60):
        rows = sampler.step(i).rows
        label = cache.labels[rows]
        negative, positive = rows[label == cache.background], rows[label != cache.background]
        assert len(positive) > 0 and len(negative) <= len(positive)
        short += len(negative) < len(positive)
        assert len(set(negative.tolist())) == len(negative)
        assert (max_iou[negative] >= HARD_NEGATIVE_IOU).all() and (max_iou[negative] < 0.5).all()
        drawn = {(int(cache.labels[r]), int(index.image[r])) for r in positive}
        assert len(drawn) <= 4
        for c, m in drawn:  # every positive of the class in its image is there
            assert set(index.rows_in_image(c, m).tolist()) <= set(positive.tolist())
        images = {m for _, m in drawn}
        assert {int(index.image[r]) for r in negative} <= images
        pool = [r for r in index.rows(index.background) if max_iou[r] >= HARD_NEGATIVE_IOU and index.image[r] in images]
        assert len(negative) == min(len(positive), len(pool))
    assert short < 60


def test_a_bilevel_draw_is_that_of_numpys_choice() -> None:
    """One call for all classes takes the same numbers from the stream as a choice for each."""
    images = {c: np.arange(n) for c, n in enumerate((1, 7, 0, 300, 70_000, 2))}
    for seed in range(50):
        classes, drawn = draw_episode(np.random.default_rng(seed), images, 16)
        rng = np.random.default_rng(seed)
        wanted = rng.choice([0, 1, 3, 4, 5], 16)
        assert classes.tolist() == wanted.tolist()
        assert drawn.tolist() == [rng.choice(images[int(c)]) for c in wanted]


def test_rows_of_many_images_are_those_of_each(cache: Cache) -> None:
    index, rng = ClassIndex.build(cache), np.random.default_rng(0)
    for n in (0, 1, 40):
        labels, images = rng.integers(0, cache.background, n), rng.integers(0, 12, n)
        each = [index.rows_in_image(int(c), int(m)) for c, m in zip(labels, images, strict=True)]
        assert index.rows_in_images(labels, images).tolist() == [int(r) for rows in each for r in rows]


def test_bilevel_classes_are_uniform(cache: Cache) -> None:
    index = ClassIndex.build(cache)
    sampler = BilevelSampler(index, cache.meta("max_iou")[0], classes_per_step=1, seed=0)
    drawn = Counter(int(cache.labels[sampler.step(i).rows[-1]]) for i in range(3000))
    assert set(drawn) == set(index.present.tolist())
    assert min(drawn.values()) > 400 and max(drawn.values()) < 600  # 500 each


def test_a_cache_without_foreground_is_refused(tmp_path: Path) -> None:
    cache = Toy(counts=(0, 0)).write(tmp_path / "cache")
    with pytest.raises(InputError, match="no foreground row"):
        ClassIndex.build(cache)
    with pytest.raises(InputError, match="no foreground row"):
        InstanceSampler(cache, ImageBatches(), seed=0)
