"""The shipped detector with its classes in order and in others, on right and wrong boxes; names, proposals, proof."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.doctor import Case, Examination, Report, examine
from calib.doctor.classes import match
from calib.doctor.reading import Split, read_split
from calib.doctor.sample import LEAST_IMAGES, choose
from calib.errors import FormatError
from calib.extract.adapter import ClassRule
from calib.extract.torchvision import TorchvisionAdapter
from calib.extract.weights import names_in

from .conftest import QUICK, found, look
from .test_data import boxes, centre, xyxy
from .test_pictures import scaled

Altered = Callable[..., Path]
Ordered = Callable[..., TorchvisionAdapter]
C = 192
PLAIN = np.arange(C)


@pytest.fixture
def run(shapes_set: Path, images: Path) -> Callable[..., Report]:
    """``run(detector, annotations=...)``: a look at 24 pictures of TRAIN."""

    def report(detector: TorchvisionAdapter, annotations: Path | None = None, **more: Any) -> Report:
        return look(annotations or shapes_set / "train.json", images=images, detector=detector, **more)

    return report


def codes(report: Report) -> set[str]:
    """Of errors."""
    return {f.code for f in report.of("error")}


def test_a_healthy_detector_has_no_error(ordered: Ordered, shapes_set: Path, images: Path) -> None:
    case = Case(
        shapes_set / "train.json", shapes_set / "val.json", images=images, detector=ordered(), val_images=images
    )
    report = examine(case, replace(QUICK, check_images=1))
    assert not report.has_errors and not report.of("warning")
    right = found(report, "classes-in-order").details
    assert 0.35 < right["right"] < 0.6 and right["objects"] > 200
    for split in ("train", "val"):
        details = report.detector[split]
        assert details["recall"] > 0.95 and details["recall_per_bin"][0] > 0.95 and details["images"] == 24
        assert details["boxes"] == "x, y, width, height"
        assert details["classifier"]["objects"][0] == details["covered"]
        assert 0.05 < details["classifier"]["background"][0] < 0.5
    assert found(report, "proof").details["images"] == 1 and report.detector["proof"]["detections"] > 100
    assert report.codes.count("proposals") == 2
    json.dumps(report.record())


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        (np.random.default_rng(0).permutation(C), "classes-permuted"),
        (np.roll(PLAIN, 1), "classes-shifted"),
        (np.roll(PLAIN, -1), "classes-shifted"),
    ],
)
def test_classes_in_another_order_are_told_with_the_mapping(
    run: Callable[..., Report], ordered: Ordered, rows: Any, code: str
) -> None:
    finding = found(run(ordered(rows)), code)
    details = finding.details
    assert finding.severity == "error" and details["right"] > 0.4 and details["right_as_taken"] < 0.02
    true = np.argsort(rows)  # the class of every category
    own = {m["category_id"] - 1: m["class"] for m in details["mapping"]}
    agree = np.mean([true[c] == k for c, k in own.items()])
    assert agree > (0.9 if code == "classes-shifted" else 0.4)
    assert all("of the detector behaves like '" in e for e in finding.examples)


@pytest.mark.parametrize("noise", [2.0, 8.0])
def test_a_weak_detector_is_not_called_permuted(run: Callable[..., Report], ordered: Ordered, noise: float) -> None:
    """From a third right to hardly more than by chance."""
    report = run(ordered(noise=noise))
    assert codes(report) <= ({"classes-at-chance"} if noise > 4 else set())


@pytest.mark.parametrize("pictures", [4, 12])
def test_few_pictures_raise_no_alarm(ordered: Ordered, shapes_set: Path, images: Path, pictures: int) -> None:
    how = Examination(sample=pictures, seconds=0, check_images=0)
    report = look(shapes_set / "train.json", how, images=images, detector=ordered(noise=1.0))
    assert not report.has_errors and ("classes-not-judged" in report.codes) == (pictures < 10)


def test_a_class_too_many_or_too_few_is_told_with_its_place(run: Callable[..., Report], ordered: Ordered) -> None:
    report = run(ordered([*PLAIN, -1]))
    assert found(report, "classes-too-many").details == {"classes": 193, "categories": 192, "difference": 1}
    assert (
        codes(report) == {"classes-too-many"}
        and "class 192 is no category" in found(report, "classes-in-order").message
    )
    report = run(ordered([*PLAIN[:60], -1, *PLAIN[60:]]))
    assert codes(report) == {"classes-too-many", "classes-shifted"}
    assert abs(found(report, "classes-shifted").details["from_class"] - 60) < 5
    report = run(ordered([-1, *PLAIN]))  # background counted among the classes, first
    assert codes(report) == {"classes-too-many", "classes-by-id"}
    report = run(ordered(PLAIN[:-1]))
    assert codes(report) == {"classes-too-few"} and "classes-in-order" in report.codes
    report = run(ordered(PLAIN[1:]))
    assert codes(report) == {"classes-too-few", "classes-shifted"}


def test_background_among_the_categories_is_named(
    run: Callable[..., Report], ordered: Ordered, altered: Altered
) -> None:
    path = altered(lambda d: d["categories"].insert(0, d["categories"][0] | {"id": 0, "name": "__background__"}))
    assert found(run(ordered(), path), "classes-too-few").details["background"] == "__background__"


def test_a_json_sorted_by_name_is_told(run: Callable[..., Report], ordered: Ordered, altered: Altered) -> None:
    names = [c["name"] for c in json.loads(altered().read_bytes())["categories"]]
    report = run(ordered(np.argsort(np.asarray(names))))
    assert codes(report) == {"classes-name-order"}


def test_classes_by_id_are_taken_and_told(run: Callable[..., Report], ordered: Ordered, altered: Altered) -> None:
    def gap(d: dict[str, Any]) -> None:
        for rows, key in ((d["categories"], "id"), (d["annotations"], "category_id")):
            for row in rows:
                row[key] += 3 * (row[key] > 60)
        for i in d["images"]:
            i["neg_category_ids"] = []

    detector = ordered([*PLAIN[:60], -1, -1, -1, *PLAIN[60:]])
    path = altered(gap)
    report = run(detector, path)
    assert found(report, "classes-too-many").remedy == "if so: --classes-by-id"
    assert found(report, "classes-by-id").remedy == "--classes-by-id"
    assert codes(run(detector, path, classes_by_id=True)) == set()
    beyond = run(ordered(), path, classes_by_id=True)
    assert "classes-refused" in codes(beyond)


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("boxes-xyxy", lambda b, i: xyxy(b)),
        ("boxes-centre", lambda b, i: centre(b)),
        ("boxes-yx", lambda b, i: [b[1], b[0], b[3], b[2]]),
        ("boxes-yxyx", lambda b, i: [b[1], b[0], b[1] + b[3], b[0] + b[2]]),
        ("boxes-scale", lambda b, i: [x / 2 for x in b]),
        ("boxes-scale", lambda b, i: [x / 3 for x in b]),
        ("boxes-scale", lambda b, i: [x * 2 for x in b]),
        ("boxes-normalised", lambda b, i: [x / 144 for x in centre(b)]),
    ],
)
def test_wrong_boxes_are_told_and_classes_judged_on_the_right_ones(
    run: Callable[..., Report], ordered: Ordered, altered: Altered, code: str, change: Callable[..., list[float]]
) -> None:
    report = run(ordered(), altered(boxes(change)))
    assert codes(report) == {code} and report.codes.count(code) == 1 and "boxes-in-a-corner" not in report.codes
    assert report.detector["train"]["recall"] > 0.9 and "classes-in-order" in report.codes


def test_a_val_of_other_labels_is_found(
    run: Callable[..., Report], ordered: Ordered, altered: Altered, shapes_set: Path
) -> None:
    def shift(document: dict[str, Any]) -> None:
        for annotation in document["annotations"]:
            annotation["category_id"] = annotation["category_id"] % C + 1

    report = run(ordered(), shapes_set / "train.json", val=altered(shift, "val"))
    assert codes(report) == {"val-labels-differ"} and report.detector["train"]["classifier"]["right"][0] > 0.3
    assert not codes(run(ordered(), shapes_set / "train.json", val=shapes_set / "val.json"))


def test_a_json_at_half_scale_hides_nothing_else(
    run: Callable[..., Report], ordered: Ordered, altered: Altered
) -> None:
    report = run(ordered(np.roll(PLAIN, 1)), altered(scaled(0.5)))
    assert codes(report) == {"json-scale", "classes-shifted"} and report.detector["train"]["recall"] > 0.9


def test_objects_without_proposals_are_beyond_any_head(run: Callable[..., Report], ordered: Ordered) -> None:
    detector = ordered()
    detector.model.rpn._post_nms_top_n["testing"] = 4
    report = run(detector)
    rare = found(report, "proposals-miss-rare")
    assert rare.severity == "warning" and rare.details["recall_per_bin"][0] < 0.5 and "head" in rare.message
    detector.model.rpn._post_nms_top_n["testing"] = 1
    assert found(run(detector), "proposals-miss").severity == "error"


def test_names_confirm_or_contradict(run: Callable[..., Report], ordered: Ordered, shapes_set: Path) -> None:
    names = tuple(c["name"] for c in json.loads((shapes_set / "train.json").read_bytes())["categories"])
    detector = ordered()
    train, _ = read_split("train", shapes_set / "train.json", None)
    assert isinstance(train, Split)

    def told(*own: str, rule: str = "id") -> tuple[list[tuple[str, str]], Any]:
        detector.classes = ClassRule(rule, own) if rule == "names" else ClassRule(hints=own)
        classes, findings = match(train, detector, classes_by_id=False)
        return [(f.code, f.severity) for f in findings], classes

    spelled = [n.upper().replace(" ", "_") for n in names]
    assert (
        told(*spelled)[0]
        == told("__background__", *names)[0]
        == told(*names, "background")[0]
        == [("classes-named", "note")]
    )
    assert told(*names[::-1])[0] == [("classes-names-order", "warning")]
    assert told(*(f"thing {k}" for k in range(C)))[0] == [("classes-names-differ", "warning")]
    assert told()[0] == []
    codes_by_name, classes = told(*names[::-1], rule="names")  # transformers: names decide
    assert codes_by_name == [("classes-named", "note")] and classes.plain.tolist() == PLAIN[::-1].tolist()
    detector = ordered(PLAIN[::-1].copy())
    detector.classes = ClassRule(hints=names[::-1])
    assert codes(run(detector)) == {"classes-names-order"}  # and pictures agree with the names
    refused = ordered()
    refused.classes = ClassRule("json", names[1:] + names[:1], has_all=True, hint="another order")
    report = run(refused)
    assert found(report, "classes-refused").remedy == "another order" and "classes-in-order" in report.codes


def test_names_are_found_in_checkpoints() -> None:
    for document in (
        {"model": {}, "classes": ["a", "b"]},
        {"meta": {"dataset_meta": {"CLASSES": ("a", "b")}}},
        {"hyper_parameters": {"id2label": {"1": "b", "0": "a"}}},
        {"names": {"a": 0, "b": 1}},
    ):
        assert names_in(document) == ("a", "b")
    for document in ({"names": [1, 2]}, {"classes": 80}, {"classes": ["a"]}, {"names": {"a": "x"}}, {}, None):
        assert names_in(document) == ()


def test_names_of_weights_are_kept_for_the_doctor(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    from calib.data.detector import shapes_detector
    from calib.extract.torchvision import open_detector

    model = shapes_detector(3)
    torch.save({"model": model.state_dict(), "class_names": ["background", "a", "b"]}, tmp_path / "w.pth")
    spec = "calib.data.detector:shapes_detector"
    adapter = open_detector(spec, torch.device("cpu"), weights=tmp_path / "w.pth", arguments='{"num_classes": 3}')
    assert adapter.classes == ClassRule(hints=("background", "a", "b"))


def test_detectron2s_names_come_from_its_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    from calib.extract.detectron2_open import _thing_classes

    known: dict[str, Any] = {"bare": SimpleNamespace(), "mine": SimpleNamespace(thing_classes=["a", "b"])}
    catalog = SimpleNamespace(list=lambda: list(known), get=known.__getitem__)
    monkeypatch.setitem(sys.modules, "detectron2.data", SimpleNamespace(MetadataCatalog=catalog))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "detectron2", SimpleNamespace())  # type: ignore[arg-type]
    assert _thing_classes(("unknown", "bare", "mine")) == _thing_classes("mine") == ("a", "b")
    assert _thing_classes(()) == _thing_classes(None) == _thing_classes("bare") == ()


def test_a_detector_that_makes_scores_otherwise_fails_the_proof(
    ordered: Ordered, shapes_set: Path, images: Path
) -> None:
    detector = ordered()
    own = detector.model.roi_heads.postprocess_detections

    def tempered(logits: Any, *more: Any) -> Any:
        return own(logits / 2, *more)

    detector.model.roi_heads.postprocess_detections = tempered
    report = look(shapes_set / "train.json", replace(QUICK, sample=8, check_images=1), images=images, detector=detector)
    failed = found(report, "proof-failed")
    assert failed.severity == "error" and "--check-images 0" in failed.remedy


def test_numbers_that_are_not_finite_are_told(run: Callable[..., Report], ordered: Ordered) -> None:
    detector = ordered()
    with torch.no_grad():
        detector.model.roi_heads.box_predictor.cls_score.bias[3] = float("nan")
    report = run(detector)
    assert "detector-not-finite" in codes(report) and "classes-not-judged" in report.codes


def test_pictures_that_only_the_detector_reads_are_told(
    ordered: Ordered, altered: Altered, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calib.doctor import sample

    real = sample.read_image

    def some(record: dict[str, Any], folder: Path) -> Any:
        if record["id"] % 2:
            raise FormatError(f"image {record['id']} cannot be read")
        return real(record, folder)

    monkeypatch.setattr(sample, "read_image", some)
    report = look(altered(), images=images, detector=ordered())
    assert codes(report) == {"pictures-unreadable"} and report.detector["train"]["images"] < 24


def test_without_pictures_the_detector_is_not_run(ordered: Ordered, altered: Altered) -> None:
    report = look(altered(), detector=ordered([*PLAIN, -1]))
    assert codes(report) == {"classes-too-many"} and found(report, "detector-not-run").severity == "note"
    assert set(report.detector) == {"source", "classes", "names", "digest"}


def test_time_bounds_the_look(ordered: Ordered, shapes_set: Path, images: Path) -> None:
    how = Examination(sample=60, seconds=1e-6, check_images=0)
    report = look(shapes_set / "train.json", how, images=images, detector=ordered())
    assert LEAST_IMAGES <= report.detector["train"]["images"] < 20


def test_the_pictures_chosen_show_many_categories_and_the_best_come_first(shapes_set: Path) -> None:
    split, _ = read_split("train", shapes_set / "train.json", None)
    assert split is not None
    read = split.read

    def shown(images: Sequence[int]) -> int:
        return len(np.unique(read.category[np.isin(read.image, list(images))]))

    chosen = choose(read, range(72), 30)
    assert chosen[:10] == choose(read, range(72), 10) and len(set(chosen)) == 30
    assert shown(chosen) > shown(range(30)) and shown(chosen) > 150
    assert set(choose(read, [3, 4], 30)) == {3, 4} and choose(read, [], 5) == []
