"""FRACAL: post-hoc calibration by image frequency and by how the objects of a class spread over the image.

Paper: Alexandridis et al., Fractal Calibration for Long-Tailed Object Detection, CVPR 2025.

Eq. (shift): w_c = log10(1 / C) - log10(p_c), p_c = images with c / all images; background 0.
Eq. (softmax detectors): s = softmax(z + w), s_c <- s_c / D_c^lambda for foreground c, rows back to sum 1.
Eq. (sigmoid detectors): s_c = sigmoid(z_c) sigmoid(z_c + w_c - log10 q_c + log10(1 / C)), q = D^lambda / sum D^lambda.
Eq. (dimension): D_c = slope of log N_c(g) on log g, N_c(g) = cells of a g x g grid over the image that hold a box
centre of class c, g = 1..64 with g^2 <= n_c; at least 1, and 1 for classes of fewer than four objects.
Differs: a natural-base softmax with a base-10 shift, as in the authors' code (kostas1515/FRACAL 3543fe4): the strength
of the frequency term is 1 / ln 10. ``shift`` log2, ln or logit replaces log10; their code has two more forms. Their
configs also lower the NMS IoU from 0.5 to 0.3, which is not part of the method.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.cache import Cache
from calib.heads.affine import AffineHead
from calib.heads.base import Head
from calib.heads.sigmoid_product import SigmoidProductHead
from calib.settings import at_least, one_of
from calib.training.bases import activation_of, affine_head, base_logits
from calib.training.context import FitContext

_SCALE = {"log10": torch.log10, "log2": torch.log2, "ln": torch.log, "logit": torch.logit}


@dataclass(frozen=True)
class Fracal:
    """``strength``: lambda, 0 leaves the spread out; ``counts``: images (p_c by images) or instances."""

    strength: float = 2.0
    shift: str = "log10"
    counts: str = "images"
    max_grid: int = 64

    space: ClassVar[dict[str, Any]] = {
        "strength": {"range": [0.0, 3.0]},
        "shift": {"choice": ["log10", "ln"]},
    }

    def __post_init__(self) -> None:
        at_least(self, 0, "strength")
        at_least(self, 2, "max_grid")
        one_of(self, "shift", (*_SCALE, "none"))
        one_of(self, "counts", ("images", "instances"))

    def fit(self, cache: Cache, context: FitContext) -> Head:
        """Measure the cache's ground truth; nothing is trained."""
        categories = cache.categories
        share = categories.image_count / max(len(cache.images), 1)
        if self.counts == "instances":
            share = categories.instance_count / max(categories.instance_count.sum(), 1)
        dimension = torch.from_numpy(fractal_dimension(*_centres(cache), len(categories), self.max_grid))
        if activation_of(cache, context) == "sigmoid":
            shift = sigmoid_shift(torch.from_numpy(share), dimension, self.strength, self.shift)
            return SigmoidProductHead(base_logits(cache, context), shift.float(), detector_logits=context.base is None)
        return self.apply(affine_head(cache, context, "all"), torch.from_numpy(share), dimension)

    def apply(self, head: AffineHead, share: Tensor, dimension: Tensor) -> AffineHead:
        """Fill ``head`` for [C] shares of images and [C] dimensions."""
        return head.set(shift=frequency_shift(share, self.shift), factor=dimension**-self.strength)


def frequency_shift(share: Tensor, form: str) -> Tensor:
    """[C] -> [C] w_c; a class without images counts as the rarest that has some."""
    if form == "none":
        return torch.zeros_like(share)
    scale = _SCALE[form]
    floor = share[share > 0].min() if bool((share > 0).any()) else torch.tensor(1.0)
    return scale(torch.tensor(1 / len(share), dtype=share.dtype)) - scale(share.clamp_min(float(floor)))


def sigmoid_shift(share: Tensor, dimension: Tensor, strength: float, form: str) -> Tensor:
    """[C], [C] -> [C] what the second sigmoid of a sigmoid detector is shifted by."""
    weight = dimension**strength
    spread = -torch.log10(weight / weight.sum()) - torch.log10(torch.tensor(float(len(share))))
    return frequency_shift(share, form) + spread


def fractal_dimension(
    label: NDArray[np.int64], x: NDArray[np.float64], y: NDArray[np.float64], num_classes: int, max_grid: int
) -> NDArray[np.float64]:
    """[M] labels and box centres as shares of the image in [0, 1) -> [C] box-counting dimensions in [1, 2].

    Centres outside are dropped (cells are half open).
    """
    inside = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    count = np.bincount(label, minlength=num_classes)
    dimension = np.ones(num_classes)
    for c in np.flatnonzero(count >= 4):
        rows = np.flatnonzero((label == c) & inside)
        grids = np.arange(1, min(max_grid, int(count[c] ** 0.5)) + 1)
        cells = [len(np.unique((x[rows] * g).astype(int) * g + (y[rows] * g).astype(int))) for g in grids]
        if len(rows):
            dimension[c] = max(np.polyfit(np.log(grids), np.log(cells), 1)[0], 1.0)
    return dimension


def _centres(cache: Cache) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Class index and normalised box centre of every object of the cache's split."""
    table, images = cache.annotations(), cache.images
    ids = images["image_id"].to_numpy()
    order = np.argsort(ids)
    row = order[np.searchsorted(ids[order], table["image_id"].to_numpy())]
    x, y = ((table[f"{a}1"].to_numpy() + table[f"{a}2"].to_numpy()) / 2 for a in "xy")
    label = cache.categories.index_of(table["category_id"].to_numpy())
    return label, x / images["width"].to_numpy()[row], y / images["height"].to_numpy()[row]
