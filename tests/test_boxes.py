"""Box arithmetic against torchvision's and against numbers worked by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from calib.boxes import area, clip, decode, pairwise_iou, rescale


def random_boxes(n: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 50, (n, 2))
    return np.concatenate([corner, corner + rng.uniform(0, 40, (n, 2))], 1).astype(np.float32)


def test_overlaps_are_torchvisions() -> None:
    from torchvision.ops import box_iou

    a, b = random_boxes(40, 0), random_boxes(30, 1)
    a[3] = a[3, [0, 1, 0, 3]]  # without width
    expected = box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert np.array_equal(pairwise_iou(a, b), expected)
    assert pairwise_iou(a[:0], b).shape == (0, 30)


def test_empty_boxes_overlap_nothing_not_even_themselves() -> None:
    box = np.asarray([[5, 5, 5, 9]], np.float32)
    assert pairwise_iou(box, box).tolist() == [[0.0]]
    assert area(box).tolist() == [0.0]


def test_decoding_by_hand() -> None:
    """A proposal of 20 x 10 about (20, 15). dx = 1 / 10 moves by a tenth of the width, 2; dw = ln 2, with weight 5:
    twice the width."""
    proposal = np.asarray([[10, 10, 30, 20]], np.float32)
    deltas = np.asarray([[[1, 0, 0, 0], [0, 0, 5 * math.log(2), 0]]], np.float32)
    decoded = decode(deltas, proposal, (10, 10, 5, 5))
    assert decoded[0, 0] == pytest.approx([12, 10, 32, 20])
    assert decoded[0, 1] == pytest.approx([0, 10, 40, 20])


def test_decoding_and_clipping_are_torchvisions() -> None:
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.ops import clip_boxes_to_image

    weights = (10.0, 10.0, 5.0, 5.0)
    proposals = random_boxes(50, 0)
    deltas = np.random.default_rng(1).normal(0, 5, (50, 3, 4)).astype(np.float32)
    deltas[0, 0, 2] = 100  # beyond the largest growth
    own = BoxCoder(weights).decode(torch.from_numpy(deltas.reshape(50, 12)), [torch.from_numpy(proposals)])
    decoded = decode(deltas, proposals, weights)
    assert decoded.dtype == np.float32
    assert np.allclose(decoded, own.numpy(), rtol=1e-5, atol=1e-4)
    clipped = clip_boxes_to_image(torch.from_numpy(decoded), (40, 60)).numpy()
    assert np.array_equal(clip(decoded, 40, 60), clipped)


def test_boxes_go_back_to_the_original_picture() -> None:
    boxes = np.asarray([[10, 20, 30, 40]], np.float32)
    assert rescale(boxes, (100, 200), (50, 400)).tolist() == [[20, 10, 60, 20]]  # height halved, width doubled
    assert np.array_equal(rescale(boxes, (37, 91), (37, 91)), boxes)


def test_rescaling_is_torchvisions() -> None:
    from torchvision.models.detection.transform import resize_boxes

    boxes = random_boxes(50, 3)
    own = resize_boxes(torch.from_numpy(boxes), [144, 131], [427, 640]).numpy()
    assert np.array_equal(rescale(boxes, (144, 131), (427, 640)), own)
