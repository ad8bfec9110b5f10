"""Pictures and boxes that a detector is trained on, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Target = dict[str, Tensor]


class Pixels(Protocol):
    """Picture i is [H, W, 3] uint8, or [H, W] if it is grey."""

    def __getitem__(self, i: int, /) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class TrainSet:
    """M pictures with objects, and a target for each: ``boxes`` [N, 4] x1, y1, x2, y2 in pixels, ``labels`` [N] from 1,
    in ascending category id."""

    pixels: Pixels
    targets: list[Target]
    classes: int
    names: tuple[str, ...] = ()  # of the classes, in their order


def make_batch(
    train: TrainSet,
    chosen: NDArray[np.int64],
    rng: np.random.Generator,
    *,
    mirror: bool = True,
    part: tuple[int, int] = (0, 1),
) -> tuple[list[Tensor], list[Target]]:
    """Pictures [3, H, W] in [0, 1] and targets of ``chosen``, each mirrored with probability 0.5.

    Of the batch only every ``part[1]``-th picture from ``part[0]`` on; the same is drawn whatever the part.
    """
    is_mirrored = [mirror and rng.random() < 0.5 for _ in chosen]
    pairs = [_picture(train, int(chosen[k]), is_mirrored[k]) for k in range(part[0], len(chosen), part[1])]
    return [image for image, _ in pairs], [target for _, target in pairs]


def _picture(train: TrainSet, i: int, is_mirrored: bool) -> tuple[Tensor, Target]:
    pixels = torch.from_numpy(train.pixels[i])
    planes = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.expand(3, *pixels.shape)
    image, target = planes.float() / 255, train.targets[i]
    if not is_mirrored:
        return image, target
    width, (x1, y1, x2, y2) = image.shape[2], target["boxes"].unbind(1)
    return image.flip(2), {**target, "boxes": torch.stack((width - x2, y1, width - x1, y2), 1)}


def box_sides(train: TrainSet, sizes: Sequence[tuple[int, int]], image_size: int) -> tuple[Any, Any]:
    """Width and height of all boxes in pixels of the network, whose longer side is ``image_size``, and their labels.

    ``sizes`` [M] are height and width of the pictures. [N, 2], [N]
    """
    scale = [image_size / max(size) for size in sizes]
    sides = [(t["boxes"][:, 2:] - t["boxes"][:, :2]).double() * s for t, s in zip(train.targets, scale, strict=True)]
    return torch.cat(sides).numpy(), torch.cat([t["labels"] for t in train.targets]).numpy()
