"""The adapter for transformers: queries as RoIs, the detector's own numbers, and the model left as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.artifact import Artifact, HeadInfo, load, save
from calib.cache import Cache
from calib.errors import (
    CalibError,
    ExistsError,
    FormatError,
    InputError,
    MissingFileError,
    ReplayError,
    UnknownNameError,
    UnsupportedError,
)
from calib.export.export import Export, export
from calib.extract.adapter import ClassRule
from calib.extract.classes import in_class_order
from calib.extract.dataset import Dataset
from calib.extract.extraction import extract
from calib.extract.label import Labels, one_to_one
from calib.extract.options import Extraction
from calib.extract.transformers import REFUSED, TransformersAdapter
from calib.extract.transformers_open import open_detector
from calib.heads.detector import detector_head
from calib.heads.linear import LinearClassifier, LinearHead
from calib.heads.sigmoid import SigmoidHead
from calib.score import detector_nms, score
from tests.extract.conftest import picture
from tests.extract.decoders import ALL, CLASSES, EVERY_QUERY, QUERIES, SOFTMAX, build

pytest.importorskip("transformers")

CPU = torch.device("cpu")
SIZES = [(40, 60), (40, 60), (41, 57), (3, 9), (90, 31), (64, 64)]
Document = Callable[..., dict[str, Any]]
Read = Callable[[dict[str, Any]], Dataset]


def open_family(family: str, **more: Any) -> TransformersAdapter:
    torch.set_num_threads(1)
    return TransformersAdapter(*build(family), family, CPU, **more)


def own_output(adapter: TransformersAdapter, pixels: list[Any]) -> Any:
    inputs = adapter.processor(images=pixels, return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        return adapter.model(**inputs)


def own_detections(adapter: TransformersAdapter, pixels: list[Any]) -> list[dict[str, torch.Tensor]]:
    sizes = [p.shape[:2] for p in pixels]
    found: list[dict[str, torch.Tensor]] = adapter.processor.post_process_object_detection(
        own_output(adapter, pixels), threshold=0.0, target_sizes=sizes
    )
    return found


def hooks_of_ours(model: torch.nn.Module) -> list[Any]:
    """Some models have hooks of the library."""
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [h for h in hooks if h.__module__.startswith("calib")]


@pytest.mark.parametrize("family", ALL)
def test_replaying_the_cache_gives_the_detectors_own_detections(
    family: str, document: Document, read: Read, draw: Callable[..., Any], tmp_path: Path
) -> None:
    adapter = open_family(family)
    extract(
        adapter,
        read(document(SIZES)),
        tmp_path / "images",
        tmp_path / "c",
        Extraction(dtype="float32", images_per_shard=4),
    )
    cache = Cache(tmp_path / "c")
    assert cache.n_rows == QUERIES * len(SIZES) and cache.logits is not None
    # The cached features through the cached classifier are the model's logits.
    features = cache.features.read(0, cache.n_rows)
    logits = cache.logits.read(0, cache.n_rows)
    assert np.allclose(cache.classifier.logits(features), logits, atol=1e-4) and logits.std() > 0.1
    found = list(score(cache, detector_head(cache), detector_nms(cache)))
    pixels = [draw(h, w, i) for i, (h, w) in enumerate(SIZES)]
    own = [d for b in ([0, 1], [2], [3], [4], [5]) for d in own_detections(adapter, [pixels[i] for i in b])]
    for i, (ours, theirs) in enumerate(zip(found, own, strict=True)):
        d = ours.detections
        limited = family in (*SOFTMAX, *EVERY_QUERY)
        assert len(d.score) == len(theirs["scores"]) == (QUERIES if limited else QUERIES * CLASSES)
        if family in SOFTMAX:  # it gives every query its best class; ours may take two classes of one query
            z = torch.from_numpy(logits[i * QUERIES : (i + 1) * QUERIES]).softmax(1)[:, :-1]
            value, label = z.max(1)
            assert torch.equal(value, theirs["scores"]) and torch.equal(label, theirs["labels"])
            first = np.asarray([np.flatnonzero(d.row == q)[0] for q in np.unique(d.row)])
            assert np.array_equal(d.category[first], label.numpy()[np.unique(d.row)])
            assert np.array_equal(d.box, theirs["boxes"].numpy()[d.row])
            continue
        order = np.argsort(-theirs["scores"].numpy(), kind="stable")
        assert np.allclose(d.score, theirs["scores"].numpy()[order], rtol=0, atol=1e-7)
        assert sorted(zip(d.category.tolist(), d.box.tolist(), strict=True)) == sorted(
            zip(theirs["labels"].tolist(), theirs["boxes"].tolist(), strict=True)
        )


@pytest.mark.parametrize("family", ALL)
def test_the_detector_is_described_and_left_as_it_was(family: str, draw: Callable[..., Any]) -> None:
    adapter = open_family(family)
    pixels = [draw(40, 60), draw(40, 60, 1)]
    before = own_output(adapter, pixels)
    d = adapter.detector
    softmax = family in SOFTMAX
    assert (d.num_classes, d.outputs, d.nms_iou, d.background_first) == (CLASSES, CLASSES + softmax, 1.0, False)
    assert d.activation == ("softmax" if softmax else "sigmoid")
    a, b = adapter.rois(pixels)
    assert np.array_equal(np.stack([a.logits, b.logits]), before.logits.numpy())
    assert a.objectness.min() >= 0 and a.objectness.max() <= 1
    again = own_output(adapter, pixels)
    assert torch.equal(again.logits, before.logits) and torch.equal(again.pred_boxes, before.pred_boxes)
    assert not hooks_of_ours(adapter.model)


def test_hooks_are_gone_after_an_exception(draw: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = open_family("detr")

    def fail(**_: object) -> Any:
        raise InterruptedError("in the midst")

    monkeypatch.setattr(adapter.model, "forward", fail)
    with pytest.raises(InterruptedError):
        adapter.rois([draw(40, 60)])
    assert not hooks_of_ours(adapter.model)


def test_an_object_is_given_to_the_query_that_believes_in_it_most() -> None:
    # Four queries: three on object 0 (class 1), one on object 1 (class 0); background is 2.
    labels = Labels(np.asarray([1, 1, 1, 0], np.int32), np.full(4, 0.8, np.float32), np.asarray([0, 0, 0, 1]))
    logits = np.asarray([[9, 1, 0], [0, 3, 0], [0, 3, 0], [-5, 0, 0]], np.float32)
    assert one_to_one(labels, logits, 2).label.tolist() == [2, 1, 2, 0]
    nothing = Labels(np.full(4, 2, np.int32), np.zeros(4, np.float32), np.full(4, -1))
    assert one_to_one(nothing, logits, 2).label.tolist() == [2, 2, 2, 2]


def test_training_rows_are_the_queries_each_object_once(document: Document, read: Read, tmp_path: Path) -> None:
    adapter = open_family("rt-detr")
    empty = read(document(SIZES[:2]))
    extract(adapter, empty, tmp_path / "images", tmp_path / "test", Extraction(dtype="float32"))
    # Objects where queries are: the 3rd and the 7th of the first picture.
    boxes = np.stack(Cache(tmp_path / "test").meta("refined_x1", "refined_y1", "refined_x2", "refined_y2"), 1)
    objects = [
        (1, 20, *boxes[3, :2], *(boxes[3, 2:] - boxes[3, :2])),
        (1, 40, *boxes[7, :2], *(boxes[7, 2:] - boxes[7, :2])),
    ]
    dataset = read(document(SIZES[:2], [tuple(map(float, o)) for o in objects]))
    extract(adapter, dataset, tmp_path / "images", tmp_path / "c", Extraction("train", dtype="float32"))
    cache = Cache(tmp_path / "c")
    label, is_gt, gt_id, roi_id = cache.meta("label", "is_gt", "gt_id", "roi_id")
    assert cache.n_rows == 2 * QUERIES and not is_gt.any() and sorted(roi_id[:QUERIES]) == list(range(QUERIES))
    foreground = label[:QUERIES] < CLASSES
    assert 1 <= foreground.sum() <= 2 and len(set(gt_id[:QUERIES][foreground])) == foreground.sum()
    assert set(label[:QUERIES][foreground]) <= {1, 3} and (label[QUERIES:] == CLASSES).all()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def folder(family: str) -> Path:
        out = tmp_path_factory.mktemp("checkpoint") / family
        model, processor = build(family)
        model.save_pretrained(out)
        processor.save_pretrained(out)
        return out

    return folder


def test_a_checkpoint_folder_is_extracted_and_methods_that_need_background_are_refused(
    folders: Callable[[str], Path],
    document: Document,
    calib: Callable[..., Any],
    fails: Callable[..., str],
    tmp_path: Path,
) -> None:
    folder = folders("deformable-refined")
    name, (height, width) = f"transformers:{folder}", SIZES[0]
    boxes = open_detector(str(folder), CPU).rois([picture(height, width, 0)])[0].proposals[:3]
    objects = [(1, 10 * (k + 1), *map(float, (*b[:2], *(b[2:] - b[:2])))) for k, b in enumerate(boxes)]
    (tmp_path / "a.json").write_text(json.dumps(document(SIZES, objects)))
    common = ["--annotations", tmp_path / "a.json", "--images", tmp_path / "images"]
    outcome = calib("extract", "--detector", name, "--mode", "train", *common, "--out", tmp_path / "c")
    assert outcome.exit_code == 0, (outcome.stderr, outcome.exception)
    for method in ("pcb", "simcal", "disalign", "norcal"):
        said = fails("train", method, "--cache", tmp_path / "c", "--out", tmp_path / method / "1")
        assert f"{method} is defined for softmax detectors" in said and "gives sigmoid scores" in said
    done = calib("train", "natural", "--cache", tmp_path / "c", "--out", tmp_path / "m" / "1", "--set", "steps=3")
    assert done.exit_code == 0, done.stderr
    assert "cannot be exchanged" not in fails(
        "extract", "--detector", name, "--roi-maps", *common, "--out", tmp_path / "d"
    )
    said = fails(
        "masks", "--detector", name, "--detections", tmp_path / "d.json", *common, "--out", tmp_path / "m.json"
    )
    assert "has no mask branch that calib knows" in said


def test_outputs_can_be_chosen(folders: Callable[[str], Path], draw: Callable[..., Any]) -> None:
    folder = str(folders("detr"))
    whole = open_detector(folder, CPU).rois([draw(40, 60)])[0].logits
    some = open_detector(folder, CPU, arguments='{"labels": [3, 1]}')
    assert some.detector.num_classes == 2
    assert np.array_equal(some.rois([draw(40, 60)])[0].logits, whole[:, [3, 1, CLASSES]])
    for wrong in ('{"labels": [4]}', '{"labels": [1, 1]}', '{"labels": "all"}', '{"lables": [1]}', "[1]", "{"):
        with pytest.raises(InputError):
            open_detector(folder, CPU, arguments=wrong)


def test_folders_that_are_no_checkpoint_are_named(folders: Callable[[str], Path], tmp_path: Path) -> None:
    good = folders("detr")

    def broken(name: str, change: Callable[[Path], Any]) -> str:
        change(Path(shutil.copytree(good, tmp_path / name)))
        return str(tmp_path / name)

    cut = broken(
        "cut", lambda f: (f / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:999])
    )
    bare = broken("bare", lambda f: (f / "preprocessor_config.json").unlink())
    other = broken("other", lambda f: (f / "config.json").write_text('{"model_type": "bert"}'))

    def drop(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors["class_labels_classifier.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    lacking = broken("lacking", drop)
    cases: list[tuple[str, type[CalibError], str]] = [
        (str(tmp_path / "absent"), MissingFileError, r"absent/config\.json"),
        (cut, FormatError, "cut cannot be read"),
        (bare, MissingFileError, "preprocessor_config"),
        (other, UnknownNameError, "unknown transformers detector 'bert'"),
        (lacking, FormatError, "lacks 1 weights of the detector: class_labels_classifier.weight"),
    ]
    for folder, error, message in cases:
        with pytest.raises(error, match=message):
            open_detector(folder, CPU)
    with pytest.raises(InputError, match="has its own weights"):
        open_detector(str(good), CPU, weights=tmp_path / "w.pth")
    with pytest.raises(UnsupportedError, match="Linear cannot be extracted: it is no detector"):
        TransformersAdapter(torch.nn.Linear(1, 1), None, "x", CPU)


def test_a_checkpoint_in_half_precision_is_run_in_float32(
    document: Document, read: Read, draw: Callable[..., Any], tmp_path: Path
) -> None:
    model, processor = build("rf-detr")
    model.bfloat16().save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    adapter = open_detector(str(tmp_path / "half"), CPU)
    assert own_output(adapter, [draw(40, 60)]).logits.dtype == torch.float32
    extract(adapter, read(document(SIZES[:2])), tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    assert Cache(tmp_path / "c").manifest.proof["largest_difference"] < 1e-6


@pytest.mark.parametrize("kind", REFUSED)
def test_detectors_that_do_not_fit_are_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UnsupportedError) as e:
        open_detector(str(tmp_path), CPU)
    assert REFUSED[kind] in str(e.value) and "docs/raw.md" in e.value.hint


@pytest.fixture
def quiet_detr(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A DETR whose outputs 0 and 2 are never found, as COCO's numbers without a class."""
    folder = Path(shutil.copytree(folders("detr"), tmp_path / "quiet"))
    tensors = load_file(folder / "model.safetensors")
    tensors["class_labels_classifier.bias"][[0, 2]] = -30.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_outputs_that_are_left_out_of_a_softmax_must_be_never_found(
    folders: Callable[[str], Path], quiet_detr: Path, document: Document, read: Read, tmp_path: Path
) -> None:
    given = document(SIZES[:2])
    given["categories"] = given["categories"][:2]
    labels, pixels = [3, 1], [picture(h, w, i) for i, (h, w) in enumerate(SIZES[:2])]

    def run(folder: Path, name: str, **more: Any) -> Cache:
        adapter = open_detector(str(folder), CPU, arguments=json.dumps({"labels": labels}))
        extract(adapter, read(given), tmp_path / "images", tmp_path / name, Extraction(dtype="float32", **more))
        return Cache(tmp_path / name)

    folder = folders("detr")
    p = own_output(open_detector(str(folder), CPU), pixels[:1]).logits[0].softmax(1)
    share = f"{float(p[:, [0, 2]].sum(1).max()):.1%}"
    with pytest.raises(ReplayError, match=f"labels leaves out take up to {share} of a query's softmax"):
        run(folder, "c")
    assert not (tmp_path / "c").exists() and run(folder, "c", check_images=0).manifest.proof == {"images": 0}
    cache = run(quiet_detr, "quiet-cache")
    assert cache.manifest.proof["images"] == 2 and cache.manifest.proof["largest_difference"] < 1e-6
    own = own_output(open_detector(str(quiet_detr), CPU), pixels).logits.softmax(2)[:, :, labels]
    z = torch.from_numpy(cache.classifier.logits(cache.features.read(0, cache.n_rows)))
    assert torch.allclose(z.softmax(1)[:, :-1], own.flatten(0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("family", "labels"),
    [
        ("detr", None),
        ("quiet detr", [3, 1]),
        ("deformable", [2, 0]),
        ("rt-detr", None),
        ("rf-detr", [2, 0]),
        ("lw-detr", None),
        ("deimv2", None),
        ("yolos", None),
    ],
)
def test_a_head_is_folded_into_a_checkpoint_folder(
    family: str,
    labels: list[int] | None,
    folders: Callable[[str], Path],
    quiet_detr: Path,
    document: Document,
    read: Read,
    draw: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """transformers itself then gives the head's detections; outputs that are no class give none."""
    folder, given = quiet_detr if family == "quiet detr" else folders(family), document(SIZES[:2])
    given["categories"] = given["categories"][: len(labels or range(CLASSES))]
    adapter = open_detector(str(folder), CPU, arguments=json.dumps({"labels": labels} if labels else {}))
    extract(adapter, read(given), tmp_path / "images", tmp_path / "c", Extraction(dtype="float32"))
    cache, softmax = Cache(tmp_path / "c"), family in ("quiet detr", *SOFTMAX)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(len(cache.categories) + softmax, 32, generator=generator)
    linear = LinearClassifier(weight, torch.randn(len(weight), generator=generator))
    made = (LinearHead if softmax else SigmoidHead)(linear)
    save(tmp_path / "m" / "1", Artifact(made, HeadInfo.of(cache, "crt", {}, 0, [])))
    head = load(tmp_path / "m" / "1").head
    metrics = export(tmp_path / "m" / "1", cache.path, tmp_path / "new", Export("transformers", checkpoint=folder))
    assert "class" in metrics["layer"] and metrics["largest_difference"] <= 1e-5
    found = own_detections(open_detector(str(tmp_path / "new"), CPU), [draw(*SIZES[0]), draw(*SIZES[1], 1)])
    for ours, theirs in zip(score(cache, head, detector_nms(cache)), found, strict=True):
        value, label = theirs["scores"].numpy(), theirs["labels"].numpy()
        shown, d = value > 1e-3, ours.detections
        assert shown.sum() > 10 and set(label[shown]) <= set(labels or range(CLASSES))
        if not softmax:
            most = np.sort(value[shown])[::-1]
            assert np.allclose(d.score[: len(most)], most, atol=1e-6)
        place = {k: i for i, k in enumerate(labels or range(CLASSES))}
        own = {(c, round(float(s), 4)) for c, s in zip(d.category.tolist(), d.score, strict=True)}
        sure = [(place[k], round(float(v), 4)) for k, v in zip(label[shown].tolist(), value[shown], strict=True)]
        assert sum(one in own for one in sure) >= 0.9 * len(sure)  # a few round otherwise
    file = folder / "model.safetensors"
    export(tmp_path / "m" / "1", cache.path, tmp_path / "new.safetensors", Export("transformers", checkpoint=file))
    assert (tmp_path / "new.safetensors").read_bytes() == (tmp_path / "new" / file.name).read_bytes()


def test_a_fold_into_another_framework_or_folder_says_where_it_belongs(
    folders: Callable[[str], Path], document: Document, read: Read, tmp_path: Path
) -> None:
    folder = folders("detr")
    extract(
        open_detector(str(folder), CPU), read(document(SIZES[:1])), tmp_path / "images", tmp_path / "c", Extraction()
    )
    cache = Cache(tmp_path / "c")
    save(tmp_path / "m" / "1", Artifact(detector_head(cache), HeadInfo.of(cache, "softmax", {}, 0, [])))

    def refused(to: str, checkpoint: Path | None, kind: type[CalibError], out: str = "new") -> str:
        with pytest.raises(kind) as e:
            export(tmp_path / "m" / "1", cache.path, tmp_path / out, Export(to, checkpoint=checkpoint))
        assert not (tmp_path / "new").exists()
        return e.value.hint

    for to in ("torchvision", "detectron2", "mmdet"):
        assert "--to transformers" in refused(to, folder / "model.safetensors", UnsupportedError, "new.safetensors")
    for to in ("module", "layer"):
        assert "--to transformers" in refused(to, None, UnsupportedError)
    assert "that detector's checkpoint" in refused("transformers", folders("deformable"), InputError)
    assert "save_pretrained" in refused("transformers", tmp_path / "images", MissingFileError)
    refused("transformers", folder, ExistsError, "images")


def test_classes_go_by_their_names(document: Document, read: Read) -> None:
    adapter, dataset = open_family("detr"), read(document(SIZES[:1]))
    assert adapter.classes == ClassRule()  # LABEL_0 ... are no names
    model, processor = build("detr")

    def order(*names: str) -> list[int]:
        model.config.id2label = dict(enumerate(names))
        adapter = TransformersAdapter(model, processor, "detr", CPU)
        return in_class_order(adapter, dataset).categories.category_id.tolist()

    assert order("kind 2", "kind 0", "kind 3", "kind 1") == [30, 10, 40, 20]
    assert order("cat", "dog", "kind 2", "cow") == [10, 20, 30, 40]
    with pytest.raises(InputError, match="'kind 2' would be category 10") as e:
        order("kind 2", "dog", "cat", "cow")
    assert "labels" in e.value.hint
    assert TransformersAdapter(model, processor, "detr", CPU, [0, 1, 2, 3]).classes == ClassRule()
