"""Arrays of any detector to a cache: what calib itself extracted, written as arrays and imported, is the same again;
rows that cannot be right are refused by name."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calib.cache import Cache, Classifier
from calib.cache.schema import META_SCHEMA, PROPOSAL_BOX, REFINED_BOX
from calib.errors import CalibError, FormatError, InputError, NonFiniteError, SettingError, ShapeError
from calib.extract.dataset import Dataset
from calib.extract.raw import RawImage, RawSettings, write_cache
from calib.extract.raw_files import read_classifier, read_rows, row_files
from calib.heads.detector import detector_head
from calib.score import detector_nms, score

C, D = 3, 6
Fails = Callable[..., str]
Calib = Callable[..., Any]
Content = Callable[[Path], dict[str, bytes]]


def arrays_of(cache: Cache) -> dict[str, Any]:
    """Every row of a cache as the documented arrays."""
    meta = dict(zip(META_SCHEMA.names, cache.meta(*META_SCHEMA.names), strict=True))
    assert cache.logits is not None
    images = np.repeat(np.arange(len(cache.images)), np.diff(cache.image_start))
    return {
        "image_id": meta["image_id"],
        "boxes": np.stack([meta[n] for n in PROPOSAL_BOX], 1),
        "refined": np.stack([meta[n] for n in REFINED_BOX], 1),
        "features": cache.features.read(0, cache.n_rows),
        "logits": cache.logits.read(0, cache.n_rows),
        "objectness": meta["objectness"],
        "net_height": cache.images["net_height"].to_numpy()[images],
        "net_width": cache.images["net_width"].to_numpy()[images],
    }


def table_of(arrays: dict[str, Any]) -> pa.Table:
    lists = {
        k: pa.FixedSizeListArray.from_arrays(pa.array(v.reshape(-1)), v.shape[1]) if v.ndim == 2 else pa.array(v)
        for k, v in arrays.items()
    }
    return pa.table(lists)


def write_rows(folder: Path, kind: str, arrays: dict[str, Any]) -> Path:
    if kind == "npz":
        np.savez(folder / "rows.npz", **arrays)
    elif kind == "parquet":
        pq.write_table(table_of(arrays), folder / "rows.parquet", row_group_size=700)
    elif kind == "arrow":
        with pa.OSFile(str(folder / "rows.arrow"), "wb") as f, pa.ipc.new_file(f, table_of(arrays).schema) as writer:
            writer.write_table(table_of(arrays), max_chunksize=333)
    else:
        with pa.OSFile(str(folder / "rows.arrows"), "wb") as f, pa.ipc.new_stream(f, table_of(arrays).schema) as writer:
            writer.write_table(table_of(arrays), max_chunksize=333)
    return folder / f"rows.{kind}"


@pytest.mark.parametrize("kind", ["npz", "parquet", "arrow", "arrows"])
def test_what_calib_extracted_comes_back_as_it_was(
    kind: str, exact_val_cache: Cache, shapes_set: Path, calib: Calib, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path, kind, arrays_of(exact_val_cache))
    exact_val_cache.classifier.write(tmp_path / "head.safetensors")
    d = exact_val_cache.manifest.detector
    settings = [f"score_threshold={d.score_threshold}", f"nms_iou={d.nms_iou}", f"max_detections={d.max_detections}"]
    settings += [f"box_weights={','.join(map(str, d.box_weights))}", "dtype=float32", "images_per_shard=7"]
    outcome = calib(
        *("import", "--rows", rows, "--classifier", tmp_path / "head.safetensors", "--out", tmp_path / "c", "--json"),
        *("--annotations", shapes_set / "val.json", "--counts-from", shapes_set / "train.json"),
        *(part for s in settings for part in ("--set", s)),
    )
    assert outcome.exit_code == 0, outcome.stderr
    cache = Cache(tmp_path / "c")
    metrics = json.loads(outcome.stdout)
    assert metrics["rows"] == cache.n_rows == exact_val_cache.n_rows and metrics["images_without_rows"] == 0
    names = [n for n in META_SCHEMA.names if n != "roi_id"]  # and that too, below
    for name, ours, theirs in zip(names, cache.meta(*names), exact_val_cache.meta(*names), strict=True):
        assert np.array_equal(ours, theirs), name
    assert np.array_equal(cache.meta("roi_id")[0], exact_val_cache.meta("roi_id")[0])
    assert np.array_equal(cache.features.read(0, cache.n_rows), exact_val_cache.features.read(0, cache.n_rows))
    assert len(cache.manifest.shards) == -(-len(cache.images) // 7)
    assert cache.annotations().equals(exact_val_cache.annotations())
    pairs = zip(
        score(cache, detector_head(cache), detector_nms(cache)),
        score(exact_val_cache, detector_head(exact_val_cache), detector_nms(exact_val_cache)),
        strict=True,
    )
    found = 0
    for ours, theirs in pairs:
        found += len(ours.detections.score)
        assert np.array_equal(ours.detections.category, theirs.detections.category)
        assert np.allclose(ours.detections.score, theirs.detections.score, atol=1e-6)
        assert np.array_equal(ours.detections.box, theirs.detections.box)
    assert found > 500


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Three images of 100 x 80; objects of classes 0, 2 in the first, 1 in the second, none in the third."""
    boxes = [(1, 10, [10, 10, 20, 20]), (1, 30, [50, 50, 30, 20]), (2, 20, [0, 0, 40, 40])]
    document = {
        "images": [{"id": i, "height": 80, "width": 100, "file_name": f"{i}.jpg"} for i in (1, 2, 3)],
        "annotations": [
            {"id": k + 1, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3]}
            for k, (i, c, b) in enumerate(boxes)
        ],
        "categories": [{"id": 10 * (k + 1), "name": f"kind {k}"} for k in range(C)],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    return Dataset.read(tmp_path / "a.json")


@pytest.fixture
def classifier() -> Classifier:
    rng = np.random.default_rng(0)
    return Classifier(rng.normal(size=(C + 1, D)).astype(np.float32), rng.normal(size=C + 1).astype(np.float32))


def image(image_id: int = 1, **changes: Any) -> RawImage:
    """Two proposals on the objects of image 1, two on background."""
    boxes = np.asarray([[11, 10, 30, 30], [50, 50, 80, 70], [70, 0, 90, 9], [0, 40, 20, 60]], np.float32)
    features = np.random.default_rng(image_id).normal(size=(4, D)).astype(np.float32)
    return replace(RawImage(image_id, boxes, features), **changes)


def test_only_boxes_and_features_are_needed(dataset: Dataset, classifier: Classifier, tmp_path: Path) -> None:
    given = [image(2), image(1)]
    written = write_cache(iter(given), classifier, dataset, tmp_path / "c", RawSettings(dtype="float32"))
    cache = Cache(tmp_path / "c")
    assert written.without_rows == 1 and cache.images["n_rows"].to_pylist() == [4, 4, 0]
    assert cache.images["image_id"].to_pylist() == [2, 1, 3]
    label, max_iou, gt_id, objectness = cache.meta("label", "max_iou", "gt_id", "objectness")
    # Image 2: nothing fits the object at 0, 0, 40, 40 (IoU with the first box 19 * 20 / 1600 = 0.2375).
    assert label.tolist() == [3, 3, 3, 3, 0, 2, 3, 3] and max_iou[0] == pytest.approx(0.2375)
    assert max_iou[4:].tolist() == pytest.approx([0.95, 1, 0, 0]) and gt_id[4:].tolist() == [1, 2, -1, -1]
    assert set(objectness.tolist()) == {1.0}
    assert np.array_equal(np.stack(cache.meta(*REFINED_BOX), 1)[4:], given[1].boxes)
    z = classifier.logits(given[1].features)
    found = list(score(cache, detector_head(cache), replace(detector_nms(cache), nms_iou=1.0)))[1].detections
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert np.allclose(found.score, np.sort(p[:, :3].reshape(-1))[::-1], atol=1e-6)


def test_background_first_is_turned_and_the_same_boxes_are_decoded(
    dataset: Dataset, classifier: Classifier, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    box, box_bias = rng.normal(size=(4 * (C + 1), D)).astype(np.float32), np.zeros(4 * (C + 1), np.float32)
    last = replace(classifier, box_weight=box, box_bias=box_bias)
    assert classifier.bias is not None
    first = Classifier(
        np.roll(classifier.weight, 1, 0), np.roll(classifier.bias, 1), None, np.roll(box, 4, 0), box_bias
    )
    logits = classifier.logits(image().features)
    write_cache([image(logits=logits)], last, dataset, tmp_path / "last", RawSettings())
    turned = RawSettings(background_first=True)
    write_cache([image(logits=np.roll(logits, 1, 1))], first, dataset, tmp_path / "first", turned)
    a, b = Cache(tmp_path / "last"), Cache(tmp_path / "first")
    assert a.manifest.detector.digest == b.manifest.detector.digest and not a.manifest.detector.class_agnostic
    assert a.digest == b.digest
    assert a.classifier.box_weight is not None and len(a.classifier.box_weight) == 4 * C
    assert np.isnan(a.meta(REFINED_BOX[0])[0]).all()


def test_class_agnostic_deltas_are_decoded_and_clipped(
    dataset: Dataset, classifier: Classifier, tmp_path: Path
) -> None:
    # dx = 10 / 10: boxes move right by their own width.
    own = replace(classifier, box_weight=np.zeros((4, D), np.float32), box_bias=np.asarray([10, 0, 0, 0], np.float32))
    write_cache([image()], own, dataset, tmp_path / "c", RawSettings())
    refined = np.stack(Cache(tmp_path / "c").meta(*REFINED_BOX), 1)
    expected = [[30, 10, 49, 30], [80, 50, 100, 70], [90, 0, 100, 9], [20, 40, 40, 60]]
    assert np.allclose(refined, expected)


def test_boxes_of_another_size_are_matched_there_and_come_back_in_the_original(
    dataset: Dataset, classifier: Classifier, tmp_path: Path
) -> None:
    write_cache(
        [image(boxes=2 * image().boxes, net_size=(160, 200))], classifier, dataset, tmp_path / "c", RawSettings()
    )
    cache = Cache(tmp_path / "c")
    assert cache.labels.tolist() == [0, 2, 3, 3]
    found = next(score(cache, detector_head(cache), detector_nms(cache))).detections
    assert {tuple(b) for b in found.box.tolist()} <= {tuple(b) for b in image().boxes.tolist()}


def test_training_rows_are_drawn_and_ordered_as_extraction_does(
    dataset: Dataset, classifier: Classifier, tmp_path: Path
) -> None:
    label = np.asarray([2, 3, -1, 0])
    whole = RawSettings("train", dtype="float32")
    given = image(label=label, is_gt=np.asarray([False, False, False, True]))
    write_cache([given], classifier, dataset, tmp_path / "all", whole)
    cache = Cache(tmp_path / "all")
    assert cache.labels.tolist() == [0, 2, 3]  # ignored rows are left out, foreground by class, background last
    assert cache.meta("roi_id")[0].tolist() == [3, 0, 1] and cache.meta("is_gt")[0].tolist() == [True, False, False]
    assert np.array_equal(cache.features.read(0, 3), given.features[[3, 0, 1]])
    some = replace(whole, rows_per_image=2, foreground_share=0.5)
    write_cache([given], classifier, dataset, tmp_path / "some", some)
    drawn = Cache(tmp_path / "some").labels.tolist()
    assert len(drawn) == 2 and drawn[0] in (0, 2) and drawn[1] == 3


def test_a_sigmoid_detector_has_no_background_column(
    dataset: Dataset, classifier: Classifier, tmp_path: Path, fails: Fails
) -> None:
    assert classifier.bias is not None
    own = Classifier(classifier.weight[:C], classifier.bias[:C])
    settings = RawSettings("train", activation="sigmoid", nms_iou=1.0)
    write_cache([image()], own, dataset, tmp_path / "c", settings)
    assert Cache(tmp_path / "c").manifest.detector.outputs == C
    said = fails("train", "simcal", "--cache", tmp_path / "c", "--out", tmp_path / "m" / "1")
    assert "simcal is defined for softmax detectors" in said and "gives sigmoid scores" in said


WRONG: dict[str, tuple[dict[str, Any], type[CalibError], str]] = {
    "unknown image": ({"image_id": 7}, InputError, "image 7 is not in"),
    "features": (
        {"features": np.zeros((4, 5))},
        ShapeError,
        r"image 1: features has shape \[4, 5\], expected \[N, 6\]",
    ),
    "rows": ({"boxes": np.zeros((3, 4))}, ShapeError, r"boxes has shape \[3, 4\], expected \[4, 4\]"),
    "nan": ({"features": np.full((4, D), np.nan)}, NonFiniteError, "image 1: features of row 0 holds NaN"),
    "text": ({"objectness": np.asarray(["a"] * 4)}, FormatError, "objectness holds <U1"),
    "sigmoid": ({"objectness": np.asarray([0, 1, 2, 3])}, InputError, r"objectness must lie in \[0, 1\]"),
    "xywh": ({"boxes": np.asarray([[50, 50, 20, 20]] * 4)}, FormatError, "boxes of row 0 are"),
    "shares": ({"boxes": np.asarray([[0, 0, 0.5, 1]] * 4)}, FormatError, "image 1 of 80 x 100 pixels: all boxes end"),
    "label": ({"label": np.asarray([0, 1, 4, 3])}, InputError, "label 4.0 of row 2 is no class index"),
    "logits": ({"logits": np.ones((4, C + 1))}, InputError, "logits are not what the classifier makes of the features"),
    "columns": ({"logits": np.ones((4, C))}, ShapeError, r"logits has shape \[4, 3\], expected \[4, 4\]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_rows_that_cannot_be_right_are_refused(
    what: str, dataset: Dataset, classifier: Classifier, tmp_path: Path
) -> None:
    changes, error, message = WRONG[what]
    with pytest.raises(error, match=message):
        write_cache([image(**changes)], classifier, dataset, tmp_path / "c", RawSettings())


def test_images_that_come_twice_or_not_at_all(dataset: Dataset, classifier: Classifier, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rows of image 1 come in two places"):
        write_cache([image(1), image(2), image(1)], classifier, dataset, tmp_path / "c", RawSettings())
    with pytest.raises(InputError, match="not one row"):
        write_cache([], classifier, dataset, tmp_path / "d", RawSettings())


def test_a_classifier_that_does_not_fit_is_refused(dataset: Dataset, classifier: Classifier, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="the classifier has 4 rows: 3 categories and no background row"):
        write_cache([image()], classifier, dataset, tmp_path / "c", RawSettings(activation="sigmoid"))
    box = replace(classifier, box_weight=np.zeros((7, D), np.float32), box_bias=np.zeros(7, np.float32))
    with pytest.raises(ShapeError, match=r"box_weight has shape \[7, 6\].*K one of 4, 12, 16"):
        write_cache([image()], box, dataset, tmp_path / "c", RawSettings())
    with pytest.raises(NonFiniteError, match="weight of the classifier"):
        broken = replace(classifier, weight=np.full((C + 1, D), np.inf, np.float32))
        write_cache([image()], broken, dataset, tmp_path / "c", RawSettings())
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "settings",
    [{"nms_iou": 2}, {"box_weights": (1.0,)}, {"activation": "sigmoid", "background_first": True}, {"mode": "x"}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError):
        RawSettings(**settings)


def test_files_that_are_no_rows_are_named(tmp_path: Path) -> None:
    good = {"image_id": np.asarray([1]), "boxes": np.zeros((1, 4)), "features": np.zeros((1, D))}
    cases: list[tuple[dict[str, Any], type[CalibError], str]] = [
        ({"image_id": np.asarray([1])}, FormatError, "has no boxes, features"),
        ({**good, "objectnes": np.zeros(1)}, FormatError, "has objectnes, which is no column"),
        ({**good, "label": np.zeros(2)}, ShapeError, "differ in their number of rows"),
        ({**good, "net_width": np.ones(1)}, FormatError, "one of net_height and net_width"),
        ({**good, "image_id": np.asarray([1.5])}, FormatError, "image_id of row 0 is 1.5"),
        ({**good, "features": np.asarray([object()])}, FormatError, "no .npz of plain arrays"),
    ]
    for arrays, error, message in cases:
        np.savez(tmp_path / "r.npz", **arrays)
        with pytest.raises(error, match=message):
            list(read_rows([tmp_path / "r.npz"]))
    ragged = pa.table({"image_id": [1, 1], "boxes": [[0.0] * 4] * 2, "features": [[0.0], [0.0, 1.0]]})
    pq.write_table(ragged, tmp_path / "r.parquet")
    with pytest.raises(ShapeError, match="lists of column features have 1 to 2 numbers"):
        list(read_rows([tmp_path / "r.parquet"]))
    (tmp_path / "r.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(FormatError, match=r"r\.parquet cannot be read"):
        list(read_rows([tmp_path / "r.parquet"]))
    with pytest.raises(InputError, match="no file of rows in"):
        (tmp_path / "empty").mkdir()
        row_files([tmp_path / "empty"])
    np.savez(tmp_path / "head.npz", weights=np.zeros((2, 2)))
    with pytest.raises(FormatError, match="has weights"):
        read_classifier(tmp_path / "head.npz")


def test_rows_of_an_image_are_gathered_from_a_npz_in_any_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5, 40)
    np.savez(tmp_path / "r.npz", image_id=ids, boxes=np.zeros((40, 4)), features=np.arange(40.0)[:, None])
    for found in read_rows([tmp_path / "r.npz"]):
        assert found.features[:, 0].tolist() == np.flatnonzero(ids == found.image_id).tolist()


def test_interrupted_and_resumed_it_is_the_same_cache(
    dataset: Dataset,
    classifier: Classifier,
    start: Callable[..., subprocess.Popen[str]],
    content: Content,
    tmp_path: Path,
) -> None:
    given = [image(i) for i in (1, 2, 3)]
    arrays = {k: np.concatenate([getattr(i, k) for i in given]) for k in ("boxes", "features")}
    np.savez(tmp_path / "r.npz", image_id=np.repeat([1, 2, 3], 4), **arrays)
    assert classifier.bias is not None
    np.savez(tmp_path / "head.npz", weight=classifier.weight, bias=classifier.bias)
    command = ["import", "--rows", tmp_path / "r.npz", "--classifier", tmp_path / "head.npz", "--set"]
    command += ["images_per_shard=1", "--annotations", dataset.annotations_file, "--out"]
    whole = start(*command, tmp_path / "whole")
    assert "images" in whole.communicate(timeout=60)[0] and whole.returncode == 0
    # Ctrl-C while the second shard is written.
    trap = (
        "import os, signal\nfrom calib.cache import write\nown = write.write_images\n"
        "def stop(folder, *rest):\n"
        "    images = own(folder, *rest)\n"
        "    if folder.name.startswith('.00001.'): os.kill(os.getpid(), signal.SIGINT)\n"
        "    return images\n"
        "write.write_images = stop"
    )
    process = start(*command, tmp_path / "c", before=trap)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "with --resume" in said, said
    assert [s.name for s in Cache.sound_part(tmp_path / "c").manifest.shards] == ["00000"]
    again = start(*command, tmp_path / "c", "--resume")
    assert "images_without_rows" in again.communicate(timeout=60)[0] and again.returncode == 0
    without = {".verified.json", ".lock"}
    ours, theirs = content(tmp_path / "c"), content(tmp_path / "whole")
    assert {k: v for k, v in ours.items() if k not in without} == {k: v for k, v in theirs.items() if k not in without}


def test_other_rows_do_not_go_on_with_a_begun_cache(
    dataset: Dataset, classifier: Classifier, fails: Fails, calib: Calib, tmp_path: Path
) -> None:
    np.savez(tmp_path / "head.npz", weight=classifier.weight)
    command = ["import", "--rows", tmp_path / "r.npz", "--classifier", tmp_path / "head.npz"]
    command += ["--annotations", dataset.annotations_file, "--out", tmp_path / "c"]
    np.savez(tmp_path / "r.npz", image_id=np.ones(4, int), boxes=image().boxes, features=image().features)
    assert calib(*command).exit_code == 0
    np.savez(tmp_path / "r.npz", image_id=np.ones(4, int), boxes=image().boxes, features=image().features + 1)
    assert "begun with other settings (rows)" in fails(*command, "--resume")
    assert "holds a cache already" in fails(*command)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    for name in ("rows.txt", "text.npz"):
        (tmp_path / name).write_text("no rows")
    with pytest.raises(FormatError, match=r"no file of rows: .*rows\.txt"):
        row_files([tmp_path / "rows.txt"])
    with pytest.raises(FormatError, match=r"text\.npz is no \.npz, but a file of another kind"):
        read_classifier(tmp_path / "text.npz")
    for scale in (np.zeros(1), np.ones(2), np.full(1, np.nan)):
        np.savez(tmp_path / "scale.npz", weight=np.ones((3, 2)), scale=scale)
        with pytest.raises(InputError, match=r"scale is .*: expected one number above 0"):
            read_classifier(tmp_path / "scale.npz")
    whole = (tmp_path / "scale.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=r"cut\.npz is damaged: its end is missing"):
        read_classifier(tmp_path / "cut.npz")
    with pytest.raises(FormatError, match=r"no classifier: .*rows\.txt"):
        read_classifier(tmp_path / "rows.txt")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FormatError, match=r"folder\.safetensors is a folder"):
        read_classifier(tmp_path / "folder.safetensors")


def test_stages_that_do_not_fit_are_refused(dataset: Dataset, classifier: Classifier, tmp_path: Path) -> None:
    cascade = replace(classifier, next=(classifier,))
    two = replace(image(), next=(image(),))
    cases: list[tuple[Any, Any, dict[str, Any], type[CalibError], str]] = [
        (two, classifier, {}, ShapeError, "the stages of the classifier"),
        (image(), cascade, {}, ShapeError, "expected as many in each of 2"),
        (
            replace(two, next=(replace(two, boxes=two.boxes[:1], features=two.features[:1]),)),
            cascade,
            {},
            ShapeError,
            "rows in its stages",
        ),
        (two, cascade, {"next_ious": (0.5, 0.6)}, SettingError, "has 2 stages"),
    ]
    for rows, own, settings, error, message in cases:
        with pytest.raises(error, match=message):
            write_cache([rows], own, dataset, tmp_path / "c", RawSettings(**settings))
    columns = {
        "image_id": np.ones(2, int),
        "boxes": np.ones((2, 4)),
        "features": np.ones((2, D)),
        "stage": np.array([0, 1.5]),
    }
    np.savez(tmp_path / "rows.npz", **columns)
    with pytest.raises(InputError, match=r"stages \[0.0, 1.5\]"):
        list(read_rows([tmp_path / "rows.npz"]))
