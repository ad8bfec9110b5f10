"""LVIS records of a rendered picture: what is annotated, what is verified absent, what is not exhaustive.

LVIS is federated: a category is judged on an image only when it is annotated there or listed as verified
absent (``neg_category_ids``); elsewhere its detections are ignored. Few negatives flatter every detector,
because the false positives that hurt fall on images that do not count. Here the painter knows the truth, and
the policy is:

- Every absent sibling of a category in the picture is verified: look-alikes are the confusions that matter.
- Of all other absent categories a random quarter (``verified``) is verified, anew for each image.
- A category with an object that shows but is too hidden to annotate is neither verified nor counted absent
  there.
- ``not_exhaustive_category_ids`` names the annotated categories of which some visible object has no
  annotation: it was too hidden, or it was left out on purpose (tune and val only, with probability
  ``left_out``, and only beside an annotated one of its category, as annotators leave out some of a crowd). As
  in LVIS, unmatched detections of such a category are ignored on that image.

All lists are true statements about the picture.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from calib.data.families import Category
from calib.data.render import Instance


@dataclass(frozen=True)
class Labels:
    """``kept`` are the annotated instances; the two lists hold category ids, ascending."""

    kept: tuple[Instance, ...]
    negative: list[int]
    not_exhaustive: list[int]


def label(
    instances: tuple[Instance, ...],
    categories: list[Category],
    *,
    verified: float,
    left_out: float,
    rng: np.random.Generator,
) -> Labels:
    """Decide what of a picture is annotated, and fill the federated lists. See the module's docstring."""
    kept = _annotated(instances, left_out, rng)
    ids = np.array([c.category_id for c in categories])
    family = np.array([c.family for c in categories])
    present = {i.rank for i in instances}
    is_present = np.isin(np.arange(len(categories)), list(present))
    is_lookalike = np.isin(family, family[is_present])
    is_negative = ~is_present & (is_lookalike | (rng.random(len(categories)) < verified))
    shown, kept_of = Counter(i.rank for i in instances), Counter(i.rank for i in kept)
    partial = [categories[rank].category_id for rank in kept_of if kept_of[rank] < shown[rank]]
    return Labels(kept, sorted(ids[is_negative].tolist()), sorted(partial))


def _annotated(instances: tuple[Instance, ...], left_out: float, rng: np.random.Generator) -> tuple[Instance, ...]:
    """The clear instances, less those left out; one of each category always stays."""
    clear = [i for i in instances if i.is_clear]
    left = Counter(i.rank for i in clear)
    kept = []
    for instance, draw in zip(clear, rng.random(len(clear)), strict=True):
        if draw < left_out and left[instance.rank] > 1:
            left[instance.rank] -= 1
        else:
            kept.append(instance)
    return tuple(kept)


def image_record(image_id: int, file_name: str, size_px: int, labels: Labels) -> dict[str, Any]:
    """LVIS v1 image record."""
    return {
        "id": image_id,
        "file_name": file_name,
        "width": size_px,
        "height": size_px,
        "neg_category_ids": labels.negative,
        "not_exhaustive_category_ids": labels.not_exhaustive,
    }


def annotation_record(
    annotation_id: int, image_id: int, instance: Instance, categories: list[Category]
) -> dict[str, Any]:
    """LVIS v1 annotation record, without segmentation: a box drawn as a polygon would not be the object's."""
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": categories[instance.rank].category_id,
        "bbox": list(instance.box),
        "area": instance.area,
    }


def category_records(categories: list[Category], images: list[tuple[Instance, ...]]) -> list[dict[str, Any]]:
    """LVIS v1 category records in ascending id with the counts of the annotated train ``images``.

    ``frequency`` follows LVIS: r up to 10 train images, c up to 100, f above.
    """
    instance_count = Counter(i.rank for kept in images for i in kept)
    image_count = Counter(rank for kept in images for rank in {i.rank for i in kept})
    return [
        {
            "id": c.category_id,
            "name": c.name,
            "family": c.name.rsplit(" ", 1)[0],
            "image_count": image_count[c.rank],
            "instance_count": instance_count[c.rank],
            "frequency": "r" if image_count[c.rank] <= 10 else "c" if image_count[c.rank] <= 100 else "f",
        }
        for c in sorted(categories, key=lambda c: c.category_id)
    ]
