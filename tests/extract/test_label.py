"""Labels by IoU and the choice of training proposals."""

from typing import Any

import numpy as np
import pytest
import torch

from calib.extract.adapter import Sampling
from calib.extract.label import assign, choose

BACKGROUND = 7


def boxes(*rows: tuple[float, ...]) -> Any:
    return np.asarray(rows, np.float32).reshape(-1, 4)


OBJECTS = boxes((0, 0, 10, 10), (20, 0, 30, 10))
LABEL = np.asarray([4, 2])


def test_labels_by_hand() -> None:
    """IoU with the first object: the box itself 1; half of it 0.5; a shift by 5 of 10 gives 5/15; nothing 0."""
    proposals = boxes((0, 0, 10, 10), (0, 0, 5, 10), (5, 0, 15, 10), (40, 40, 50, 50), (20, 0, 30, 8))
    found = assign(proposals, OBJECTS, LABEL, BACKGROUND, Sampling())
    assert found.label.tolist() == [4, 4, BACKGROUND, BACKGROUND, 2]  # 0.5 itself is foreground
    assert found.max_iou == pytest.approx([1, 0.5, 1 / 3, 0, 0.8])
    assert found.best.tolist()[:3] == [0, 0, 0] and found.best[4] == 1


def test_between_the_thresholds_a_proposal_is_ignored() -> None:
    proposals = boxes((0, 0, 5, 10), (0, 0, 4, 10), (0, 0, 7, 10))
    found = assign(proposals, OBJECTS, LABEL, BACKGROUND, Sampling(foreground_iou=0.7, background_iou=0.5))
    assert found.label.tolist() == [-1, BACKGROUND, 4]


def test_without_objects_everything_is_background() -> None:
    found = assign(boxes((0, 0, 5, 5)), boxes(), np.empty(0, np.int64), BACKGROUND, Sampling())
    assert found.label.tolist() == [BACKGROUND] and found.max_iou.tolist() == [0] and found.best.tolist() == [-1]
    none = assign(boxes(), OBJECTS, LABEL, BACKGROUND, Sampling())
    assert len(none.label) == 0


def test_labels_are_torchvisions() -> None:
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    rng = np.random.default_rng(0)
    for trial in range(50):
        corner = rng.integers(0, 30, (40, 2))
        p = np.concatenate([corner, corner + rng.integers(1, 20, (40, 2))], 1).astype(np.float32)
        objects, label = p[:5] + rng.integers(0, 3, (5, 4)).astype(np.float32), rng.integers(0, BACKGROUND, 5)
        low, high = (0.5, 0.5) if trial % 2 else (0.3, 0.6)
        matched = Matcher(high, low, allow_low_quality_matches=False)(
            box_iou(torch.from_numpy(objects), torch.from_numpy(p))
        ).numpy()
        expected = np.where(matched >= 0, label[matched], np.where(matched == -1, BACKGROUND, -1))
        sampling = Sampling(foreground_iou=high, background_iou=low)
        found = assign(p, objects, label, BACKGROUND, sampling)
        assert found.label.tolist() == expected.tolist()


def chosen(labels: list[int], sampling: Sampling, seed: int = 0) -> list[int]:
    n = len(labels)
    from calib.extract.label import Labels

    given = Labels(np.asarray(labels, np.int32), np.zeros(n, np.float32), np.zeros(n, np.int64))
    keep: list[int] = choose(given, BACKGROUND, sampling, np.random.default_rng(seed)).tolist()
    return keep


def test_a_quarter_foreground_at_most_and_background_for_the_rest() -> None:
    labels = [3] * 20 + [1] * 10 + [BACKGROUND] * 50 + [-1] * 30
    keep = chosen(labels, Sampling(rows_per_image=40, foreground_share=0.25))
    assert len(keep) == len(set(keep)) == 40
    kinds = [labels[k] for k in keep]
    assert kinds[:10] == sorted(kinds[:10]) and set(kinds[:10]) == {1, 3} and kinds[10:] == [BACKGROUND] * 30
    assert keep[10:] != sorted(keep[10:])  # shuffled: a slice is a random sample
    assert keep != chosen(labels, Sampling(rows_per_image=40, foreground_share=0.25), seed=1)


def test_too_few_of_a_kind() -> None:
    sampling = Sampling(rows_per_image=40, foreground_share=0.25)
    assert len(chosen([3] * 4 + [BACKGROUND] * 50, sampling)) == 40
    assert len(chosen([3] * 30 + [BACKGROUND] * 5, sampling)) == 15
    assert chosen([-1] * 9, sampling) == [] and chosen([], sampling) == []
