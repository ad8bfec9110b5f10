"""Scoring: both files of one run say the same, appear whole or not at all, and are the same every time."""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from calib.artifact import Artifact, load, save
from calib.cache import Cache
from calib.errors import ExistsError, InputError, NonFiniteError, UnsupportedError
from calib.evaluate import Detections as Results
from calib.files import lock
from calib.heads.by_size import BySizeHead
from calib.heads.calibrated import CalibratedHead
from calib.heads.per_class import PerClassHead, ThresholdHead
from calib.parallel.part import Part
from calib.registry import HEADS, METHODS
from calib.score import Scorer, detections, detector_nms, score
from calib.score.detections import DETECTIONS_SCHEMA, Output, write_detections, write_part
from calib.settings import Nms
from calib.training import train

# One method for every kind of head.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("crt", {}),
    "gumbel": ("gol", {}),
    "text": ("text", {"form": "softmax"}),
    "group": ("bags", {}),
    "aligned": ("disalign", {}),
    "dual": ("simcal", {}),
    "average": ("simcal", {"inference": "average"}),
    "select": ("tau-norm", {"select": "tail"}),
    "affine": ("norcal", {}),
    "ncm": ("ncm", {}),
    "sigmoid": ("eql", {}),
    "objectness": ("seesaw", {}),
    "iterative": ("pcb", {}),
    "tde": ("tde", {}),
    "mlp": ("simcal", {"form": "mlp", "hidden": 32}),
    "discriminant": ("discriminant", {}),
    "residual": ("residual", {"hidden": 32}),
}


DECIDED = "decided"  # what is made of fitted heads
BY_SIZE = "by-size"


def decided(one: Artifact, other: Artifact) -> Artifact:
    """Each class from one of two heads, with its confidence mapped twice and a threshold of its own."""
    classes = one.head.num_classes
    group = torch.arange(classes) % 2
    slopes, shifts = torch.tensor([[0.9], [1.3]]), torch.tensor([[0.2], [-0.1]])
    knots = torch.linspace(0, 1, 9).repeat(2, 1)
    head = CalibratedHead(PerClassHead([one.head, other.head], group), "logistic", group.clone(), slopes, shifts)
    head = CalibratedHead(head, "knots", group.clone(), knots, knots**1.5)
    return replace(one, head=ThresholdHead(head, torch.linspace(0, 0.02, classes)))


@pytest.fixture(scope="module")
def softmax(val_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return train("softmax", val_cache, tmp_path_factory.mktemp("heads") / "softmax")


def write(cache: Cache, artifact: Artifact, out: Path, nms: Nms | None = None, **options: Any) -> int:
    nms = nms or detector_nms(cache)
    return write_detections(cache, [Output(artifact, nms, out, **options)])[0]


def test_parquet_and_json_agree(val_cache: Cache, softmax: Artifact, tmp_path: Path) -> None:
    count = write(val_cache, softmax, tmp_path / "d.parquet", results_json=tmp_path / "r.json")
    table = pq.read_table(tmp_path / "d.parquet")
    records = json.loads((tmp_path / "r.json").read_text())
    assert count == len(table) == len(records) > 24 * 100
    assert table.schema.remove_metadata() == DETECTIONS_SCHEMA
    for row, record in zip(table.to_pylist(), records, strict=True):
        box = [row["x1"], row["y1"], row["x2"] - row["x1"], row["y2"] - row["y1"]]
        assert record == {"image_id": row["image_id"], "category_id": row["category_id"], "bbox": box} | {
            "score": row["score"]
        }
    a, b = Results.read(tmp_path / "d.parquet"), Results.read(tmp_path / "r.json")
    assert np.array_equal(a.box, b.box) and np.array_equal(a.score, b.score)


def test_detections_know_their_origin_and_their_proposal(val_cache: Cache, softmax: Artifact, tmp_path: Path) -> None:
    nms = Nms(0.2, 0.3, 7)
    write(val_cache, softmax, tmp_path / "d.parquet", nms)
    table = pq.read_table(tmp_path / "d.parquet")
    origin = json.loads(table.schema.metadata[b"calib.detections"])
    assert origin["cache"] == val_cache.digest and origin["method"] == "softmax"
    assert origin["nms"] == {"score_threshold": 0.2, "nms_iou": 0.3, "max_detections": 7}
    columns = table.to_pydict()
    assert min(columns["score"]) > 0.2
    assert max(np.unique(columns["image_id"], return_counts=True)[1]) <= 7
    assert set(columns["category_id"]) <= set(val_cache.categories.category_id.tolist())
    first = [columns["roi_id"][i] for i in range(3)]
    names = ("refined_x1", "refined_y1", "refined_x2", "refined_y2")
    start = int(val_cache.image_start[val_cache.images["image_id"].to_pylist().index(columns["image_id"][0])])
    refined = np.stack(val_cache.meta(*names), 1)[[start + r for r in first]]
    assert np.array_equal(refined[:, 0], np.asarray(columns["x1"][:3], np.float32))  # 144 pixels: nothing is rescaled


def test_lvis_reads_the_results(
    shapes_set: Path, val_cache: Cache, softmax: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging
    import warnings

    write(val_cache, softmax, tmp_path / "d.parquet", results_json=tmp_path / "r.json")
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lvis import LVIS, LVISResults

            results = LVISResults(LVIS(str(shapes_set / "val.json")), str(tmp_path / "r.json"))
    finally:
        logging.disable(logging.NOTSET)
    assert len(results.get_ann_ids()) == len(pq.read_table(tmp_path / "d.parquet"))


@pytest.fixture(scope="module")
def heads(train_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A few steps of every kind of head."""
    folder = tmp_path_factory.mktemp("heads")
    out = {}
    for kind, (method, settings) in KINDS.items():
        steps = {} if not METHODS[method].trains else {"loop.steps": 3, "loop.warmup_steps": 0}
        out[kind] = train(method, train_cache, folder / kind, settings | steps)
    slopes, shifts = torch.tensor([[0.9], [1.3]]), torch.tensor([[0.2], [-0.1]])
    sized = BySizeHead(out["linear"].head, "logistic", torch.tensor([500.0]), slopes, shifts)
    return out | {DECIDED: decided(out["linear"], out["group"]), BY_SIZE: replace(out["linear"], head=sized)}


def test_every_kind_of_head_is_among_them(heads: dict[str, Artifact]) -> None:
    kinds = {m.kind for a in heads.values() for m in a.head.modules() if hasattr(m, "kind")}
    # Heads on RoI maps, of sigmoid detectors and of cascades need other caches: test_methods.py, heads/test_cascade.py.
    assert kinds >= set(HEADS) - {"box-head", "iterative-map", "sigmoid-product", "cascade"}


@pytest.mark.parametrize("kind", [*KINDS, DECIDED, BY_SIZE])
def test_scores_are_the_same_every_time(
    heads: dict[str, Artifact], val_cache: Cache, tmp_path: Path, kind: str
) -> None:
    for name in ("a", "b"):
        write(val_cache, heads[kind], tmp_path / f"{name}.parquet", results_json=tmp_path / f"{name}.json")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    scores = pq.read_table(tmp_path / "a.parquet")["score"].to_numpy()
    assert len(scores) and 0 < scores.min() <= scores.max() <= 1


def test_no_detection_at_all_is_a_valid_file(val_cache: Cache, softmax: Artifact, tmp_path: Path) -> None:
    assert write(val_cache, softmax, tmp_path / "d.parquet", Nms(1.0), results_json=tmp_path / "r.json") == 0
    assert pq.read_table(tmp_path / "d.parquet").schema.names == DETECTIONS_SCHEMA.names
    assert json.loads((tmp_path / "r.json").read_text()) == []
    assert len(Results.read(tmp_path / "d.parquet")) == len(Results.read(tmp_path / "r.json")) == 0


def test_sampled_proposals_are_not_scored(train_cache: Cache, softmax: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"cache {train_cache.path} was extracted with --mode train"):
        write(train_cache, softmax, tmp_path / "d.parquet")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detections, "IMAGES_PER_PIECE", 5)


def interrupted_at(image: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Scoring stops before ``image``; returns the list in which the images that were scored will stand."""
    scored: list[int] = []
    real = Scorer.image

    def cut(self: Scorer, i: int, heads: Any) -> Any:
        if i == image and image not in scored:
            scored.append(i)
            raise KeyboardInterrupt
        scored.append(i)
        return real(self, i, heads)

    monkeypatch.setattr(Scorer, "image", cut)
    return scored


def test_interrupted_the_same_call_goes_on(
    val_cache: Cache, softmax: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None
) -> None:
    write(val_cache, softmax, tmp_path / "whole.parquet", results_json=tmp_path / "whole.json")
    scored = interrupted_at(13, monkeypatch)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write(val_cache, softmax, out / "d.parquet", results_json=out / "r.json")
    assert not (out / "d.parquet").exists() and not (out / "r.json").exists()
    scored.clear()
    scored.append(13)
    write(val_cache, softmax, out / "d.parquet", results_json=out / "r.json")
    assert scored == [13, *range(10, len(val_cache.images))], "images 0 to 9 were done"
    assert (out / "d.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert (out / "r.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(p.name for p in out.iterdir()) == ["d.parquet", "r.json"]


@pytest.mark.parametrize("other", ["head", "thresholds"])
def test_pieces_of_another_request_are_not_used(
    val_cache: Cache,
    softmax: Artifact,
    heads: dict[str, Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_pieces: None,
    other: str,
) -> None:
    artifact, nms = (heads["linear"], None) if other == "head" else (softmax, Nms(0.3))
    write(val_cache, artifact, tmp_path / "whole.parquet", nms)
    interrupted_at(13, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        write(val_cache, softmax, tmp_path / "d.parquet")
    write(val_cache, artifact, tmp_path / "d.parquet", nms)
    assert (tmp_path / "d.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_several_heads_in_one_pass_write_what_each_writes_alone(
    val_cache: Cache, heads: dict[str, Artifact], tmp_path: Path
) -> None:
    outputs = [
        Output(heads[k], Nms(0.01 * n), tmp_path / f"{k}.parquet") for n, k in enumerate(("linear", "ncm", "group"))
    ]
    counts = write_detections(val_cache, outputs)
    for output, count in zip(outputs, counts, strict=True):
        alone = tmp_path / "alone.parquet"
        assert write(val_cache, output.artifact, alone, output.nms) == count
        assert alone.read_bytes() == output.parquet.read_bytes()


def test_one_file_for_two_heads_and_a_second_writer_are_refused(
    val_cache: Cache, softmax: Artifact, tmp_path: Path
) -> None:
    output = Output(softmax, Nms(), tmp_path / "d.parquet")
    with pytest.raises(InputError, match="the same file"):
        write_detections(val_cache, [output, output])
    waiting = tmp_path / ".d.parquet.pieces"
    with lock(waiting / ".lock", "busy"), pytest.raises(ExistsError, match="another process is writing"):
        write_detections(val_cache, [output])


def test_several_heads_on_the_command_line(
    val_cache: Cache, heads: dict[str, Artifact], tmp_path: Path, calib: Callable[..., Any]
) -> None:
    for name, version in (("a", "1"), ("a", "2"), ("b", "1")):
        save(tmp_path / name / version, heads["linear" if name == "a" else "ncm"])
    folders = [tmp_path / name for name in ("a/1", "a/2", "b/1")]
    given = [argument for folder in folders for argument in ("--head", folder)]
    out = tmp_path / "out"
    assert (
        calib("score", "--cache", val_cache.path, *given, "--out", out, "--results-json", out / "json").exit_code == 0
    )
    assert sorted(p.name for p in out.iterdir()) == ["a-1.parquet", "a-2.parquet", "b.parquet", "json"]
    assert sorted(p.name for p in (out / "json").iterdir()) == ["a-1.json", "a-2.json", "b.json"]
    assert (out / "a-1.parquet").read_bytes() == (out / "a-2.parquet").read_bytes() != (out / "b.parquet").read_bytes()


def test_killed_in_the_midst_the_next_run_goes_on(
    val_cache: Cache,
    softmax: Artifact,
    tmp_path: Path,
    start: Callable[..., subprocess.Popen[str]],
    calib: Callable[..., Any],
    small_pieces: None,
) -> None:
    """kill -9 while detections are being written; the next run goes on and leaves nothing else."""
    save(tmp_path / "head", softmax)
    out = tmp_path / "out"
    given = ("--cache", val_cache.path, "--head", tmp_path / "head", "--out", out / "d.parquet")
    arguments = ("score", *given, "--results-json", out / "r.json")
    slow = "import time; import calib.score.detections as d; d.IMAGES_PER_PIECE = 5; real = d._table\n"
    slow += "def slow(*a):\n    time.sleep(0.2)\n    return real(*a)\nd._table = slow"
    process = start(*arguments, before=slow)
    pieces = out / ".d.parquet.pieces"
    deadline = time.monotonic() + 60
    while len(list(pieces.glob("*/0*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -9 and list(out.iterdir()) == [pieces]
    assert calib(*arguments).exit_code == 0
    assert sorted(p.name for p in out.iterdir()) == ["d.parquet", "r.json"]
    write(val_cache, softmax, tmp_path / "whole.parquet", results_json=tmp_path / "whole.json")
    assert (out / "d.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert (out / "r.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_outputs_that_stand_in_the_way(val_cache: Cache, softmax: Artifact, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExistsError, match="folder is a folder"):
        write(val_cache, softmax, tmp_path / "folder")
    with pytest.raises(InputError, match="would both be written to"):
        write(val_cache, softmax, tmp_path / "d", results_json=tmp_path / "folder" / ".." / "d")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_boxes_that_are_no_numbers_are_named(val_cache: Cache, softmax: Artifact) -> None:
    cache = Cache(val_cache.path)
    nan = [np.full(cache.n_rows, np.nan, np.float32)] * 4
    real = cache.meta
    cache.meta = lambda *names: nan if "refined_x1" in names else real(*names)  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=rf"image \d+ of cache {cache.path}: scores or boxes hold NaN"):
        list(score(cache, softmax.head, Nms()))


def test_a_loaded_head_scores_as_the_fitted_one(heads: dict[str, Artifact], val_cache: Cache, tmp_path: Path) -> None:
    from calib.artifact import save

    for kind, artifact in heads.items():
        save(tmp_path / kind, artifact)
        write(val_cache, artifact, tmp_path / "a.parquet")
        write(val_cache, load(tmp_path / kind), tmp_path / "b.parquet")
        assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


# ---- shards


def test_parts_are_written_in_any_order_and_joined_without_scoring_again(
    val_cache: Cache, heads: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None
) -> None:
    def outputs(folder: Path) -> list[Output]:
        kinds = ("linear", "ncm")
        return [Output(heads[k], Nms(0.01), folder / f"{k}.parquet", folder / f"{k}.json") for k in kinds]

    write_detections(val_cache, outputs(tmp_path / "whole"))
    scored = interrupted_at(-1, monkeypatch)
    out = outputs(tmp_path / "out")
    for index in (2, 0, 2, 1):
        images = write_part(val_cache, out, Part(index, 3))
        assert images == [5, 10, 9][index]
    assert sorted(scored) == list(range(len(val_cache.images))), "part 2 was there when it came again"
    assert write_part(val_cache, out, Part(7, 8)) == 4 and write_part(val_cache, out, Part(0, 8)) == 0
    assert not any(o.parquet.exists() for o in out)
    write_detections(val_cache, out)
    write_part(val_cache, out, Part(1, 3))  # sent again by its scheduler when all is done
    assert len(scored) == len(val_cache.images)
    for name in ("linear.parquet", "ncm.parquet", "linear.json", "ncm.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list((tmp_path / "out").iterdir())) == 4
    for other in (Nms(0.02), Nms(0.01, 0.4)):
        assert not replace(out[0], nms=other).is_written(val_cache)
    assert not replace(out[0], artifact=heads["ncm"]).is_written(val_cache)


def test_processes_that_score_parts_do_not_wait_for_each_other(
    val_cache: Cache, softmax: Artifact, tmp_path: Path, calib: Callable[..., Any], small_pieces: None
) -> None:
    head, out = tmp_path / "head", tmp_path / "d.parquet"
    save(head, softmax)
    given = ("score", "--cache", val_cache.path, "--head", head, "--out", out, "--json")
    waiting = tmp_path / ".d.parquet.pieces"
    with lock(waiting / ".lock", "scoring a part", shared=True):
        for part in ("1/2", "0/2"):
            done = calib(*given, "--shard", part)
            assert json.loads(done.stdout)["shard"] == part, done.output
        refused = calib(*given)
        assert refused.exit_code == 2 and "another process is writing" in refused.stderr
    with lock(waiting / ".lock", "joining"):
        assert calib(*given, "--shard", "0/2").exit_code == 2
    assert json.loads(calib(*given).stdout)["images"] == len(val_cache.images)
    write(val_cache, softmax, tmp_path / "whole.parquet")
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes() and not waiting.exists()


def test_damaged_pieces_are_scored_again(
    val_cache: Cache, softmax: Artifact, tmp_path: Path, small_pieces: None
) -> None:
    whole, out = (Output(softmax, Nms(), tmp_path / name) for name in ("whole.parquet", "d.parquet"))
    write_detections(val_cache, [whole])
    write_part(val_cache, [out], Part())
    cut, flipped, empty = sorted(tmp_path.glob(".d.parquet.pieces/*/0*.parquet"))[:3]
    cut.write_bytes(cut.read_bytes()[:-9])
    content = bytearray(flipped.read_bytes())
    content[len(content) // 3] ^= 1
    flipped.write_bytes(content)
    empty.write_bytes(b"")
    write_detections(val_cache, [out])
    assert out.parquet.read_bytes() == whole.parquet.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.parquet", "whole.parquet"]


def test_one_way_to_divide_the_work(
    val_cache: Cache, softmax: Artifact, tmp_path: Path, fails: Callable[..., str]
) -> None:
    save(tmp_path / "head", softmax)
    given = ("score", "--cache", val_cache.path, "--head", tmp_path / "head", "--out", tmp_path / "d.parquet")
    assert "both divide the work" in fails(*given, "--shard", "0/2", "--engine", "ray")
    assert "unknown engine 'rya'. Did you mean 'ray'?" in fails(*given, "--engine", "rya")
    for option in (("--address", "auto"), ("--processes", "2"), ("--cpus", "0.5")):
        assert "add --engine ray" in fails(*given, *option)
    assert "expected i/N" in fails(*given, "--shard", "2/2")
