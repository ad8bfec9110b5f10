"""What each part of a divided data set holds."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.annotations import Annotations
from calib.data.shares import Shares
from calib.evaluate.bins import bin_index
from calib.tables import Rows, Tables, percent

Integers = NDArray[np.int64]
_NAMED = 12  # categories that a table names; the record has all


def is_object(read: Annotations) -> NDArray[np.bool_]:
    """Annotations that a detector is to find: neither crowds nor to be ignored. [N]"""
    return np.asarray(~(read.crowd | read.ignore))


@dataclass(frozen=True)
class Parts(Tables):
    """P parts of the images of ``read``, whose C categories are sorted into bins by ``instance_count``."""

    read: Annotations
    shares: Shares
    part: Integers  # [I], of every image
    groups: Integers  # [I], of every image; where there are none, the image itself
    instance_count: Integers  # [C]
    counted: str  # where these counts are from
    bins: tuple[int, ...]
    notices: tuple[str, ...] = ()

    @cached_property
    def images(self) -> Integers:
        """[P]"""
        return np.bincount(self.part, minlength=len(self.shares))

    @cached_property
    def objects(self) -> Integers:
        """Of every part and category, [P, C]."""
        n_parts, n_categories, found = len(self.shares), len(self.read.categories.id), is_object(self.read)
        cell = self.part[self.read.image[found]] * n_categories + self.read.category[found]
        return np.bincount(cell, minlength=n_parts * n_categories).reshape(n_parts, n_categories)

    @cached_property
    def without_objects(self) -> Integers:
        """Images, [P]."""
        has = np.bincount(self.read.image[is_object(self.read)], minlength=len(self.part)) > 0
        return np.bincount(self.part[~has], minlength=len(self.shares))

    def lacking(self, part: int) -> Integers:
        """Indices of categories that have objects, though none in ``part``."""
        return np.flatnonzero((self.objects[part] == 0) & (self.objects.sum(axis=0) > 0))

    @cached_property
    def bin_names(self) -> list[str]:
        """``<10``, ``10-99``, ..."""
        between = [f"{a}-{b - 1}" for a, b in pairwise(self.bins)]
        return [f"<{self.bins[0]}", *between, f">={self.bins[-1]}"]

    def per_bin(self, part: int) -> list[dict[str, Any]]:
        """For every bin, categories that have objects, those of them in ``part``, and objects there."""
        of_bin, found = bin_index(self.instance_count, self.bins), self.objects.sum(axis=0) > 0
        own = self.objects[part]
        return [
            {
                "bin": name,
                "categories": int((found & (of_bin == k)).sum()),
                "present": int(((own > 0) & (of_bin == k)).sum()),
                "objects": int(own[of_bin == k].sum()),
            }
            for k, name in enumerate(self.bin_names)
        ]

    def record(self) -> dict[str, Any]:
        """Plain metrics: shares are fractions, ``lacking`` has category ids."""
        return {"counts": self.counted, "parts": {name: self._record(j) for j, name in enumerate(self.shares)}}

    def _record(self, part: int) -> dict[str, Any]:
        return {
            "images": int(self.images[part]),
            "share": float(self.images[part] / len(self.part)),
            "wanted": float(list(self.shares.values())[part]),
            "groups": len(np.unique(self.groups[self.part == part])),
            "without_objects": int(self.without_objects[part]),
            "objects": int(self.objects[part].sum()),
            "categories": int((self.objects[part] > 0).sum()),
            "per_bin": self.per_bin(part),
            "lacking": self.read.categories.id[self.lacking(part)].tolist(),
        }

    def tables(self) -> list[tuple[str, Rows]]:
        """Sizes; categories and objects per bin; categories that a part lacks."""
        by_bin = f"categories present of those that all parts have, and objects, by training instances ({self.counted})"
        sizes = [self._size(j, name) for j, name in enumerate(self.shares)]
        bins = [{"part": name} | self._bins(j) for j, name in enumerate(self.shares)]
        lacking = [self._lacking(j, name) for j, name in enumerate(self.shares) if len(self.lacking(j))]
        return [("images", sizes), (by_bin, bins), *([("categories without objects", lacking)] if lacking else [])]

    def _size(self, part: int, name: str) -> dict[str, Any]:
        metrics = self._record(part)
        shown = {
            "part": name,
            "images": f"{metrics['images']:,}",
            "%": percent(metrics["share"]),
            "wanted %": percent(metrics["wanted"]),
            "without objects": f"{metrics['without_objects']:,}",
        }
        if len(np.unique(self.groups)) < len(self.groups):
            shown["groups"] = f"{metrics['groups']:,}"
        return shown | {"objects": f"{metrics['objects']:,}", "categories": f"{metrics['categories']:,}"}

    def _bins(self, part: int) -> dict[str, str]:
        return {b["bin"]: f"{b['present']:,} of {b['categories']:,}, {b['objects']:,}" for b in self.per_bin(part)}

    def _lacking(self, part: int, name: str) -> dict[str, Any]:
        names = [self.read.categories.name[c] for c in self.lacking(part)]
        more = f", and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
        return {"part": name, "number": f"{len(names):,}", "categories": ", ".join(names[:_NAMED]) + more}
