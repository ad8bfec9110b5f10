"""Which order explains predictions: told where it is so, and never of a detector that is merely weak."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from calib.annotations import CategoryRows
from calib.doctor.agreement import NONE, Seen, kappa
from calib.doctor.orders import exchanged, explain, mappings

C, PER_IMAGE = 60, 6
Integers = NDArray[np.int64]
PLAIN = np.arange(C)
IDENTITY = PLAIN


def rows(names: tuple[str, ...] = (), listed: tuple[int, ...] = ()) -> CategoryRows:
    ids = np.arange(1, C + 1)
    return CategoryRows(ids, names or tuple(f"k{i:03}" for i in ids), None, None, None, listed or tuple(ids.tolist()))


def predictions(
    right: float,
    class_of: Integers = IDENTITY,
    *,
    images: int = 100,
    classes: int = C,
    confused: Callable[[Integers, np.random.Generator], Integers] | None = None,
    seed: int = 0,
) -> Seen:
    """A detector that prefers ``class_of`` the label with probability ``right``, else what ``confused`` gives (at
    random where it is None)."""
    rng = np.random.default_rng(seed)
    n = images * PER_IMAGE
    category = rng.choice(C, n, p=(w := 1 / (5 + np.arange(C))) / w.sum())
    other = rng.integers(0, classes, n) if confused is None else confused(category, rng)
    predicted = np.where(rng.random(n) < right, class_of[category], other)
    probability = np.full((n, classes), 0.5 / classes, np.float32)
    probability[np.arange(n), predicted] += 0.5
    return Seen(np.repeat(np.arange(images), PER_IMAGE), category, predicted, probability, C)


def told(seen: Seen, given: CategoryRows | None = None) -> str:
    given = rows() if given is None else given
    better = explain(seen, PLAIN, mappings(given, PLAIN, seen.classes, ()))
    return better.mapping.code if better else "exchanged" if exchanged(seen, PLAIN) else ""


def to_frequent(category: Integers, rng: np.random.Generator) -> Integers:
    """Everything else is one of a few favourites."""
    return rng.choice(4, len(category))


def to_head_of_family(category: Integers, rng: np.random.Generator) -> Integers:
    """Look-alikes are taken for the most frequent one of twelve."""
    return category // 12 * 12


def to_neighbour(category: Integers, rng: np.random.Generator) -> Integers:
    """One category is always taken for the next."""
    return np.where(category == 0, 1, rng.integers(0, C, len(category)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("confused", [None, to_frequent, to_head_of_family, to_neighbour])
@pytest.mark.parametrize("right", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_classes_in_order_are_never_called_otherwise(
    right: float, confused: Callable[[Integers, np.random.Generator], Integers] | None, seed: int
) -> None:
    for images in (10, 30, 100):
        assert told(predictions(right, confused=confused, images=images, seed=seed)) == ""


def test_a_detector_that_always_says_the_same_agrees_with_nothing() -> None:
    seen = predictions(0.0, confused=lambda category, rng: np.full(len(category), 7))
    assert kappa(seen, PLAIN) == (0.0, 0.0) and told(seen) == ""


@pytest.mark.parametrize("right", [0.6, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_another_order_is_told(right: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert told(predictions(right, rng.permutation(C), seed=seed)) == "classes-permuted"
    for by in (1, -1):
        class_of = PLAIN + by
        moved = np.where((class_of < 0) | (class_of >= C), 0, class_of)
        assert told(predictions(right, moved, seed=seed)) == "classes-shifted"
    listed = rng.permutation(C) + 1
    assert told(predictions(right, np.argsort(listed), seed=seed), rows(listed=tuple(listed.tolist()))) == (
        "classes-json-order"
    )
    names = tuple(f"k{i:03}" for i in rng.permutation(C))
    by_name = np.argsort(np.argsort(np.asarray(names)))
    assert told(predictions(right, by_name, seed=seed), rows(names)) == "classes-name-order"


def test_a_shift_of_a_weak_detector_is_told() -> None:
    assert told(predictions(0.2, np.minimum(PLAIN + 1, C - 1))) == "classes-shifted"


def test_a_class_put_in_is_told_with_its_place() -> None:
    class_of = np.where(PLAIN >= 20, PLAIN + 1, PLAIN)
    seen = predictions(0.7, class_of, classes=C + 1)
    better = explain(seen, PLAIN, mappings(rows(), PLAIN, C + 1, ()))
    assert better is not None and better.mapping.at is not None
    assert better.mapping.code == "classes-shifted" and abs(better.mapping.at - 20) <= 2
    left_out = np.where(PLAIN > 20, PLAIN - 1, PLAIN)
    better = explain(predictions(0.7, left_out), PLAIN, mappings(rows(), PLAIN, C, ()))
    assert better is not None and better.mapping.at is not None and abs(better.mapping.at - 20) <= 2
    assert better.mapping.class_of[better.mapping.at] == NONE


def test_two_exchanged_classes_among_others_in_order_are_told() -> None:
    class_of = PLAIN.copy()
    class_of[[1, 2]] = [2, 1]
    seen = predictions(0.8, class_of)
    assert told(seen) == "exchanged" and exchanged(seen, PLAIN) == [[1, 2]]
    assert exchanged(predictions(0.8), PLAIN) == []


def test_random_weights_that_like_a_class_of_each_category_are_no_permutation() -> None:
    """As those of an untrained layer on good features: the same class for most objects of a category, and likings
    collide."""
    for seed in range(10):
        liked = np.random.default_rng(seed).integers(0, C, C)
        assert told(predictions(0.4, liked, seed=seed)) == ""
