"""``calib data untile``: detections of tiles are judged on pages as if the pages had been looked at as a whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.errors import FormatError, InputError, MissingFileError, NonFiniteError, SettingError
from calib.evaluate.evaluate_files import Options, evaluate_files
from calib.evaluate.evaluation import Evaluation, Evaluator
from calib.evaluate.ground_truth import GroundTruth
from calib.evaluate.results import Detections
from calib.tiles.cut import cut_file
from calib.tiles.grid import Tiling
from calib.tiles.merge import Merging, Tiles, _survivors, untile

Pages = Callable[..., Path]
COLUMNS = ("image_id", "category_id", "score", "x1", "y1", "x2", "y2")
Row = tuple[float, ...]


def write(path: Path, rows: list[Row]) -> Path:
    """As ``calib score`` does: float32."""
    types = [pa.int64(), pa.int64(), *[pa.float32()] * 5]
    columns = list(zip(*rows, strict=True)) if rows else [()] * 7
    arrays = [pa.array([int(v) for v in c] if t == pa.int64() else c, t) for c, t in zip(columns, types, strict=True)]
    pq.write_table(pa.table(dict(zip(COLUMNS, arrays, strict=True))), path)
    return path


def tiles_of(source: Path, tiling: Tiling) -> Path:
    return cut_file(source, source.parent / "pictures", source.parent / "tiles", tiling, overwrite=True).path


def judged(annotations: Path, results: Path, style: Any = "lvis") -> Evaluation:
    evaluator = Evaluator(GroundTruth.read(annotations, style=style))
    return evaluator.evaluate(Detections.read(results), max_detections=40, full=True)


def same(a: Evaluation, b: Evaluation) -> bool:
    """To the bit."""
    names = ("AP", "AP50", "APs", "APm", "AR", "n_gt", "n_det", "precision", "recall")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


def found_on_pages(rng: np.random.Generator) -> tuple[list[Any], list[Row]]:
    """Objects in cells of 20 pixels that no two share, and detections beside, around and without them. Coordinates are
    multiples of 1/64, so that moving them rounds nothing."""
    boxes: list[Any] = []
    rows: list[Row] = []
    for page in range(6):
        own = []
        for x, y in [(x, y) for y in range(0, 120, 20) for x in range(0, 120, 20)]:
            category, left, top = rng.choice([3, 5, 8]), x + rng.integers(1, 6), y + rng.integers(1, 6)
            if rng.random() < 0.7:
                own.append((int(category), int(left), int(top), int(rng.integers(8, 13)), int(rng.integers(8, 13))))
            for named in {int(category), int(rng.choice([3, 5, 8, 9]))} if rng.random() < 0.8 else ():
                corners = np.array([left, top, left + 10, top + 10]) + rng.integers(-64, 100, 4) / 64
                rows.append((100 - page, named, float(np.float32(rng.random())), *corners.tolist()))
        boxes.append(own)
    return boxes, rows


@pytest.mark.parametrize("overlap", [0, 20, 40])
@pytest.mark.parametrize("metric", ["iou", "ios"])
@pytest.mark.parametrize("style", ["lvis", "coco"])
def test_it_is_judged_as_whole_pictures_are_where_no_object_is_cut(
    pages: Pages, tmp_path: Path, overlap: int, metric: str, style: str
) -> None:
    """Borders of tiles lie between the cells. What lies whole in several tiles is found in each of them."""
    boxes, rows = found_on_pages(np.random.default_rng(overlap))
    source = pages(boxes, size=(120, 120))
    tiles = tiles_of(source, Tiling(60, overlap))
    in_tiles = []
    for tile in json.loads(tiles.read_bytes())["images"]:
        x, y = tile["tile_x"], tile["tile_y"]
        for image, category, score, x1, y1, x2, y2 in rows:
            if image == tile["page_id"] and x <= x1 and y <= y1 and x2 <= x + 60 and y2 <= y + 60:
                in_tiles.append((tile["id"], category, score, x1 - x, y1 - y, x2 - x, y2 - y))
    assert len(in_tiles) > len(rows) if overlap else len(in_tiles) == len(rows)

    merged = untile(write(tmp_path / "t.parquet", in_tiles), tiles, tmp_path / "m.parquet", Merging(metric=metric))
    assert merged.written == len(rows) and merged.suppressed == len(in_tiles) - len(rows)
    whole = judged(source, write(tmp_path / "w.parquet", rows), style)
    assert same(whole, judged(source, tmp_path / "m.parquet", style))
    assert 0.05 < whole.AP[whole.n_gt > 0].mean() < 0.95
    outcomes = [
        evaluate_files(source, [tmp_path / f"{n}.parquet"], [tmp_path / n], Options(style=style))[0]  # type: ignore[arg-type]
        for n in "wm"
    ]
    assert outcomes[0].summary["AP"] == outcomes[1].summary["AP"]


def test_boxes_go_back_to_where_the_page_has_them(pages: Pages, tmp_path: Path) -> None:
    """The boxes of the tiles themselves, unless a border cuts them; scaled pages too."""
    source = pages([[(3, 4, 5, 12, 9), (5, 66, 2, 20, 10), (8, 101, 61, 9, 31)]], size=(101, 131))
    truth = {a["id"]: a["bbox"] for a in json.loads(source.read_bytes())["annotations"]}
    for scale in (1.0, 0.5, 1.7):
        tiling = Tiling(50, 25, scale=scale)
        tiles = tiles_of(source, tiling)
        document = json.loads(tiles.read_bytes())
        placed, ids = Tiles.read(tiles), [tile["id"] for tile in document["images"]]
        rows = [a for a in document["annotations"] if a["bbox"][0] > 0 and a["bbox"][1] > 0]
        rows = [a for a in rows if tiling.size > max(a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3])]
        tile = np.array([ids.index(a["image_id"]) for a in rows])
        found = placed.on_page(np.array([a["bbox"] for a in rows]), tile)
        wanted = np.array([truth[a["page_annotation_id"]] for a in rows])
        np.testing.assert_allclose(found[:, :2], wanted[:, :2], rtol=1e-12)
        np.testing.assert_allclose(found[:, 2:] - found[:, :2], wanted[:, 2:], rtol=1e-12)
        assert len(rows) >= 2


def test_boxes_end_where_the_page_does(pages: Pages, tmp_path: Path) -> None:
    tiles = tiles_of(pages([[]], size=(20, 30)), Tiling(40))
    untile(write(tmp_path / "t.parquet", [(1, 3, 0.5, 10, 5, 39, 40)]), tiles, tmp_path / "m.parquet", Merging())
    table = pq.read_table(tmp_path / "m.parquet").to_pydict()
    assert [table[name] for name in COLUMNS] == [[100], [3], [0.5], [10], [5], [30], [20]]
    assert table["tile_id"] == [1]


def greedy(rows: list[tuple[Any, ...]], bound: float, metric: str) -> list[int]:
    """Class-wise NMS between tiles as one would tell it."""
    kept: list[int] = []
    for k in sorted(range(len(rows)), key=lambda k: -rows[k][0]):
        _, category, tile, (x1, y1, x2, y2) = rows[k]
        for other in kept:
            _, its_category, its_tile, (a1, b1, a2, b2) = rows[other]
            inter = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
            own, its = (x2 - x1) * (y2 - y1), (a2 - a1) * (b2 - b1)
            whole = min(own, its) if metric == "ios" else own + its - inter
            if category == its_category and tile != its_tile and whole > 0 and inter / whole > bound:
                break
        else:
            kept.append(k)
    return kept


corner, side = st.integers(0, 12), st.integers(0, 9)
detection = st.tuples(st.integers(0, 5), st.integers(0, 1), st.integers(0, 2), corner, corner, side, side)


@given(st.lists(detection, max_size=25), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.sampled_from(["iou", "ios"]))
@settings(deadline=None)
def test_suppression_is_greedy_between_tiles_alone(drawn: list[Any], bound: float, metric: str) -> None:
    rows = [(s, c, t, (x, y, x + w, y + h)) for s, c, t, x, y, w, h in drawn]
    box = np.array([r[3] for r in rows], np.float64).reshape(-1, 4)
    score, category, tile = (np.array([r[k] for r in rows], np.int64) for k in range(3))
    found = _survivors(box, score.astype(np.float64), category, tile, Merging(bound, metric))
    assert found.tolist() == greedy(rows, bound, metric)


def test_the_part_of_an_object_that_a_border_cuts_is_found_by_ios(pages: Pages, tmp_path: Path) -> None:
    tiles = tiles_of(pages([[]], size=(40, 70)), Tiling(40, 10))  # at 0 and 30
    rows = [(1, 3, 0.6, 32, 0, 40, 10), (2, 3, 0.9, 2, 0, 22, 10), (2, 3, 0.8, 2, 0, 20, 10), (2, 5, 0.3, 2, 0, 22, 10)]
    detections, out = write(tmp_path / "t.parquet", rows), tmp_path / "m.parquet"
    assert untile(detections, tiles, out, Merging()).written == 4
    merged = untile(detections, tiles, out, Merging(metric="ios"))
    assert (merged.read, merged.suppressed, merged.written) == (4, 1, 3)
    assert pq.read_table(out)["score"].to_numpy().tolist() == [float(np.float32(s)) for s in (0.9, 0.8, 0.3)]


def test_the_cap_is_per_page(pages: Pages, tmp_path: Path) -> None:
    tiles = tiles_of(pages([[], []], size=(40, 80)), Tiling(40))
    rows = [(t, 3 + 2 * (k % 2), (7 * k % 10) / 10, k, 0, k + 1, 1) for t in (1, 2, 3) for k in range(6)]
    merged = untile(write(tmp_path / "t.parquet", rows), tiles, tmp_path / "m.parquet", Merging(max_detections=7))
    assert (merged.read, merged.suppressed, merged.beyond_cap, merged.written) == (18, 0, 5, 13)
    table = pq.read_table(tmp_path / "m.parquet")
    assert table["image_id"].to_pylist() == [99] * 7 + [100] * 6
    assert table["score"].to_numpy()[:7].min() >= 0.4 and (np.diff(table["score"].to_numpy()[:7]) <= 0).all()


def test_a_results_json_gives_the_same(pages: Pages, tmp_path: Path) -> None:
    tiles = tiles_of(pages([[]]), Tiling(60, 20))
    rows: list[Row] = [(k % 4 + 1, 3, k / 16, k, 1.5, k + 20.25, 30) for k in range(16)]
    results = [
        {"image_id": i, "category_id": c, "score": s, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for i, c, s, x1, y1, x2, y2 in rows
    ]
    (tmp_path / "t.json").write_text(json.dumps(results))
    write(tmp_path / "t.parquet", rows)
    for kind in ("json", "parquet"):
        untile(tmp_path / f"t.{kind}", tiles, tmp_path / f"from-{kind}.parquet", Merging())
    first, second = (pq.read_table(tmp_path / f"from-{kind}.parquet") for kind in ("json", "parquet"))
    assert first.to_pydict() == second.to_pydict() and len(first) > 0


def test_nothing_found_is_nothing_merged(pages: Pages, tmp_path: Path) -> None:
    tiles = tiles_of(pages([[]]), Tiling(60))
    assert untile(write(tmp_path / "t.parquet", []), tiles, tmp_path / "m.parquet", Merging()).written == 0
    assert len(Detections.read(tmp_path / "m.parquet")) == 0


def test_wrong_files_are_refused_and_nothing_is_written(pages: Pages, tmp_path: Path) -> None:
    source = pages([[]])
    tiles = tiles_of(source, Tiling(60))
    good, out = write(tmp_path / "t.parquet", [(1, 3, 0.5, 1, 1, 9, 9)]), tmp_path / "m.parquet"
    for kind, arguments in (
        (FormatError, (good, source, out)),  # the json of the pages
        (InputError, (write(tmp_path / "u.parquet", [(999, 3, 0.5, 1, 1, 9, 9)]), tiles, out)),
        (NonFiniteError, (write(tmp_path / "n.parquet", [(1, 3, float("nan"), 1, 1, 9, 9)]), tiles, out)),
        (MissingFileError, (tmp_path / "none.parquet", tiles, out)),
        (MissingFileError, (good, tmp_path / "none.json", out)),
        (InputError, (good, tiles, good)),
        (InputError, (good, tiles, tmp_path / "m.json")),
    ):
        with pytest.raises(kind):
            untile(*arguments, Merging())
    document = json.loads(tiles.read_bytes())
    for key, value, kind in (
        ("tile_scale_x", 0, FormatError),
        ("page_id", "x", FormatError),
        ("tile_x", None, FormatError),
    ):
        (tmp_path / "bad.json").write_text(json.dumps({"images": [document["images"][0] | {key: value}]}))
        with pytest.raises(kind):
            untile(good, tmp_path / "bad.json", out, Merging())
    assert not out.exists() and not (tmp_path / "m.json").exists()
    for wrong in ({"nms_iou": -0.1}, {"nms_iou": 1.1}, {"metric": "giou"}, {"max_detections": 0}):
        with pytest.raises(SettingError):
            Merging(**wrong)  # type: ignore[arg-type]


def test_the_command_puts_pages_together(pages: Pages, tmp_path: Path, calib: Any, fails: Any) -> None:
    source = pages([[(3, 4, 5, 12, 9)]])
    tiles = tiles_of(source, Tiling(60, 20))
    detections = write(tmp_path / "t.parquet", [(1, 3, 0.5, 4, 5, 16, 14)])
    done = calib("data", "untile", detections, "--tiles", tiles, "--out", tmp_path / "m.parquet", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["written"] == 1
    done = calib(
        "evaluate", "--annotations", source, "--results", tmp_path / "m.parquet", "--out", tmp_path / "r", "--json"
    )
    assert json.loads(done.stdout)["AP"] > 0.999
    assert "metric" in fails("data", "untile", detections, "--tiles", tiles, "--out", tmp_path / "m", "--metric", "no")
