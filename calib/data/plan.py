"""The procedural set before anything is painted: settings, categories, and which object goes where."""

import math
from dataclasses import dataclass, field

import numpy as np

from calib.data.deal import deal, shrink_to, train_counts
from calib.data.families import Category, default_families, make_categories
from calib.data.render import Scene
from calib.errors import SettingError

SPLITS = ("train", "tune", "val")
DEFAULT_SEED = 2718

_PER_IMAGE = 8
_CLUMP_FROM = 20


@dataclass(frozen=True)
class ShapesSettings:
    """What is rendered. The defaults are the demo set: 192 categories, about 3,430 train images.

    Attributes:
        seed: everything random follows from it.
        categories: C.
        families: groups of look-alikes; None: about twelve categories each.
        images: train images; None: as many as the counts fill at eight objects each. Another number scales
        the
            counts, never below ``floor``.
        scale: the LVIS v0.5 curve of counts is multiplied by it.
        floor: the least number of objects placed per category in train.
        crowded: so many of the most frequent categories get ``crowd_factor`` times more objects.
        tune_per_category, val_per_category: objects placed, of which a few are not annotated.
        verified: share of the unrelated absent categories that an image lists as verified absent.
        left_out: probability that a clear object of tune or val is left unannotated (and its category
        marked). scene: how pictures look.
    """

    seed: int = DEFAULT_SEED
    categories: int = 192
    families: int | None = None
    images: int | None = None
    scale: float = 0.8
    floor: int = 3
    crowded: int = 5
    crowd_factor: float = 1.5
    tune_per_category: int = 13
    val_per_category: int = 25
    verified: float = 0.25
    left_out: float = 0.05
    scene: Scene = field(default_factory=Scene)

    def __post_init__(self) -> None:
        """Refuse values that no set can be rendered with.

        Raises:
            SettingError: naming the setting, its range and the value.
        """
        low = {
            "seed": 0,
            "categories": 1,
            "floor": 1,
            "crowded": 0,
            "tune_per_category": 1,
            "val_per_category": 1,
        }
        for name, least in low.items():
            if getattr(self, name) < least:
                raise SettingError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.images is not None and self.images < 1:
            raise SettingError(f"images must be at least 1, got {self.images}")
        for name in ("verified", "left_out"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("scale", "crowd_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(f"{name} must be a number above 0, got {getattr(self, name)}")
        least_px = round(4 * self.scene.max_half_px)
        if self.scene.size_px < least_px:
            raise SettingError(f"image size must be at least {least_px} pixels, got {self.scene.size_px}")


@dataclass(frozen=True)
class Plan:
    """A set before it is rendered: the categories by rank and, per split, the ranks that go to each image."""

    settings: ShapesSettings
    categories: list[Category]
    images: dict[str, list[list[int]]]


def make_plan(s: ShapesSettings) -> Plan:
    """Decide categories, counts and the objects of every image.

    Raises:
        SettingError: the settings contradict each other.
    """
    families = s.families if s.families is not None else default_families(s.categories)
    categories = make_categories(s.categories, families, np.random.default_rng([s.seed, 0]))
    counts = train_counts(s.categories, scale=s.scale, floor=s.floor, crowded=s.crowded, crowd_factor=s.crowd_factor)
    if s.images is not None:
        least = -(-s.floor * s.categories // _PER_IMAGE)
        if s.images < least:
            raise SettingError(
                f"{s.images} train images of about {_PER_IMAGE} objects cannot hold {s.categories} "
                f"categories of at least {s.floor} objects each",
                hint=f"give --images {least} or more, or fewer --categories",
            )
        counts = shrink_to(counts, s.images * _PER_IMAGE, s.floor)
    per_split = {
        "train": counts,
        "tune": np.full(s.categories, s.tune_per_category),
        "val": np.full(s.categories, s.val_per_category),
    }
    # A category comes in clumps in every split or in none: whether it has company is part of its look.
    clumped = counts >= _CLUMP_FROM
    images = {}
    for number, (split, n) in enumerate(per_split.items()):
        size = max(1, round(int(n.sum()) / _PER_IMAGE))
        if split == "train" and s.images is not None:
            size = s.images
        images[split] = deal(n, clumped, size, np.random.default_rng([s.seed, 1 + number]))
    return Plan(s, categories, images)
