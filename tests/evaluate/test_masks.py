"""Masks are checked before the C code of pycocotools, which trusts them, sees them."""

import json
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from calib.cli.console import CalibGroup, with_optional_values
from calib.cli.evaluate import OPTIONAL_VALUES
from calib.cli.evaluate import evaluate as command
from calib.errors import FormatError
from calib.evaluate import Detections, GroundTruth, evaluate
from calib.evaluate.foreign import read_results
from calib.evaluate.masks import FARTHEST, MOST_PIXELS, run_lengths

HEIGHT, WIDTH = 60, 80
SIZE = (HEIGHT, WIDTH)


def encode(mask: Any) -> bytes:
    from pycocotools import mask as coco_mask

    return bytes(coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"])


def coded(values: list[int], longer: int = 0) -> bytes:
    """Differences as characters; ``longer``: more of them than are needed."""
    text = bytearray()
    for value in values:
        n = 1
        while not -(1 << 5 * n - 1) <= value < 1 << 5 * n - 1:
            n += 1
        n += longer
        text += bytes((value >> 5 * k & 31 | (32 if k < n - 1 else 0)) + 48 for k in range(n))
    return bytes(text)


def decoded(code: bytes) -> list[int] | None:
    """Runs, one by one; None where the text is no code."""
    runs: list[int] = []
    value = k = 0
    for character in code:
        digit = character - 48
        if not 0 <= digit < 64 or k == 6:
            return None
        value |= (digit & 31) << 5 * k
        k += 1
        if digit & 32:
            continue
        value -= (digit & 16) << 5 * (k - 1) + 1
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = k = 0
    return None if k else runs


def noise(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    mask = rng.random(SIZE) < rng.choice([0.002, 0.5, 0.998])
    if rng.random() < 0.5:
        mask = np.repeat(mask, WIDTH, axis=1)[:, :WIDTH]
    return mask


def rle(counts: Any, size: Any = SIZE) -> dict[str, Any]:
    return {"size": list(size), "counts": counts}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9))
def test_good_masks_stay_as_they_are(seeds: list[int]) -> None:
    codes = [encode(noise(seed)) for seed in seeds]
    found = run_lengths([rle(c if i % 2 else c.decode()) for i, c in enumerate(codes)], [SIZE] * len(codes), "r")
    assert found == [rle(c) for c in codes]
    assert [decoded(c) for c in codes] == [decoded(m["counts"]) for m in found]
    listed = run_lengths([rle(decoded(c)) for c in codes], [SIZE] * len(codes), "r")
    assert listed == found


@settings(max_examples=400, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_changed_codes_are_taken_exactly_if_they_fill_the_image(seed: int, data: st.DataObject) -> None:
    from pycocotools import mask as coco_mask

    code, good = bytearray(encode(noise(seed))), encode(noise(seed + 1))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(code)))
        match data.draw(st.sampled_from(["cut", "change", "insert", "remove"])):
            case "cut":
                del code[at:]
            case "change":
                code[at : at + 1] = bytes([data.draw(st.integers(47, 112))])
            case "insert":
                code[at:at] = bytes([data.draw(st.integers(48, 111))])
            case _:
                del code[at : at + 1]
    runs = decoded(bytes(code))
    rows = [rle(good), rle(bytes(code)), rle(good)]
    if runs and min(runs) >= 0 and sum(runs) == HEIGHT * WIDTH:
        found = run_lengths(rows, [SIZE] * 3, "r")
        assert found == rows and coco_mask.area(found[1]) == sum(runs[1::2])
    else:
        with pytest.raises(FormatError, match=r"r\[1\]"):
            run_lengths(rows, [SIZE] * 3, "r")


def test_codes_longer_than_needed_and_runs_of_nothing() -> None:
    from pycocotools import mask as coco_mask

    for values in (
        [10, 0, 0, 20, HEIGHT * WIDTH - 30],
        [HEIGHT * WIDTH],
        [0, HEIGHT * WIDTH],
        [3, 4, HEIGHT * WIDTH - 7, 0 - 4],
    ):
        for longer in range(3):
            runs = decoded(coded(values, longer))
            assert runs is not None and sum(runs) == HEIGHT * WIDTH
            (found,) = run_lengths([rle(coded(values, longer))], [SIZE], "r")
            assert coco_mask.area(found) == sum(runs[1::2])


def test_the_largest_pictures() -> None:
    from pycocotools import mask as coco_mask

    height, width = 1 << 14, (1 << 15) - 1
    runs = [0, height * width]
    (found,) = run_lengths([rle(runs, (height, width))], [(height, width)], "r")
    assert coco_mask.area(found) == height * width and decoded(found["counts"]) == runs
    square = [[10, 10, 20, 10, 20, 20, 10, 20]] * 2
    assert coco_mask.area(run_lengths([square], [(height, width)], "r")[0]) == 100
    for size in ((height, width + 1), (MOST_PIXELS, 1), (2**32, 2**32), (2**63, 2), (0, 80), (60, -1)):
        for mask in (square, rle([size[0] * size[1]], size)):
            with pytest.raises(FormatError, match=r"r\[0\].*pixels"):
                run_lengths([mask], [size], "r")


GOOD = [[10, 10, 20, 10, 20, 20, 10, 20]]
WRONG: list[Any] = [
    *(
        [[10, 10, 20, 10, 20, bad]]
        for bad in (None, "20", True, [20], float("nan"), float("inf"), 1e8, -1e9, 1e300, 10**400)
    ),
    [GOOD[0], [10, 10, 20, float("nan"), 20, 20]],
    [[10, 10, 20, 10]],
    [[10, 10, 20, 10, 20, 20, 5]],
    [10, 10, 20, 10, 20, 20],
    [None],
    [[]],
    [{}],
    GOOD[0],
    "polygon",
    [[0, 0, 90_000, 90_000] * 40],  # within reach, but without end
    rle([]),
    rle([HEIGHT * WIDTH - 1]),
    rle([HEIGHT * WIDTH - 1, True]),
    rle([HEIGHT * WIDTH - 1, 1.0]),
    rle([HEIGHT * WIDTH, None]),
    rle([HEIGHT * WIDTH + 1, -1]),
    rle([2**32, HEIGHT * WIDTH]),
    rle(""),
    rle(b""),
    rle(None),
    rle(True),
    rle({}),
    rle("\x00"),
    rle("0\ud800"),
    rle(coded([HEIGHT * WIDTH, 5, -5]).decode()),
    rle(coded([HEIGHT * WIDTH, 0, 0, -1, 1]).decode()),
    rle(coded([HEIGHT * WIDTH + 2**32]).decode()),
    rle(coded([1, 2, HEIGHT * WIDTH - 3], longer=5).decode()),
    *(
        rle([HEIGHT * WIDTH], size)
        for size in ([HEIGHT], [WIDTH, HEIGHT], [HEIGHT, WIDTH, 1], ["60", "80"], [None, None])
    ),
    {"counts": [HEIGHT * WIDTH]},
    {"size": SIZE},
]


@pytest.mark.parametrize("mask", WRONG, ids=lambda mask: repr(mask)[:40])
def test_what_pycocotools_cannot_be_given_is_refused_by_row(mask: Any) -> None:
    with pytest.raises(FormatError, match=r"r\[2\]: malformed 'segmentation'"):
        run_lengths([GOOD, rle([HEIGHT * WIDTH]), mask, GOOD], [SIZE] * 4, "r")


def test_a_size_of_truth_values() -> None:
    with pytest.raises(FormatError, match="size"):
        run_lengths([rle([80], [True, 80])], [(1, 80)], "r")


def test_polygons_that_leave_the_image_are_as_pycocotools_has_them() -> None:
    from pycocotools import mask as coco_mask

    far = float(FARTHEST)
    given = [
        [[-3.5, -2, 90.25, -2, 90.25, 70, -3.5, 70.125]],
        [[-far, -far, WIDTH + far, -far, WIDTH + far, HEIGHT + far, -far, HEIGHT + far]],
        [[100, 100, 120, 100, 120, 120]],
        [[np.float32(1), np.int64(2), 40, 2, 40.5, 30], [20, 20, 70, 20, 70, 50]],
    ]
    for found, polygons in zip(run_lengths(given, [SIZE] * 4, "r"), given, strict=True):
        assert found == coco_mask.merge(coco_mask.frPyObjects(polygons, HEIGHT, WIDTH))


def test_results_that_no_cap_keeps_are_checked_as_well() -> None:
    image = {"id": 1, "height": HEIGHT, "width": WIDTH, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    row = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 10, 10], "segmentation": GOOD}
    truth = GroundTruth.from_document(
        {"images": [image], "categories": [{"id": 1}], "annotations": [row | {"id": 1, "area": 100}]}, masks=True
    )
    results = [row | {"score": 0.9}, row | {"score": 0.1, "segmentation": rle([1])}]
    with pytest.raises(FormatError, match=r"results\[1\]"):
        evaluate(truth, Detections.from_document(results, masks=True), max_detections=1)
    unknown = [results[0], row | {"score": 0.8, "category_id": 9, "segmentation": rle("5")}]
    with pytest.raises(FormatError, match=r"results\[1\]"):
        evaluate(truth, Detections.from_document(unknown, masks=True))
    assert evaluate(truth, Detections.from_document(results[:1], masks=True)).AP[0] == pytest.approx(1)


@pytest.mark.parametrize("name", ["results.pkl", "instances_predictions.pth"])
def test_masks_of_other_frameworks(name: str, tmp_path: Path) -> None:
    import torch

    image = {"id": 1, "height": HEIGHT, "width": WIDTH, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    row = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 10, 10]}
    truth = GroundTruth.from_document(
        {
            "images": [image],
            "categories": [{"id": 1}],
            "annotations": [row | {"id": 1, "area": 9, "segmentation": GOOD}],
        },
        masks=True,
    )
    for code in (encode(noise(3)), encode(noise(3))[:-2]):
        masks = [rle(encode(noise(2))), rle(code)]
        if name == "results.pkl":
            found = {"labels": np.zeros(2, np.int64), "scores": np.ones(2), "bboxes": np.ones((2, 4)), "masks": masks}
            (tmp_path / name).write_bytes(pickle.dumps([{"img_id": 1, "pred_instances": found}]))
        else:
            texts = [m | {"counts": m["counts"].decode()} for m in masks]
            rows = [row | {"category_id": 0, "score": 0.5, "segmentation": m} for m in texts]
            torch.save([{"image_id": 1, "instances": rows}], tmp_path / name)
        detections = read_results(tmp_path / name, truth, masks=True)
        if len(code) == len(encode(noise(3))):
            assert detections.masks(truth) == masks
        else:
            with pytest.raises(FormatError, match=re.escape(f"{name}[1]")):
                detections.masks(truth)


FUZZ = """
import json, random, sys
from calib.errors import InputError
from calib.evaluate import Detections, GroundTruth, evaluate

good, size, random = json.loads(sys.argv[1]), [60, 80], random.Random(0)
image = {"id": 1, "height": 60, "width": 80, "neg_category_ids": [], "not_exhaustive_category_ids": []}
strange = [None, True, "5", "", float("nan"), float("inf"), -1, 0, 2**31, 2**32, 2**64, 1e8, 1e300, [], {}, 0.5, "o"]

def changed(value):
    if isinstance(value, dict):
        return {k: changed(v) if random.random() < 0.6 else v for k, v in value.items() if random.random() < 0.97}
    if isinstance(value, str):
        at = random.randrange(len(value) + 1)
        more = "".join(chr(random.randrange(44, 114)) for _ in range(random.randrange(3)))
        return value[:at] + more + value[at + random.randrange(3):]
    if isinstance(value, list) and value:
        at = random.randrange(len(value))
        return value[:at] + [changed(value[at])] * random.randrange(3) + value[at + 1 :]
    return random.choice(strange)

answers = 0
for _ in range(1500):
    masks = [random.choice(good), random.choice(good)]
    at = random.randrange(2)
    masks[at] = changed(masks[at])
    row = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 10, 10]}
    try:
        document = {"images": [image], "categories": [{"id": 1}]}
        document["annotations"] = [row | {"id": 1, "area": 100, "segmentation": masks[0]}]
        truth = GroundTruth.from_document(document, masks=True)
        evaluate(truth, Detections.from_document([row | {"score": 0.5, "segmentation": masks[1]}], masks=True))
        answers += 1
    except InputError as e:
        assert "annotations[0]" in str(e) or "results[0]" in str(e)
print(answers)
"""


def test_changed_masks_end_in_an_answer_or_an_error() -> None:
    square = np.zeros(SIZE, np.uint8)
    square[10:40, 10:50] = 1
    good = [GOOD, [*GOOD, [30, 30, 50, 30, 50, 55]], rle(encode(square).decode()), rle(decoded(encode(square)))]
    found = subprocess.run(
        [sys.executable, "-c", FUZZ, json.dumps(good)],
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30)),
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert 20 < int(found.stdout) < 1480  # some changes leave a mask


@pytest.mark.parametrize("which", ["gt.json", "found.json"])
def test_the_command_names_file_and_row(which: str, tmp_path: Path) -> None:
    image = {"id": 1, "height": HEIGHT, "width": WIDTH, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    row = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 10, 10], "area": 100, "score": 0.5, "segmentation": GOOD}
    rows = [row | {"id": 1}, row | {"id": 2, "segmentation": rle(encode(noise(1))[:-2].decode())}]
    gt = {"images": [image], "categories": [{"id": 1}], "annotations": rows[: 2 if which == "gt.json" else 1]}
    for name, value in (("gt.json", gt), ("found.json", rows)):
        (tmp_path / name).write_text(json.dumps(value))
    app = typer.Typer(cls=CalibGroup)
    app.command(cls=with_optional_values(OPTIONAL_VALUES))(command)
    app.command("other")(lambda: None)
    given = ["--annotations", str(tmp_path / "gt.json"), "--results", str(tmp_path / "found.json")]
    done = CliRunner().invoke(app, ["evaluate", *given, "--iou-type", "segm", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and which in done.stderr and "[1]" in done.stderr
