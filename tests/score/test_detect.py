"""Detections: those of torchvision's batched_nms over everything, in the same order, for boxes of any shape."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.errors import NonFiniteError, ShapeError
from calib.score.detect import Detections, detect
from calib.settings import Nms


def reference(scores: Any, boxes: Any, nms: Nms, min_box_side: float) -> tuple[list[int], list[int]]:
    """Rows and categories by torchvision: threshold, small boxes out, batched_nms over all, the first k.

    Coordinates must be small whole numbers: batched_nms moves classes apart by adding offsets to them.
    """
    from torchvision.ops import batched_nms, remove_small_boxes

    row, category = (torch.from_numpy(scores) > nms.score_threshold).nonzero(as_tuple=True)
    flat = torch.from_numpy(scores)[row, category]
    chosen = torch.from_numpy(boxes)[row] if boxes.ndim == 2 else torch.from_numpy(boxes)[row, category]
    keep = remove_small_boxes(chosen, min_box_side)
    keep = keep[batched_nms(chosen[keep], flat[keep], category[keep], nms.nms_iou)][: nms.max_detections]
    return row[keep].tolist(), category[keep].tolist()


def assert_as_torchvision(scores: Any, boxes: Any, nms: Nms, min_box_side: float = 0.0) -> Detections:
    found = detect(scores, boxes, nms, min_box_side=min_box_side)
    assert (found.row.tolist(), found.category.tolist()) == reference(scores, boxes, nms, min_box_side)
    assert np.array_equal(found.score, scores[found.row, found.category])
    own = boxes[found.row] if boxes.ndim == 2 else boxes[found.row, found.category]
    assert np.array_equal(found.box, own)
    return found


def make(seed: int, n: int, c: int, *, specific: bool, levels: int, spread: int) -> tuple[Any, Any]:
    """Scores on ``levels`` steps (few steps: many ties), whole-numbered boxes, some without width or height."""
    rng = np.random.default_rng(seed)
    scores = (rng.integers(0, levels + 1, (n, c)) / levels).astype(np.float32)
    corner = rng.integers(0, spread, (n, c, 2) if specific else (n, 2))
    boxes = np.concatenate([corner, corner + rng.integers(0, 12, corner.shape)], axis=-1).astype(np.float32)
    return scores, boxes


@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(0, 40),
    c=st.integers(1, 12),
    specific=st.booleans(),
    levels=st.sampled_from([1, 3, 20, 10_000]),
    spread=st.sampled_from([1, 8, 60]),
    threshold=st.sampled_from([0.0, 1e-4, 0.5, 1.0]),
    iou=st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0]),
    k=st.integers(1, 40),
    side=st.sampled_from([0.0, 0.01, 3.0]),
)
def test_the_detections_of_torchvision(
    seed: int,
    n: int,
    c: int,
    specific: bool,
    levels: int,
    spread: int,
    threshold: float,
    iou: float,
    k: int,
    side: float,
) -> None:
    pytest.importorskip("torchvision")
    scores, boxes = make(seed, n, c, specific=specific, levels=levels, spread=spread)
    assert_as_torchvision(scores, boxes, Nms(threshold, iou, k), side)


@pytest.mark.parametrize("specific", [False, True])
def test_many_candidates_and_few_survivors(specific: bool) -> None:
    """All boxes alike and one class far ahead: one survivor among the first 300, so that the walk must be widened."""
    pytest.importorskip("torchvision")
    scores, boxes = make(0, 300, 6, specific=specific, levels=10_000, spread=1)
    boxes[..., 2:] = boxes[..., :2] + 10
    scores[:, 1:] *= 0.1
    scores[:, 0] += 0.1
    found = assert_as_torchvision(scores, boxes, Nms(1e-4, 0.5, 5))
    assert len(found.row) == 5
    assert len(assert_as_torchvision(scores, boxes, Nms(1e-4, 0.5, 100)).row) == 6


def test_the_size_of_a_real_image() -> None:
    pytest.importorskip("torchvision")
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.standard_normal((1000, 301)).astype(np.float32) * 3)
    scores = z.softmax(1)[:, :-1].contiguous().numpy()
    _, boxes = make(1, 1000, 1, specific=False, levels=1, spread=300)
    boxes[:, 2:] += 20
    assert len(assert_as_torchvision(scores, boxes, Nms()).row) == 300


def one_class(scores: list[float], boxes: Any, nms: Nms, side: float = 0.0) -> list[int]:
    s, b = np.asarray(scores, np.float32)[:, None], np.asarray(boxes, np.float32).reshape(-1, 4)
    rows: list[int] = detect(s, b, nms, min_box_side=side).row.tolist()
    return rows


def test_overlap_at_the_threshold_by_hand() -> None:
    """[0, 10] and [0, 5] of equal height: IoU 0.5, which is not greater than 0.5; [0, 6]: 0.6, which is."""
    assert one_class([0.9, 0.8], [[0, 0, 10, 10], [0, 0, 5, 10]], Nms(nms_iou=0.5)) == [0, 1]
    assert one_class([0.9, 0.8], [[0, 0, 10, 10], [0, 0, 6, 10]], Nms(nms_iou=0.5)) == [0]


def test_only_kept_boxes_suppress() -> None:
    """The second is suppressed by the first and so does not suppress the third (overlaps 0.6, 0.6 and 0.2)."""
    boxes = [[0, 0, 10, 10], [2.5, 0, 12.5, 10], [5, 0, 15, 10]]
    assert one_class([0.9, 0.8, 0.7], boxes, Nms(nms_iou=0.5)) == [0, 2]


def test_classes_do_not_suppress_each_other() -> None:
    scores, boxes = np.asarray([[0.9, 0.8]], np.float32), np.asarray([[0, 0, 9, 9]], np.float32)
    found = detect(scores, boxes, Nms())
    assert found.row.tolist() == [0, 0] and found.category.tolist() == [0, 1]


def test_ties_keep_the_order_of_rows_then_classes() -> None:
    scores = np.full((3, 2), 0.5, np.float32)
    boxes = np.asarray([[20 * i, 0, 20 * i + 9, 9] for i in range(3)], np.float32)
    found = detect(scores, boxes, Nms(max_detections=5))
    assert list(zip(found.row, found.category, strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def test_the_threshold_itself_is_not_above_it() -> None:
    far = [[0, 0, 9, 9], [20, 0, 29, 9]]
    assert one_class([0.25, 0.2500001], far, Nms(score_threshold=0.25)) == [1]
    assert one_class([1.0, 0.5], far, Nms(score_threshold=1.0)) == []


def test_small_boxes_are_dropped_and_suppress_nothing() -> None:
    boxes = [[0, 0, 0.005, 9], [0, 0, 9, 9], [3, 3, 3, 3]]
    assert one_class([0.9, 0.8, 0.7], boxes, Nms(), side=0.01) == [1]
    assert one_class([0.9, 0.8, 0.7], boxes, Nms()) == [0, 1, 2]  # boxes without area overlap nothing


def test_an_image_without_proposals() -> None:
    for boxes in (np.empty((0, 4), np.float32), np.empty((0, 3, 4), np.float32)):
        found = detect(np.empty((0, 3), np.float32), boxes, Nms())
        assert found.box.shape == (0, 4) and len(found.row) == len(found.category) == len(found.score) == 0


def test_what_does_not_fit_is_refused() -> None:
    scores, boxes = np.full((3, 2), 0.5, np.float32), np.zeros((3, 4), np.float32)
    for wrong in (boxes[:2], np.zeros((3, 5), np.float32), np.zeros((3, 3, 4), np.float32)):
        with pytest.raises(ShapeError, match=r"expected \[3, 4\] or \[3, 2, 4\]"):
            detect(scores, wrong, Nms())
    for bad in (np.nan, np.inf):
        broken = boxes.copy()
        broken[1, 2] = bad
        with pytest.raises(NonFiniteError):
            detect(scores, broken, Nms())
    scores[2, 1] = np.nan
    with pytest.raises(NonFiniteError):
        detect(scores, boxes, Nms())
