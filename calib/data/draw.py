"""Drawing one object or one background: coverage masks, textures, clutter. numpy + Pillow.

Letters: n side of an object's patch in pixels, S side of the image. Coordinates of outlines are in units of
the object's half size, y down.
"""

import colorsys
import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from calib.data.families import Look

Plane = npt.NDArray[np.float32]
Point = tuple[float, float]

_SUPERSAMPLING = 3


def _regular(corners: int, radius: float = 1.0, centre: Point = (0.0, 0.0)) -> list[Point]:
    turns = [2 * math.pi * i / corners - math.pi / 2 for i in range(corners)]
    return [(centre[0] + radius * math.cos(t), centre[1] + radius * math.sin(t)) for t in turns]


def _star() -> list[Point]:
    tips, dents = _regular(5), _regular(10, 0.42)[1::2]
    return [p for pair in zip(tips, dents, strict=True) for p in pair]


def _mirrored(quarter: list[Point]) -> list[Point]:
    """The outline whose four quarters are turns of ``quarter`` by 90 degrees."""
    out: list[Point] = []
    points = quarter
    for _ in range(4):
        out += points
        points = [(-y, x) for x, y in points]
    return out


_CORNERED: dict[str, list[Point]] = {
    "square": _mirrored([(-0.85, -0.85)]),
    "triangle": _regular(3),
    "pentagon": _regular(5),
    "star": _star(),
    "cross": _mirrored([(-0.34, -1.0), (0.34, -1.0), (0.34, -0.34)]),
    "dome": [(math.cos(t), 0.45 - 1.25 * math.sin(t)) for t in np.linspace(0, math.pi, 25)],
    "arrow": [(-1, -0.35), (0.1, -0.35), (0.1, -0.85), (1, 0), (0.1, 0.85), (0.1, 0.35), (-1, 0.35)],
    "corner": [(-0.85, -1), (-0.2, -1), (-0.2, 0.35), (0.85, 0.35), (0.85, 1), (-0.85, 1)],
    "hourglass": [(-0.9, -1), (0.9, -1), (0.2, 0), (0.9, 1), (-0.9, 1), (-0.2, 0)],
}


def _outlines(shape: str, rng: np.random.Generator) -> tuple[list[Point], list[Point]]:
    """Outer outline, and hole or nothing. Corners wander a little from instance to instance."""
    if shape in _CORNERED:
        wander = rng.normal(0, 0.05, (len(_CORNERED[shape]), 2))
        return [(x + dx, y + dy) for (x, y), (dx, dy) in zip(_CORNERED[shape], wander, strict=True)], []
    if shape == "ring":
        return _regular(40), _regular(40, rng.uniform(0.45, 0.6))
    if shape == "crescent":
        return _regular(40), _regular(40, 0.85, (0.5, 0.0))
    return _regular(40), []


def draw_mask(shape: str, half_px: float, aspect: float, rng: np.random.Generator) -> Plane:
    """Coverage in [0, 1] of an object of half size ``half_px``, stretched by ``aspect``, turned up to 29
    degrees.

    The patch is square with an even side and the object in its middle. [n, n]
    """
    half_diagonal = half_px * math.hypot(aspect**0.5, aspect**-0.5)
    margin = math.ceil(half_diagonal) + 2
    side = 2 * margin * _SUPERSAMPLING
    angle = rng.uniform(-0.5, 0.5)
    cos, sin, scale = math.cos(angle), math.sin(angle), _SUPERSAMPLING * half_px
    wide, high = scale * aspect**0.5, scale * aspect**-0.5

    def placed(points: list[Point]) -> list[Point]:
        return [
            (side / 2 + x * wide * cos - y * high * sin, side / 2 + x * wide * sin + y * high * cos) for x, y in points
        ]

    image = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(image)
    outer, hole = _outlines(shape, rng)
    pen.polygon(placed(outer), fill=255)
    if hole:
        pen.polygon(placed(hole), fill=0)
    return np.asarray(image.reduce(_SUPERSAMPLING), np.float32) / np.float32(255)


def blur_mask(mask: Plane) -> Plane:
    """A mask with its outline washed out: a blob of no known shape. [n, n] -> [n, n]"""
    n = len(mask)
    small = Image.fromarray((mask * 255).astype(np.uint8)).resize((max(2, n // 6),) * 2, Image.Resampling.BOX)
    return np.asarray(small.resize((n, n), Image.Resampling.BICUBIC), np.float32) / np.float32(255)


def _pattern(pattern: str, half_px: float, mask: Plane, rng: np.random.Generator) -> Plane:
    """Where the second colour goes, 0 or 1. [n, n]"""
    n = len(mask)
    if pattern == "plain":
        return np.zeros((n, n), np.float32)
    if pattern == "rimmed":
        return _rim(mask, max(1, round(half_px * 0.17)))
    y, x = np.mgrid[0:n, 0:n].astype(np.float32) - n / 2
    angle, period = rng.uniform(0, math.pi), max(4.0, half_px * rng.uniform(0.45, 0.7))
    shift = rng.uniform(0, period, 2)
    u = (x * math.cos(angle) + y * math.sin(angle) + shift[0]) / period
    v = (y * math.cos(angle) - x * math.sin(angle) + shift[1]) / period
    if pattern == "striped":
        marks = u % 1 < 0.42
    elif pattern == "dotted":
        marks = (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.32**2
    else:
        marks = (np.floor(u) + np.floor(v)) % 2 == 1
    out: Plane = marks.astype(np.float32)
    return out


def _rim(mask: Plane, width_px: int) -> Plane:
    inside = mask > 0.5
    core = inside.copy()
    for axis in (0, 1):
        for step in (width_px, -width_px):
            core &= np.roll(inside, step, axis)
    return (~core).astype(np.float32)


def draw_texture(look: Look, mask: Plane, half_px: float, hue: float, value: float, rng: np.random.Generator) -> Plane:
    """Colours of an object: base colour, near-black or near-white marks, a slope of light. [n, n, 3]"""
    n = len(mask)
    saturation = float(np.clip(0.8 + rng.normal(0, 0.08), 0, 1))
    base = np.array(colorsys.hsv_to_rgb(hue % 1, saturation, min(1.0, max(0.2, value))), np.float32)
    second = np.float32(rng.choice((0.06, 0.94)) + rng.uniform(-0.05, 0.05))
    marks = _pattern(look.pattern, half_px, mask, rng)[..., None]
    slope = np.linspace(-1, 1, n, dtype=np.float32)
    across, down = rng.normal(0, 0.08, 2).astype(np.float32)
    light = 1 + across * slope[None, :, None] + down * slope[:, None, None]
    out: Plane = np.clip((base + marks * (second - base)) * light, 0, 1)
    return out


def draw_background(size_px: int, rng: np.random.Generator) -> Plane:
    """Smooth colour clouds with clutter of any colour: lines, dots, arcs. [S, S, 3]"""
    cells = int(rng.integers(3, 9))
    clouds = rng.uniform(0.15, 0.85, 3) + rng.normal(0, 0.13, (cells, cells, 3))
    small = Image.fromarray((np.clip(clouds, 0, 1) * 255).astype(np.uint8))
    image = small.resize((size_px, size_px), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 9))):
        _draw_clutter(pen, size_px, rng)
    return np.asarray(image, np.float32) / np.float32(255)


def _draw_clutter(pen: ImageDraw.ImageDraw, size_px: int, rng: np.random.Generator) -> None:
    red, green, blue = (int(v) for v in rng.integers(0, 256, 3))
    x, y, x2, y2 = (float(v) for v in rng.uniform(0, size_px, 4))
    width, kind = int(rng.integers(1, 4)), int(rng.integers(3))
    if kind == 0:
        pen.line([(x, y), (x2, y2)], fill=(red, green, blue), width=width)
    elif kind == 1:
        r = float(rng.uniform(2, 6))
        pen.ellipse((x - r, y - r, x + r, y + r), fill=(red, green, blue))
    else:
        r, start = float(rng.uniform(8, 30)), float(rng.uniform(0, 360))
        sweep = float(rng.uniform(60, 300))
        pen.arc((x - r, y - r, x + r, y + r), start, start + sweep, fill=(red, green, blue), width=width)
