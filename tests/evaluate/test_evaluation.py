"""Numbers worked by hand, and the limits of every rule."""

from typing import Any

import numpy as np
import pytest

from calib.errors import SettingError, ShapeError
from calib.evaluate import Detections, Evaluation, GroundTruth, bin_index, evaluate
from calib.evaluate.average_precision import true_positives_needed
from calib.evaluate.select import best_of_each

Document = dict[str, Any]
OBJECT = [10.0, 10.0, 40.0, 40.0]
ELSEWHERE = [200.0, 200.0, 40.0, 40.0]


def judged(document: Document, *results: tuple[int, list[float], float], **options: Any) -> Evaluation:
    """Evaluate (category id, box, score) rows in image 5."""
    rows = [{"image_id": 5, "category_id": c, "bbox": box, "score": score} for c, box, score in results]
    return evaluate(GroundTruth.from_document(document), Detections.from_document(rows), **options)


def test_a_lone_hit_has_the_reference_s_precision(one_object: Document) -> None:
    # 1 / (0 + 1 + 2.2e-16), as the reference adds it up.
    evaluation = judged(one_object, (3, OBJECT, 0.9), full=True)
    assert evaluation.precision is not None
    assert (evaluation.precision[:, :, 0, 0] == 0.9999999999999998).all()
    assert evaluation.n_gt.tolist() == [1, 0, 0] and evaluation.n_det.tolist() == [1, 0, 0]


def test_a_miss_above_the_hit_halves_ap(one_object: Document) -> None:
    assert judged(one_object, (3, OBJECT, 0.8), (3, ELSEWHERE, 0.9)).AP[0] == pytest.approx(0.5)


def test_a_miss_below_the_hit_costs_nothing(one_object: Document) -> None:
    assert judged(one_object, (3, OBJECT, 0.9), (3, ELSEWHERE, 0.8)).AP[0] == pytest.approx(1.0)


def test_an_object_is_found_once(one_object: Document) -> None:
    one_object["annotations"].append(one_object["annotations"][0] | {"id": 2, "bbox": ELSEWHERE})
    # Hit, double, hit: precision 1 up to recall 1/2 (51 points), then 2/3 (50 points).
    evaluation = judged(one_object, (3, OBJECT, 0.9), (3, OBJECT, 0.8), (3, ELSEWHERE, 0.7))
    assert evaluation.AP[0] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_half_an_overlap_passes_one_threshold_only(one_object: Document) -> None:
    evaluation = judged(one_object, (3, [10.0, 10.0, 20.0, 40.0], 0.9))  # IoU exactly 0.5
    assert evaluation.AP50[0] == pytest.approx(1.0) and evaluation.AP75[0] == 0
    assert evaluation.AP[0] == pytest.approx(0.1) and evaluation.AR[0] == pytest.approx(0.1)


def test_an_unlabelled_category_is_not_judged(one_object: Document) -> None:
    evaluation = judged(one_object, (3, OBJECT, 0.9), (9, ELSEWHERE, 0.95), (8, ELSEWHERE, 0.95))
    assert evaluation.n_det.tolist() == [1, 1, 0]  # 8 is labelled as absent, 9 is not labelled at all


def test_misses_of_a_not_exhaustive_category_are_excused(one_object: Document) -> None:
    one_object["images"][0]["not_exhaustive_category_ids"] = [3]
    assert judged(one_object, (3, OBJECT, 0.8), (3, ELSEWHERE, 0.9)).AP[0] == pytest.approx(1.0)


def test_of_equal_overlaps_the_later_object_wins(one_object: Document) -> None:
    # Objects at x = 10 and x = 30 overlap the first detection, at x = 20, equally (IoU 0.6). It takes the
    # later one, at 30, and the second detection, which lies there, gets nothing (IoU 1/3 with the other).
    first = one_object["annotations"][0]
    one_object["annotations"].append(first | {"id": 2, "bbox": [30.0, 10.0, 40.0, 40.0]})
    results = [(3, [20.0, 10.0, 40.0, 40.0], 0.9), (3, [30.0, 10.0, 40.0, 40.0], 0.8)]
    assert judged(one_object, *results).AP50[0] == pytest.approx(51 / 101)  # one of two found
    one_object["annotations"].reverse()
    assert judged(one_object, *results).AP50[0] == pytest.approx(1.0)


def test_an_area_on_the_edge_counts_on_both_sides(one_object: Document) -> None:
    one_object["annotations"][0] |= {"bbox": [0.0, 0.0, 32.0, 32.0], "area": 1024.0}
    summary = judged(one_object, (3, [0.0, 0.0, 32.0, 32.0], 0.9)).summary()
    assert summary["APs"] == summary["APm"] == pytest.approx(1.0)
    assert (summary["APl"], summary["nl"]) == (-1, 0)


def test_the_cap_counts_all_categories_also_unknown_ones(one_object: Document) -> None:
    results = [(3, OBJECT, 0.5), (77, ELSEWHERE, 0.9), (9, ELSEWHERE, 0.8)]
    assert judged(one_object, *results, max_detections=2).AP[0] == 0
    assert judged(one_object, *results, max_detections=3).AP[0] == pytest.approx(1.0)
    assert judged(one_object, *results, max_detections=-1).AP[0] == pytest.approx(1.0)


def test_the_cap_keeps_the_first_of_equal_scores() -> None:
    image, score = np.array([1, 0, 1, 1, 0]), np.array([0.5, 0.1, 0.5, 0.9, 0.2])
    assert best_of_each(image, score, 2).tolist() == [0, 1, 3, 4]
    assert best_of_each(image, score, -1).tolist() == [0, 1, 2, 3, 4]


def test_recall_points_are_compared_as_doubles() -> None:
    needed = true_positives_needed(100)
    assert needed[57] == 58  # 0.57 is 0.5700000000000001 among the points
    assert needed[50] == 50 and needed[0] == 1 and needed[100] == 100
    assert set(true_positives_needed(1).tolist()) == {1}
    assert np.bincount(true_positives_needed(3)).tolist() == [0, 34, 33, 34]


def test_other_thresholds_leave_ap50_absent(one_object: Document) -> None:
    evaluation = judged(one_object, (3, [10.0, 10.0, 20.0, 40.0], 0.9), iou_thresholds=np.array([0.3, 0.75]))
    assert evaluation.AP[0] == pytest.approx(0.5)
    assert evaluation.AP50[0] == -1 and evaluation.AP75[0] == 0
    assert evaluation.summary()["AP50"] == -1


@pytest.mark.parametrize("thresholds", [[], [0.0], [1.5], np.linspace(0.1, 0.9, 17)])
def test_impossible_thresholds_are_refused(one_object: Document, thresholds: Any) -> None:
    with pytest.raises(SettingError, match="iou_thresholds must"):
        judged(one_object, iou_thresholds=np.array(thresholds))


def test_huge_boxes_vanish_without_a_warning(one_object: Document) -> None:
    evaluation = judged(one_object, (3, OBJECT, 0.8), (3, [0.0, 0.0, 1e200, 1e200], 0.9))
    assert evaluation.AP[0] == pytest.approx(1.0)  # as the reference: the area is infinite, the box is dropped


def test_an_empty_split_has_no_metrics() -> None:
    truth = GroundTruth.from_document({"images": [], "categories": [], "annotations": []})
    summary = evaluate(truth, Detections.from_document([])).summary()
    assert summary["AP"] == -1 and summary["n"] == 0


def test_bins_are_cut_below_their_edges() -> None:
    counts = np.array([0, 9, 10, 99, 100, 999, 1000, 10**6])
    assert bin_index(counts, (10, 100, 1000)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_bins_and_frequencies_average_their_own_categories(one_object: Document) -> None:
    one_object["annotations"].append(one_object["annotations"][0] | {"id": 2, "category_id": 9})
    summary = judged(one_object, (3, OBJECT, 0.8)).summary()  # category 3 found, 9 missed, 8 absent
    metrics = {key: round(value, 6) for key, value in summary.items()}
    assert (metrics["AP"], metrics["n"]) == (0.5, 2)
    assert [metrics[key] for key in ("AP1", "AP2", "AP3", "AP4", "bAP")] == [1, -1, -1, 0, 0.5]
    assert [metrics[key] for key in ("n1", "n2", "n3", "n4")] == [1, 0, 0, 1]
    assert [metrics[key] for key in ("APr", "APc", "APf", "nr", "nc", "nf")] == [1, -1, 0, 1, 0, 1]


def test_given_counts_replace_those_of_the_file(one_object: Document) -> None:
    summary = judged(one_object, (3, OBJECT, 0.8), instance_count=np.array([2000, 1, 1])).summary((10, 100))
    assert (summary["n1"], summary["n2"], summary["n3"]) == (0, 0, 1)
    assert "AP4" not in summary
    with pytest.raises(ShapeError, match=r"instance_count has shape \(2,\), expected \(3,\)"):
        judged(one_object, instance_count=np.array([1, 2]))


@pytest.mark.parametrize("bins", [(), (0, 10), (10, 10), (100, 10)])
def test_bins_must_ascend(one_object: Document, bins: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match="ascending positive counts"):
        judged(one_object).summary(bins)
