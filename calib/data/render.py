"""One picture of the procedural set: which objects lie where, and what of each is visible.

Objects are painted one over the other in random order. Only what can be seen counts as an instance: at least
30 % of the object and 20 pixels; its box bounds the visible pixels and its area is their number. Decoys are
objects with the colours of a category on a shape and pattern that no category has: they are background, and
unlabelled.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calib.data.draw import Plane, blur_mask, draw_background, draw_mask, draw_texture
from calib.data.families import PATTERNS, SHAPES, Look

_VISIBLE_SHARE = 0.3
_VISIBLE_PX = 20


@dataclass(frozen=True)
class Scene:
    """How pictures look. Sizes are pixels, hues turns, spreads standard deviations.

    One hue step is 0.065 at a spread of 0.018 within a category; one aspect step a factor of exp(0.6) at a
    spread of exp(0.13); one step of darkness 0.32 of the brightness at a spread of 0.09.
    """

    size_px: int = 144
    min_half_px: float = 8.0
    max_half_px: float = 17.0
    hue_step: float = 0.065
    hue_spread: float = 0.018
    aspect_step: float = 0.60
    aspect_spread: float = 0.13
    dark_step: float = 0.32
    dark_spread: float = 0.09
    spacing: float = 0.85
    decoys: float = 1.5
    noise: float = 0.02


@dataclass(frozen=True)
class Instance:
    """One object as it came out: ``rank`` of its category, visible box (x, y, w, h), visible pixels."""

    rank: int
    box: tuple[int, int, int, int]
    area: int
    is_clear: bool


@dataclass(frozen=True)
class Picture:
    """``pixels`` [S, S, 3] uint8, and every object of a category of which at least one pixel shows."""

    pixels: npt.NDArray[np.uint8]
    instances: tuple[Instance, ...]


class _Canvas:
    """The picture under way and, per pixel, the number of the topmost object (-1: none)."""

    def __init__(self, size_px: int, rng: np.random.Generator) -> None:
        self.size_px = size_px
        self.colours = draw_background(size_px, rng)
        self.owner = np.full((size_px, size_px), -1, np.int32)

    def paint(self, number: int, mask: Plane, texture: Plane, x: float, y: float) -> None:
        """Lay the patch ``texture`` over the picture with its middle at ``(x, y)``."""
        n = len(mask)
        left, top = round(x) - n // 2, round(y) - n // 2
        rows = slice(max(0, top), min(self.size_px, top + n))
        columns = slice(max(0, left), min(self.size_px, left + n))
        inside = (
            slice(rows.start - top, rows.stop - top),
            slice(columns.start - left, columns.stop - left),
        )
        cover = mask[inside][..., None]
        self.colours[rows, columns] += cover * (texture[inside] - self.colours[rows, columns])
        self.owner[rows, columns][mask[inside] > 0.5] = number

    def visible(self, number: int, rank: int, whole_px: int) -> Instance | None:
        """What is left to see of object ``number``; None when nothing is."""
        ys, xs = np.nonzero(self.owner == number)
        if len(ys) == 0:
            return None
        left, top = int(xs.min()), int(ys.min())
        box = (left, top, int(xs.max()) - left + 1, int(ys.max()) - top + 1)
        is_clear = len(ys) >= max(_VISIBLE_PX, _VISIBLE_SHARE * whole_px)
        return Instance(rank, box, len(ys), is_clear)


def _decoy(looks: list[Look], taken: frozenset[tuple[str, str]], rng: np.random.Generator) -> Look:
    """A look that no category has; where shape and pattern are a category's, the shape is washed out."""
    model = looks[int(rng.integers(len(looks)))]
    shape, pattern = SHAPES[int(rng.integers(len(SHAPES)))], PATTERNS[int(rng.integers(len(PATTERNS)))]
    if (shape, pattern) in taken:
        shape = "blob"
    return Look(shape, pattern, model.hue, model.dark, model.hue_step, model.aspect_step)


def _place(
    half_px: float, placed: list[tuple[float, float, float]], scene: Scene, rng: np.random.Generator
) -> tuple[float, float]:
    """A place with little overlap; after twelve tries any place will do, hence occlusion."""
    margin = 0.6 * half_px
    x = y = 0.0
    for _ in range(12):
        x, y = rng.uniform(margin, scene.size_px - margin, 2)
        if all(math.hypot(x - a, y - b) > scene.spacing * (half_px + r) for a, b, r in placed):
            break
    placed.append((x, y, half_px))
    return x, y


def _object(look: Look, half_px: float, scene: Scene, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Mask [n, n] and texture [n, n, 3] of one object with its own variation."""
    aspect = math.exp(scene.aspect_step * look.aspect_step + rng.normal(0, scene.aspect_spread))
    hue = look.hue + scene.hue_step * look.hue_step + rng.normal(0, scene.hue_spread)
    value = 0.92 - scene.dark_step * look.dark + rng.normal(0, scene.dark_spread)
    if look.shape == "blob":
        mask = blur_mask(draw_mask("pentagon", half_px, aspect, rng))
    else:
        mask = draw_mask(look.shape, half_px, aspect, rng)
    return mask, draw_texture(look, mask, half_px, hue, value, rng)


def render(
    ranks: list[int],
    looks: list[Look],
    taken: frozenset[tuple[str, str]],
    scene: Scene,
    rng: np.random.Generator,
) -> Picture:
    """Paint one object per entry of ``ranks`` (index into ``looks``) and a Poisson number of decoys.

    ``taken`` holds the (shape, pattern) pairs that categories have; decoys keep away from them.
    """
    canvas = _Canvas(scene.size_px, rng)
    numbers = rng.permutation(np.array(ranks + [-1] * int(rng.poisson(scene.decoys)), np.int64))
    placed: list[tuple[float, float, float]] = []
    whole = []
    for number, rank in enumerate(numbers):
        look = looks[rank] if rank >= 0 else _decoy(looks, taken, rng)
        half_px = math.exp(rng.uniform(math.log(scene.min_half_px), math.log(scene.max_half_px)))
        x, y = _place(half_px, placed, scene, rng)
        mask, texture = _object(look, half_px, scene, rng)
        canvas.paint(number, mask, texture, x, y)
        whole.append(int((mask > 0.5).sum()))
    seen = (canvas.visible(i, int(r), whole[i]) for i, r in enumerate(numbers) if r >= 0)
    grain = rng.standard_normal(canvas.colours.shape, np.float32) * np.float32(scene.noise)
    pixels = np.clip(canvas.colours * np.float32(rng.uniform(0.92, 1.08)) + grain, 0, 1)
    return Picture((pixels * 255).astype(np.uint8), tuple(i for i in seen if i is not None))
