"""Does another order of the classes explain predictions better than the one that calib would take?

Of every object the label is known and the class that the detector prefers. A mapping says which class each category
should have. Its agreement is Cohen's kappa: the share of objects with the class it expects, less the share that would
have it if predictions had nothing to do with labels, over what is then left to reach. A detector that always says the
same, or guesses, has kappa 0 under every mapping, however frequent its favourites are.

A mapping beats the plain order if all of this holds:

- the difference of the two excesses over chance is more than ``SURE`` = 5 standard errors, taken over pictures (objects
  of one picture are not independent). For one mapping that has probability 3e-7; some thousand are tried (every place
  at which a class may have been put in), which leaves less than one in a thousand;
- the plain order has at most half of its kappa (``HALF``): whatever the accuracy, a detector whose classes are in order
  agrees most with its own order, and a weak one that takes rare categories for frequent look-alikes agrees with their
  order still;
- it has a kappa of at least ``LEAST_KAPPA``;
- it wins in ``MOST_WON`` = 5 categories (of fewer than eight, in two thirds), and in ``BREADTH`` times as many as it
  loses: one category that is always taken for its neighbour shifts nothing, and objects of one category are not
  independent either.

A permutation is free to fit. So it is fitted on four fifths of the pictures (by how much more probable a class is on a
category's objects than on all) and judged on the last fifth, five times over, by what it says about those. Even so a
layer of random weights on good features, or one that has just begun to learn, looks like one: it gives each category a
class of its own liking. But the likings collide, and one-to-one is what a permutation is. So it must be right on
``LEAST_RIGHT`` of the objects whose category was seen in the fit, and on ``NEARLY_ALL`` of those that the freest guess,
the class most probable for that category, is right on. A permuted classifier of the demo's detector reaches 0.74 and
0.95 on 100 pictures of TRAIN, 0.38 and 0.76 on 96 of val; random weights up to 0.19 and 0.49 there.

Letters: n objects, C categories, K classes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

SURE = 5.0
HALF = 0.5
MOSTLY = 0.8  # instead of HALF where a mapping differs from the plain order in a part of the classes
LEAST_KAPPA = 0.1
MOST_WON, BREADTH = 5, 3
LEAST_RIGHT, NEARLY_ALL = 0.35, 0.75
EPS = 1e-6  # beside probabilities
FOLDS = 5
NONE = -1  # no class


@dataclass(frozen=True)
class Seen:
    """n objects: the picture of each, its category, and the class that the detector prefers; ``probability`` [n, K] of
    every class, background aside."""

    image: Integers
    category: Integers
    predicted: Integers
    probability: NDArray[np.float32]
    categories: int  # C

    @property
    def classes(self) -> int:
        """K."""
        return int(self.probability.shape[1])

    def table(self) -> Floats:
        """[C, K], how often objects of a category are taken for a class."""
        cells = self.category * self.classes + self.predicted
        counts = np.bincount(cells, minlength=self.categories * self.classes).astype(np.float64)
        return counts.reshape(self.categories, self.classes)

    def probabilities(self, among: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_]]:
        """[C, K], mean over the objects of a category, and whether there are any. [C]"""
        n = np.bincount(self.category[among], minlength=self.categories)
        total = np.zeros((self.categories, self.classes))
        np.add.at(total, self.category[among], self.probability[among])
        return total / np.maximum(n, 1)[:, None], n > 0


@dataclass(frozen=True)
class Comparison:
    """A mapping against the plain order: kappas, their difference in standard errors, categories won, lost, in all."""

    kappa: float
    plain: float
    z: float
    won: int
    lost: int
    categories: int

    def is_better(self, part: float = HALF) -> bool:
        """By the rule of this module; ``part``: the kappa of the plain order is at most that part of the other one."""
        return (
            self.z > SURE
            and self.kappa >= LEAST_KAPPA
            and self.plain <= part * self.kappa
            and self.won >= min(MOST_WON, max(2, 2 * self.categories / 3))
            and self.won >= BREADTH * self.lost
        )


def expected(seen: Seen, class_of: Integers) -> Integers:
    """The class that every object should have. [C] -> [n]"""
    return class_of[seen.category]


def _influence(seen: Seen, target: Integers) -> tuple[Floats, float, float]:
    """What every object adds to the excess over chance, the excess, and kappa; ``target`` [n], the expected class.

    The excess is mean(p = t) less the mean over all pairs of objects of (p of one = t of the other); its influence
    function follows.
    """
    n = max(len(target), 1)
    is_right = (seen.predicted == target).astype(np.float64)
    of_predicted = (
        np.bincount(seen.predicted, minlength=seen.classes + 1) / n
    )  # [K + 1], the last one is never predicted
    of_target = np.bincount(np.where(target < 0, seen.classes, target), minlength=seen.classes + 1) / n
    chance = float((of_predicted * of_target).sum())
    excess = float(is_right.mean()) - chance if len(target) else 0.0
    return is_right - of_predicted[target] - of_target[seen.predicted], excess, excess / max(1 - chance, 1e-9)


def kappa(seen: Seen, class_of: Integers) -> tuple[float, float]:
    """Kappa under a mapping [C], and how many standard errors its excess is above 0."""
    influence, excess, value = _influence(seen, expected(seen, class_of))
    return value, z_over_pictures(seen.image, influence, excess)


def compare(seen: Seen, target: Integers, plain: Integers) -> Comparison:
    """Of two expectations [n] of every object's class."""
    one, excess, value = _influence(seen, target)
    other, least, plain_value = _influence(seen, plain)
    gain = (seen.predicted == target).astype(np.int64) - (seen.predicted == plain)
    per_category = np.bincount(seen.category, weights=gain, minlength=seen.categories)
    z = z_over_pictures(seen.image, one - other, excess - least)
    won, lost, there = (per_category > 0).sum(), (per_category < 0).sum(), len(np.unique(seen.category))
    return Comparison(value, plain_value, z, int(won), int(lost), there)


def z_over_pictures(image: Integers, value: Floats, total: float | None = None) -> float:
    """The mean of ``value`` [n] (or ``total``, of which ``value`` is the influence) in standard errors; values of one
    picture, ``image`` [n], are not independent."""
    if not len(value):
        return 0.0
    total = float(value.mean()) if total is None else total
    _, place = np.unique(image, return_inverse=True)
    sums = np.bincount(place, weights=value - value.mean())
    error = float(np.sqrt((sums**2).sum() * len(sums) / max(len(sums) - 1, 1))) / len(value)
    return 0.0 if abs(total) < 1e-12 else total / max(error, 1e-12)


def assigned(seen: Seen, among: NDArray[np.bool_]) -> tuple[Integers, Integers]:
    """The one-to-one mapping with the largest sum of log ratios of probabilities to their means over objects, and the
    most probable class of every category; ``NONE`` where there are no objects. [C], [C]"""
    mean, is_there = seen.probabilities(among)
    ratio = np.log(mean + EPS) - np.log(seen.probability[among].mean(axis=0, dtype=np.float64) + EPS)
    rows, columns = linear_sum_assignment(-np.where(is_there[:, None], ratio, 0.0))
    class_of = np.full(len(mean), NONE)
    class_of[rows] = columns
    return np.where(is_there, class_of, NONE), np.where(is_there, mean.argmax(axis=1), NONE)


@dataclass(frozen=True)
class Fitted:
    """What other pictures tell of every object: its class by the best permutation, and the most probable class of
    its category; both ``NONE`` where its category is in none of them. [n]"""

    target: Integers
    favourite: Integers

    def is_permutation(self, predicted: Integers) -> bool:
        """Whether being one-to-one costs next to nothing (see the module)."""
        known = self.favourite >= 0
        right, most = (float((predicted == t)[known].sum()) for t in (self.target, self.favourite))
        return right >= LEAST_RIGHT * known.sum() > 0 and right >= NEARLY_ALL * most


def fitted(seen: Seen) -> Fitted:
    """Of every object, by the pictures of other folds."""
    _, place = np.unique(seen.image, return_inverse=True)
    target, favourite = np.full((2, len(seen.image)), NONE)
    for fold in range(FOLDS):
        own = place % FOLDS == fold
        if own.all():
            break
        target[own], favourite[own] = (class_of[seen.category[own]] for class_of in assigned(seen, ~own))
    return Fitted(target, favourite)
