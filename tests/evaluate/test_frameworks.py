"""Files of mmdetection and Detectron2 give the metrics of these frameworks' own evaluators, where they are installed;
their rules, spelled out with pycocotools and lvis, always."""

import contextlib
import io
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.evaluate.evaluate_files import Options, evaluate_files
from calib.evaluate.foreign import Reading, category_ids
from calib.evaluate.ground_truth import GroundTruth

from .test_foreign import Fails

SIZE = 200
LISTED = [9, 2, 5, 7]  # the json's order of categories
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def drawn(rng: np.random.Generator) -> tuple[list[float], Any]:
    """A box and an ellipse in its middle, small enough to fall into another range of sizes than the box."""
    w, h = rng.uniform(12, 190, 2)
    x, y = rng.uniform(0, SIZE - w), rng.uniform(0, SIZE - h)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    share = rng.uniform(0.5, 1)
    mask = ((columns - x - w / 2) / (share * w / 2)) ** 2 + ((rows - y - h / 2) / (share * h / 2)) ** 2 <= 1
    return [float(np.float32(v)) for v in (x, y, w, h)], mask


def code(mask: Any) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [SIZE, SIZE], "counts": encoded["counts"].decode()}


class Case:
    """A ground truth, and per image what a detector found: boxes, masks, scores and places in ``order`` of ids."""

    def __init__(self, folder: Path, listed: list[int]) -> None:
        rng = np.random.default_rng(3)
        self.path, self.listed = folder / "truth.json", listed
        annotations: list[dict[str, Any]] = []
        self.found: dict[int, list[tuple[list[float], Any, float, float, int]]] = {}
        for image in range(1, 9):
            self.found[image] = []
            for _ in range(6):
                box, mask = drawn(rng)
                category = int(rng.choice(listed))
                row = {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": box}
                annotations.append(row | {"segmentation": code(mask), "area": float(mask.sum()), "iscrowd": 0})
                moved = [float(np.float32(v + rng.normal(scale=2))) for v in box]
                seen = category if rng.random() < 0.8 else int(rng.choice(listed))
                shift = int(rng.integers(0, 3))
                scores = [float(np.float32(v)) for v in rng.random(2)]
                self.found[image].append((moved, np.roll(mask, shift, axis=1), *scores, seen))  # type: ignore[arg-type]
        sides = {"height": SIZE, "width": SIZE}
        known = {"neg_category_ids": listed, "not_exhaustive_category_ids": []}
        images = [{"id": i, "file_name": f"{i}.jpg", **sides, **known} for i in self.found]
        categories = [{"id": c, "name": f"c{c}", "frequency": "rcf"[k % 3]} for k, c in enumerate(listed)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        self.path.write_text(json.dumps(document))

    def rows(self) -> list[dict[str, Any]]:
        """As a results json."""
        return [
            {"image_id": i, "category_id": c, "bbox": box, "score": score, "segmentation": code(mask)}
            for i, found in self.found.items()
            for box, mask, score, _, c in found
        ]

    def samples(self) -> list[dict[str, Any]]:
        """As mmdetection's model gives them to metrics: class k is the k-th category of the json."""
        samples = []
        for i, found in self.found.items():
            xywh = torch.tensor([box for box, *_ in found], dtype=torch.float32)
            instances = {
                "bboxes": torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1),
                "masks": torch.from_numpy(np.stack([m for _, m, *_ in found])),
                "scores": torch.tensor([s for _, _, s, _, _ in found]),
                "mask_scores": torch.tensor([s for _, _, _, s, _ in found]),
                "labels": torch.tensor([self.listed.index(c) for *_, c in found]),
            }
            samples.append({"img_id": i, "ori_shape": (SIZE, SIZE), "pred_instances": instances})
        return samples

    def pkl(self, path: Path) -> Path:
        """As DumpDetResults writes them."""
        samples = self.samples()
        for sample in samples:
            masks = sample["pred_instances"]["masks"].numpy()
            sample["pred_instances"]["masks"] = [code(m) | {"counts": code(m)["counts"].encode()} for m in masks]
        path.write_bytes(pickle.dumps(samples))
        return path

    def pth(self, path: Path) -> Path:
        """As Detectron2's evaluators write them: class k is the k-th category by ascending id."""
        index = {c: k for k, c in enumerate(sorted(self.listed))}
        rows = [r | {"category_id": index[r["category_id"]]} for r in self.rows()]
        torch.save([{"image_id": i, "instances": [r for r in rows if r["image_id"] == i]} for i in self.found], path)
        return path


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path, LISTED)


def ours(case: Case, results: Path, style: Any, iou_type: Any, reading: Reading = Reading()) -> dict[str, float]:
    options = Options(style=style, iou_type=iou_type, reading=reading)
    (outcome,) = evaluate_files(case.path, [results], [results.parent / f"out-{style}-{iou_type}"], options)
    return {k: outcome.summary[k] for k in METRICS}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        if not hasattr(np, "float"):
            patch.setattr(np, "float", float, raising=False)  # the lvis package needs it
        yield


def official(case: Case, rows: list[dict[str, Any]], style: str, iou_type: str) -> dict[str, float]:
    """By pycocotools or lvis."""
    with quietly():
        if style == "coco":
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval

            truth = COCO(str(case.path))
            judged = COCOeval(truth, truth.loadRes(rows), iou_type)
            judged.evaluate()
            judged.accumulate()
            judged.summarize()
            return dict(zip(METRICS, judged.stats.tolist(), strict=False))
        from lvis import LVIS, LVISEval, LVISResults

        own = LVIS(str(case.path))
        evaluation = LVISEval(own, LVISResults(own, rows), iou_type)
        evaluation.run()
        return {k: float(evaluation.results[k]) for k in METRICS}


@pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning")  # of the lvis package
@pytest.mark.parametrize("style", ["coco", "lvis"])
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("framework", ["mmdetection", "Detectron2"])
def test_their_rules(framework: str, iou_type: str, style: str, case: Case, tmp_path: Path) -> None:
    """Order of classes; sizes of masks without boxes but for LVISMetric; ``mask_scores`` for masks."""
    rows = case.rows()
    if iou_type == "segm" and framework == "mmdetection":
        scores = (s for found in case.found.values() for _, _, _, s, _ in found)
        rows = [r | {"score": s} for r, s in zip(rows, scores, strict=True)]
    if iou_type == "segm" and (framework, style) != ("mmdetection", "lvis"):
        rows = [{k: v for k, v in r.items() if k != "bbox"} for r in rows]
    path = case.pkl(tmp_path / "r.pkl") if framework == "mmdetection" else case.pth(tmp_path / "r.pth")
    wanted = official(case, rows, style, iou_type)
    assert 0.2 < wanted["AP"] < 0.95
    assert ours(case, path, style, iou_type) == pytest.approx(wanted, abs=1e-12)


def test_sizes_of_masks_are_chosen(case: Case, tmp_path: Path) -> None:
    """A results json has sizes of boxes, as in pycocotools; frameworks' own are a choice."""
    (tmp_path / "r.json").write_text(json.dumps(case.rows()))
    box, mask = (ours(case, tmp_path / "r.json", "coco", "segm", Reading(sizes=s)) for s in ("box", "mask"))
    assert ours(case, tmp_path / "r.json", "coco", "segm") == box != mask
    path = case.pth(tmp_path / "r.pth")
    assert ours(case, path, "coco", "segm") == mask
    assert ours(case, path, "coco", "segm", Reading(sizes="box")) == box


def test_orders_of_classes(case: Case, tmp_path: Path, fails: Fails, calib: Callable[..., Any]) -> None:
    truth = GroundTruth.read(case.path)
    assert category_ids(truth, "json").tolist() == LISTED
    assert category_ids(truth, "id").tolist() == sorted(LISTED)
    assert category_ids(truth, "id-1").tolist() == list(range(1, 10))
    (tmp_path / "names.txt").write_text("c5\nc9\n\nc2\n")
    assert category_ids(truth, str(tmp_path / "names.txt")).tolist() == [5, 9, 2]
    (tmp_path / "names.json").write_text(json.dumps([f"c{c}" for c in LISTED]))
    pkl = case.pkl(tmp_path / "r.pkl")
    own = ours(case, pkl, "coco", "bbox")
    assert ours(case, pkl, "coco", "bbox", Reading(str(tmp_path / "names.json"))) == own
    assert ours(case, pkl, "coco", "bbox", Reading("id"))["AP"] < own["AP"] / 2

    def run(*more: str, results: Path = pkl) -> tuple[Any, ...]:
        return ("evaluate", "--annotations", case.path, "--results", results, "--out", tmp_path / "out", *more)

    told = calib(*run("--json"))
    assert told.exit_code == 0 and "--classes id" in told.stderr
    assert "--classes" not in calib(*run("--json", "--classes", "json")).stderr
    for given in ("c5\nc5\n", "c5\nother\n"):
        (tmp_path / "names.txt").write_text(given)
        assert "must stand once" in fails(*run("--classes", str(tmp_path / "names.txt")))
    assert "there are 2 classes" in fails(*run("--classes", str(names(tmp_path, "c5\nc9\n"))))
    assert "list of classes not found" in fails(*run("--classes", str(tmp_path / "absent.txt")))
    assert "is no list of names" in fails(*run("--classes", str(names(tmp_path, ""))))
    (tmp_path / "r.json").write_text(json.dumps(case.rows()))
    assert "has category ids" in fails(*run("--classes", "id", results=tmp_path / "r.json"))
    assert "sizes are chosen where masks" in fails(*run("--sizes", "mask"))
    assert "sizes must be" in fails(*run("--sizes", "segm"))


def names(folder: Path, text: str) -> Path:
    (folder / "n.txt").write_text(text)
    return folder / "n.txt"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("metric", ["CocoMetric", "LVISMetric"])
def test_as_mmdetection_itself(metric: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metric on the samples of its model, ours on the file that its DumpDetResults writes of them."""
    pytest.importorskip("mmcv.ops")
    metrics = pytest.importorskip("mmdet.evaluation.metrics")
    style, module = ("coco", metrics.coco_metric) if metric == "CocoMetric" else ("lvis", metrics.lvis_metric)
    kind = "COCOeval" if style == "coco" else "LVISEval"
    seen: dict[str, Any] = {}

    class Recorded(getattr(module, kind)):  # type: ignore[misc]
        """The metrics before mmdetection rounds them."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            seen[args[2]] = self

    monkeypatch.setattr(module, kind, Recorded)
    judge = getattr(metrics, metric)(ann_file=str(case.path), metric=["bbox", "segm"])
    judge.dataset_meta = {"classes": tuple(f"c{c}" for c in sorted(LISTED))}  # their order does not matter to it
    dump = metrics.DumpDetResults(out_file_path=str(tmp_path / "results.pkl"))
    with quietly():
        for step in (judge, dump):
            step.process({}, case.samples())
            step.evaluate(size=len(case.found))
    for iou_type, own in seen.items():
        wanted = dict(zip(METRICS, own.stats.tolist(), strict=False)) if style == "coco" else own.results
        found = ours(case, tmp_path / "results.pkl", style, iou_type)
        assert found == pytest.approx({k: float(wanted[k]) for k in METRICS}, abs=1e-12)
    assert set(seen) == {"bbox", "segm"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["COCOEvaluator", "LVISEvaluator", "LVISEvaluator of LVIS"])
def test_as_detectron2_itself(kind: str, tmp_path: Path) -> None:
    """Its evaluator on the instances of its model, ours on the file that it writes. Ids of LVIS are 1 to N."""
    evaluation = pytest.importorskip("detectron2.evaluation")
    from detectron2.data import MetadataCatalog
    from detectron2.data.datasets import load_coco_json
    from detectron2.structures import Boxes, Instances

    case = Case(tmp_path, [3, 1, 4, 2] if kind.endswith("LVIS") else LISTED)
    name = str(tmp_path)
    MetadataCatalog.get(name).json_file = str(case.path)
    if not kind.endswith("LVIS"):
        load_coco_json(str(case.path), "", name)
    judge = getattr(evaluation, kind.split()[0])(name, ("bbox", "segm"), False, str(tmp_path / "own"))
    index = {c: k for k, c in enumerate(sorted(case.listed))}
    judge.reset()
    with quietly():
        for i, found in case.found.items():
            xywh = torch.tensor([box for box, *_ in found], dtype=torch.float32)
            instances = Instances((SIZE, SIZE))
            instances.pred_boxes = Boxes(torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1))
            instances.scores = torch.tensor([s for _, _, s, _, _ in found])
            instances.pred_classes = torch.tensor([index[c] for *_, c in found])
            instances.pred_masks = torch.from_numpy(np.stack([m for _, m, *_ in found]))
            judge.process([{"image_id": i}], [{"instances": instances}])
        own = judge.evaluate()
    style = "coco" if kind == "COCOEvaluator" else "lvis"
    for iou_type in ("bbox", "segm"):
        wanted = {k: own[iou_type][k] / 100 for k in METRICS}
        files = [tmp_path / "own" / "instances_predictions.pth", tmp_path / "own" / f"{style}_instances_results.json"]
        for path in files:
            sizes = "mask" if iou_type == "segm" and path.suffix == ".json" else ""
            found_ = ours(case, path, style, iou_type, Reading(sizes=sizes))
            assert found_ == pytest.approx(wanted, abs=1e-12), path
