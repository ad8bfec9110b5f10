"""How many instances each category has, and which image each goes to.

The counts follow LVIS: the image counts of its categories, sorted, read at C evenly spaced quantiles. Real
LVIS goes on where image counts end: its most frequent categories come in crowds, so that instances exceed
images many times. The few categories at the top are multiplied for that reason, which also fills the bin of
1,000 and more.
"""

import numpy as np
import numpy.typing as npt

from calib.data.resources import shipped
from calib.errors import SettingError

Counts = npt.NDArray[np.int64]


def lvis_curve(categories: int, *, version: str = "v0_5") -> npt.NDArray[np.float64]:
    """Train image counts of LVIS at ``categories`` evenly spaced quantiles, descending. [C]"""
    with np.load(shipped("lvis_counts.npz")) as arrays:
        counts = np.sort(arrays[f"{version}_image_count"].astype(np.float64))[::-1]
    quantiles = (np.arange(categories) + 0.5) / categories
    curve: npt.NDArray[np.float64] = counts[(quantiles * len(counts)).astype(int)]
    return curve


def train_counts(categories: int, *, scale: float, floor: int, crowded: int, crowd_factor: float) -> Counts:
    """Instances to place per category, most frequent first. [C]

    Args:
        scale: the curve is multiplied by it.
        floor: the least number of instances of a category.
        crowded: so many of the most frequent categories are multiplied by ``crowd_factor`` on top.
    """
    curve = scale * lvis_curve(categories)
    curve[:crowded] *= crowd_factor
    return np.maximum(floor, np.round(curve)).astype(np.int64)


def shrink_to(counts: Counts, total: int, floor: int) -> Counts:
    """Scale ``counts`` [C] to sum to ``total``, as nearly as rounding allows, none below ``floor``. [C]

    Raises:
        SettingError: ``floor`` instances of every category are already more than ``total``.
    """
    if floor * len(counts) > total:
        raise SettingError(f"{total} instances cannot hold {len(counts)} categories of at least {floor} instances each")
    low, high = 0.0, 1.0
    while _scaled(counts, high, floor).sum() < total:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _scaled(counts, middle, floor).sum() <= total else (low, middle)
    return _scaled(counts, low, floor)


def _scaled(counts: Counts, factor: float, floor: int) -> Counts:
    return np.maximum(floor, np.round(counts * factor)).astype(np.int64)


def deal(counts: Counts, clumped: npt.NDArray[np.bool_], images: int, rng: np.random.Generator) -> list[list[int]]:
    """Split the instances into ``images`` lists of category ranks.

    Categories marked in ``clumped`` [C] come in clumps of one to three of a kind, the others alone. The
    clumps are shuffled and cut into images of unequal size (a factor of about two between the smallest and
    the largest).
    """
    clumps = [
        clump
        for rank, n in enumerate(counts)
        for clump in (_clumps(rank, int(n), rng) if clumped[rank] else [[rank]] * int(n))
    ]
    order = rng.permutation(len(clumps))
    sizes = rng.uniform(5, 11, images)
    ends = np.cumsum(sizes) / sizes.sum() * counts.sum()
    lists: list[list[int]] = [[] for _ in range(images)]
    done, image = 0, 0
    for i in order:
        lists[image].extend(clumps[i])
        done += len(clumps[i])
        while image < images - 1 and done >= ends[image]:
            image += 1
    return lists


def _clumps(rank: int, n: int, rng: np.random.Generator) -> list[list[int]]:
    out = []
    while n > 0:
        size = min(n, int(rng.choice((1, 1, 1, 2, 3))))
        out.append([rank] * size)
        n -= size
    return out
