"""Do two lists of detections of one image agree? What the detector itself found, and what the rows of a cache give.

Scores of one RoI and class may differ by ``tolerance``: float32 products in another order, a head on another device.
Such noise also decides ties: which of two boxes of nearly one score suppresses the other, on which side of a threshold
or of the cap a score falls. A detection that one list has alone is explained by such a tie or by nothing.

Letters: N rows, C foreground classes, K detections.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.boxes import Boxes, pairwise_iou
from calib.extract.adapter import Own
from calib.settings import Nms

RELATIVE, ABSOLUTE = 1e-2, 1e-5  # of a score
_IOU = 1e-3
_PIXELS, _SHARE = 0.1, 1e-2  # of a coordinate: pixels, and a share of the box's longer side
Pair = tuple[int, int]  # row, class


@dataclass(frozen=True)
class Difference:
    """One detection on which the lists disagree; a score is None where that list does not have it."""

    category: int
    own: float | None
    ours: float | None

    @property
    def size(self) -> float:
        """Of the scores."""
        return abs((self.own or 0.0) - (self.ours or 0.0))


@dataclass(frozen=True)
class Rows:
    """All rows of an image: their scores and boxes, the pairs that suppression left of them, and its thresholds."""

    scores: NDArray[np.float32]  # [N, C]
    boxes: Boxes  # [N, 4] or [N, C, 4], in the pixels of the picture
    kept: list[Pair]
    nms: Nms
    min_box_side: float

    def box(self, pair: Pair) -> NDArray[np.float32]:
        """[4]."""
        return np.asarray(self.boxes[pair[0]] if self.boxes.ndim == 2 else self.boxes[pair])

    def of_class(self, category: int) -> Boxes:
        """[N, 4]."""
        return self.boxes if self.boxes.ndim == 2 else self.boxes[:, category]


def tolerance(score: float) -> float:
    """How far another score of the same RoI and class may be from ``score``."""
    return ABSOLUTE + RELATIVE * score


def compare(own: Own, rows: Rows) -> tuple[float, list[Difference]]:
    """The largest difference of two scores of one RoI and class, and the detections on which the lists disagree."""
    kept = rows.kept if own.row is None else _best(own.row, rows)
    found, largest, wrong = _placed(own, rows, set(kept))
    ties = _Ties(own, rows, {"own": set(found), "ours": set(kept)})
    for pair, side in sorted(ties.alone.items(), key=lambda item: -float(rows.scores[item[0]])):
        if not ties.explain(pair, side):
            score = float(rows.scores[pair])
            wrong.append(Difference(pair[1], found[pair], None) if side == "own" else Difference(pair[1], None, score))
    return largest, sorted(wrong, key=lambda d: -d.size)


def _best(row: NDArray[np.int64], rows: Rows) -> list[Pair]:
    """Where a row has one detection: its best class."""
    best = [(int(r), int(rows.scores[r].argmax())) for r in row]
    return [pair for pair in best if rows.scores[pair] > rows.nms.score_threshold]


def _placed(own: Own, rows: Rows, kept: set[Pair]) -> tuple[dict[Pair, float], float, list[Difference]]:
    """The row of every detection of the detector with its score, by class and box; the largest difference of scores;
    the detections that no row gives. Of rows at one place that fit, a row that was kept comes first."""
    found: dict[Pair, float] = {}
    largest, wrong = 0.0, []
    for k in np.argsort(-own.score, kind="stable"):
        c, score, box = int(own.category[k]), float(own.score[k]), own.box[k]
        allowed = _PIXELS + _SHARE * float((box[2:] - box[:2]).max())
        near = np.flatnonzero(np.abs(rows.of_class(c) - box).max(axis=1) <= allowed)
        if own.row is not None:
            near = near[near == own.row[k]]
        free = [(int(r), c) for r in near if (int(r), c) not in found]
        if not free:
            wrong.append(Difference(c, score, None))
            continue
        fit = [p for p in free if abs(float(rows.scores[p]) - score) <= tolerance(score)]
        pair = min(fit or free, key=lambda p: (p not in kept, abs(float(rows.scores[p]) - score)))
        difference = abs(float(rows.scores[pair]) - score)
        largest = max(largest, difference)
        found[pair] = score
        if not fit:
            wrong.append(Difference(c, score, float(rows.scores[pair])))
    return found, largest, wrong


class _Ties:
    """Which pairs one list has alone because of a tie. Pairs come in descending order of their scores."""

    def __init__(self, own: Own, rows: Rows, sides: dict[str, set[Pair]]) -> None:
        self._rows, self._sides, self._of_row = rows, sides, own.row is not None
        self.alone = {p: s for s, other in (("own", "ours"), ("ours", "own")) for p in sides[s] - sides[other]}
        self._explained: set[Pair] = set()
        sides_of_boxes = rows.boxes[..., 2:] - rows.boxes[..., :2]
        empty = np.asarray((sides_of_boxes <= 0).any(axis=-1))
        empty = empty if empty.ndim == 2 else empty[:, None]
        counted = {s: np.asarray([rows.scores[p] for p in pairs], np.float32) for s, pairs in sides.items()}
        # Some detectors let boxes without area count for the cap, and leave them out afterwards.
        without_area = rows.scores[empty & (rows.scores > rows.nms.score_threshold)]
        self._counted = counted | {"own": np.concatenate([counted["own"], without_area])}
        self._cut = {"own": own.cut, "ours": 0.0}

    def explain(self, pair: Pair, side: str) -> bool:
        """Whether noise decided that only ``side`` has ``pair``."""
        other = "ours" if side == "own" else "own"
        score = float(self._rows.scores[pair])
        at_threshold = abs(score - self._rows.nms.score_threshold) <= tolerance(score)
        before = int((self._counted[other] >= score - tolerance(score)).sum())
        cut = self._cut[other]
        is_cut = before >= self._rows.nms.max_detections or (cut > 0 and score <= cut + tolerance(score))
        if at_threshold or is_cut or self._is_small(pair) or self._is_suppressed(pair, score, other):
            self._explained.add(pair)
        return pair in self._explained

    def _is_small(self, pair: Pair) -> bool:
        """A side so near to the smallest one that rounding decides."""
        box = self._rows.box(pair)
        return bool((box[2:] - box[:2]).min() <= 2 * self._rows.min_box_side + _IOU)

    def _is_suppressed(self, pair: Pair, score: float, other: str) -> bool:
        """By a box of the other list: at the threshold of overlap, or one that is itself there because of a tie."""
        limit = self._rows.nms.nms_iou
        rivals = [p for p in self._sides[other] if p != pair and (p[0] == pair[0] if self._of_row else p[1] == pair[1])]
        if self._of_row:
            return any(abs(float(self._rows.scores[p]) - score) <= tolerance(score) for p in rivals)
        if not rivals:
            return False
        boxes: Any = np.stack([self._rows.box(p) for p in rivals])
        overlaps = pairwise_iou(self._rows.box(pair)[None].astype(np.float32), boxes)[0]
        for rival, iou in zip(rivals, overlaps.tolist(), strict=True):
            theirs = float(self._rows.scores[rival])
            if iou <= limit - _IOU or theirs < score - tolerance(score):
                continue
            is_tie = rival in self._explained or abs(theirs - score) <= tolerance(score)
            if iou <= limit + _IOU or (rival in self.alone and is_tie):
                return True
        return False
