"""The proposals of one image, as extraction hands them to the writer."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.cache.convert import all_finite, to_dtype
from calib.errors import NonFiniteError, ShapeError


@dataclass(frozen=True)
class ImageRows:
    """All proposals of one image, in the order they are stored. ``meta`` holds the columns of META_SCHEMA."""

    image: dict[str, Any]
    meta: dict[str, NDArray[Any]]
    features: NDArray[np.float32]  # [n, D]
    logits: NDArray[np.float32]  # [n, C+1], background last
    maps: NDArray[np.float32] | None = None  # [n, channels * height * width]
    next: tuple["ImageRows", ...] = ()  # of a cascade: the same RoIs in its later stages

    def __post_init__(self) -> None:
        n = len(self.features)
        parts = {**self.meta, "logits": self.logits} | ({} if self.maps is None else {"maps": self.maps})
        uneven = {k: len(v) for k, v in parts.items() if len(v) != n}
        if uneven:
            raise ShapeError(
                f"image {self.image['image_id']} has {n} feature rows but {uneven}: rows must be the same RoIs"
            )
        if any(len(later.features) != n for later in self.next):
            rows = [len(one.features) for one in self.stages]
            raise ShapeError(
                f"image {self.image['image_id']} has {rows} rows in its stages: they must be the same RoIs"
            )

    @property
    def stages(self) -> tuple["ImageRows", ...]:
        """The rows of every stage of a cascade, first to last; itself where there is one."""
        return (self, *self.next)


def stored(part: NDArray[np.float32], dtype: str, what: str, image_id: int) -> NDArray[Any]:
    """``part`` of an image in the numbers of ``dtype``.

    Raises:
        NonFiniteError: NaN or infinity, before or after conversion.
    """
    converted = to_dtype(part, dtype)
    if all_finite(converted):
        return converted
    if np.isfinite(part).all():
        raise NonFiniteError(
            f"{what} of image {image_id} exceed the range of {dtype}",
            hint="keep float32: --dtype float32 (calib import: --set dtype=float32)",
        )
    raise NonFiniteError(f"the detector gave NaN or infinite {what} for image {image_id}", hint="check its weights")
