"""Box arithmetic on NumPy arrays: xyxy, absolute pixels, float32. Background plays no part here.

Letters: N boxes, M other boxes, C foreground classes.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float32]

# Widths grow at most by 1000/16 per regression step (Faster R-CNN reference implementations agree on it).
LOG_MAX_SCALE = math.log(1000.0 / 16)


def area(boxes: NDArray[Any]) -> NDArray[Any]:
    """[N, 4] -> [N] pixels squared."""
    width_height = boxes[:, 2:] - boxes[:, :2]
    areas: NDArray[Any] = width_height[:, 0] * width_height[:, 1]
    return areas


def pairwise_iou(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """[N, 4], [M, 4] -> [N, M] intersection over union in [0, 1]; empty boxes give 0."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = np.clip(high - low, 0, None)
    inter = sides[..., 0] * sides[..., 1]
    union = area(a)[:, None] + area(b)[None, :] - inter
    iou: NDArray[Any] = np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
    return iou


def decode(deltas: NDArray[Any], proposals: NDArray[Any], weights: tuple[float, ...]) -> Boxes:
    """Apply regression deltas to proposals (Faster R-CNN, Ren et al., NeurIPS 2015, Eq. 2 inverted).

    Args:
        deltas: [N, K, 4] (dx, dy, dw, dh), still multiplied by ``weights``.
        proposals: [N, 4].
        weights: the box coder's four weights, for example (10, 10, 5, 5).

    Returns:
        [N, K, 4] boxes, not clipped.
    """
    size = (proposals[:, 2:] - proposals[:, :2])[:, None]  # [N, 1, 2]
    center = proposals[:, None, :2] + 0.5 * size
    d = deltas / np.asarray(weights, np.float32)
    scaled = np.exp(np.minimum(d[..., 2:], np.float32(LOG_MAX_SCALE))) * size
    moved = d[..., :2] * size + center
    return np.asarray(np.concatenate([moved - 0.5 * scaled, moved + 0.5 * scaled], axis=-1), np.float32)


def clip(boxes: NDArray[Any], height: float, width: float) -> Boxes:
    """[..., 4] boxes cut at the image border."""
    limit = np.asarray([width, height, width, height], np.float32)
    return np.asarray(np.clip(boxes, np.float32(0), limit), np.float32)


def rescale(boxes: NDArray[Any], from_size: tuple[int, int], to_size: tuple[int, int]) -> Boxes:
    """Boxes of an image of ``from_size`` (height, width) in the pixels of ``to_size``."""
    ratio_y, ratio_x = (np.float32(t) / np.float32(f) for t, f in zip(to_size, from_size, strict=True))
    return (boxes * np.asarray([ratio_x, ratio_y, ratio_x, ratio_y], np.float32)).astype(np.float32)
