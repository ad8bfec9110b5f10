"""Top scores and detections of several images in one request, through an unmodified tritonclient."""

from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.http as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from calib.boxes import clip, decode
from calib.score.detect import detect
from calib.settings import Nms

from .conftest import CLASSES, Server

Array = NDArray[Any]
SIZES = np.array([15, 0, 25], np.int32)
DETECTOR = Nms(0.05, 0.4, 20)
DET = ("DET_BOXES", "DET_SCORES", "DET_CLASSES", "DET_ROWS", "DET_OFFSETS")
TOP = ("TOP_SCORES", "TOP_ROWS", "TOP_CLASSES", "TOP_OFFSETS")


def ask(
    client: triton.InferenceServerClient,
    outputs: tuple[str, ...],
    parameters: dict[str, Any] | None = None,
    binary: bool = True,
    **inputs: Array,
) -> dict[str, Array]:
    names = {"float32": "FP32", "int32": "INT32", "float16": "FP16"}
    tensors = []
    for name, array in inputs.items():
        tensor = triton.InferInput(name, list(array.shape), names[str(array.dtype)])
        tensor.set_data_from_numpy(array, binary_data=binary)
        tensors.append(tensor)
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in outputs]
    result = client.infer("linear", tensors, outputs=wanted, parameters=parameters)
    assert [o["name"] for o in result.get_response()["outputs"]] == list(outputs)
    return {name: result.as_numpy(name) for name in outputs}


def scores_of(server: Server, features: Array) -> Array:
    scores: Array = server.head("linear", 10).scores(torch.from_numpy(features)).numpy()
    return scores


@pytest.mark.parametrize("binary", [True, False])
def test_detections_are_those_of_the_library_image_by_image(
    client: triton.InferenceServerClient, server: Server, features: Array, boxes: Array, binary: bool
) -> None:
    found = ask(client, DET, binary=binary, FEATURES=features, BOXES=boxes, IMAGE_SIZES=SIZES)
    scores = scores_of(server, features)
    offsets = found["DET_OFFSETS"]
    assert len(offsets) == 4 and offsets[1] == offsets[2] > 0
    for image, (start, stop) in enumerate([(0, 15), (15, 15), (15, 40)]):
        expected = detect(np.ascontiguousarray(scores[start:stop]), boxes[start:stop], DETECTOR, min_box_side=0.01)
        part = slice(offsets[image], offsets[image + 1])
        np.testing.assert_array_equal(found["DET_ROWS"][part], expected.row + start)
        np.testing.assert_array_equal(found["DET_CLASSES"][part], expected.category)
        np.testing.assert_array_equal(found["DET_SCORES"][part], expected.score)
        np.testing.assert_array_equal(found["DET_BOXES"][part], expected.box)


def test_parameters_replace_the_detectors_thresholds(
    client: triton.InferenceServerClient, server: Server, features: Array, boxes: Array
) -> None:
    parameters = {"score_threshold": 0.2, "nms_iou": 0.9, "max_detections": 7}
    found = ask(client, ("DET_ROWS",), parameters, FEATURES=features, BOXES=boxes)
    expected = detect(scores_of(server, features).copy(), boxes, Nms(0.2, 0.9, 7), min_box_side=0.01)
    np.testing.assert_array_equal(found["DET_ROWS"], expected.row)


def test_boxes_per_class_and_deltas(
    client: triton.InferenceServerClient, server: Server, features: Array, boxes: Array
) -> None:
    deltas = np.random.default_rng(3).normal(size=(40, 4 * CLASSES)).astype(np.float32)
    decoded = decode(deltas.reshape(40, CLASSES, 4), boxes, (10.0, 10.0, 5.0, 5.0))
    given = ask(client, DET, FEATURES=features, BOXES=decoded.reshape(40, -1))
    expected = detect(scores_of(server, features).copy(), decoded, DETECTOR, min_box_side=0.01)
    np.testing.assert_array_equal(given["DET_BOXES"], expected.box)
    from_deltas = ask(client, DET, FEATURES=features, BOX_DELTAS=deltas, PROPOSALS=boxes)
    for name in DET:
        np.testing.assert_array_equal(from_deltas[name], given[name])
    clipped = ask(
        client,
        DET,
        FEATURES=features,
        BOX_DELTAS=deltas[:, :4],
        PROPOSALS=boxes,
        IMAGE_SHAPES=np.array([[50, 60]], np.int32),
    )
    agnostic = clip(decode(deltas[:, None, :4], boxes, (10.0, 10.0, 5.0, 5.0)), 50, 60)[:, 0]
    expected = detect(scores_of(server, features).copy(), agnostic, DETECTOR, min_box_side=0.01)
    np.testing.assert_array_equal(clipped["DET_BOXES"], expected.box)


@pytest.mark.parametrize("k", [1, 7, 10_000])
def test_top_scores_are_exact(client: triton.InferenceServerClient, server: Server, features: Array, k: int) -> None:
    found = ask(client, TOP, {"topk": k}, FEATURES=features, IMAGE_SIZES=SIZES)
    scores = scores_of(server, features)
    for image, (start, stop) in enumerate([(0, 15), (15, 15), (15, 40)]):
        flat = scores[start:stop].reshape(-1)
        best = np.argsort(-flat, kind="stable")[:k]
        part = slice(found["TOP_OFFSETS"][image], found["TOP_OFFSETS"][image + 1])
        np.testing.assert_array_equal(found["TOP_SCORES"][part], flat[best])
        np.testing.assert_array_equal(found["TOP_ROWS"][part], best // CLASSES + start)
        np.testing.assert_array_equal(found["TOP_CLASSES"][part], best % CLASSES)
    few = ask(client, TOP, {"score_threshold": 0.5}, FEATURES=features)
    assert len(few["TOP_SCORES"]) == (scores > 0.5).sum() and few["TOP_OFFSETS"].tolist() == [0, len(few["TOP_ROWS"])]


def test_several_outputs_at_once_in_the_order_asked_for(
    client: triton.InferenceServerClient, server: Server, features: Array, boxes: Array
) -> None:
    found = ask(client, ("DET_ROWS", "SCORES", "TOP_ROWS"), FEATURES=features, BOXES=boxes)
    np.testing.assert_array_equal(found["SCORES"], scores_of(server, features))
    half = ask(client, ("SCORES",), {"score_dtype": "FP16"}, FEATURES=features)["SCORES"]
    np.testing.assert_array_equal(half, scores_of(server, features).astype(np.float16))


def test_no_rows_at_all(client: triton.InferenceServerClient, features: Array, boxes: Array) -> None:
    none = {"FEATURES": features[:0], "BOXES": boxes[:0]}
    for sizes in ([], [0, 0]):
        given = none | {"IMAGE_SIZES": np.array(sizes, np.int32)}
        found = ask(client, (*DET, *TOP), **given)
        assert found["DET_BOXES"].shape == (0, 4) and found["TOP_OFFSETS"].tolist() == [0] * (len(sizes) + 1)


@pytest.mark.parametrize(
    ("outputs", "parameters", "changes", "message"),
    [
        (DET, {}, {"BOXES": None}, "detections need either BOXES, or BOX_DELTAS with PROPOSALS"),
        (DET, {}, {"BOX_DELTAS": (40, 4)}, "detections need either BOXES"),
        (DET, {}, {"BOXES": None, "BOX_DELTAS": (40, 4)}, "needs 'PROPOSALS'"),
        (DET, {}, {"BOXES": (39, 4)}, "input 'BOXES' has 39 rows, FEATURES has 40"),
        (DET, {}, {"BOXES": (40, 8)}, "expected [N, 4] or [N, 24]"),
        (DET, {"nms_iou": 2}, {}, "parameter 'nms_iou' is 2: expected a number in [0, 1]"),
        (DET, {"score_threshold": "low"}, {}, "parameter 'score_threshold' is low"),
        (TOP, {"topk": 0}, {}, "parameter 'topk' is 0: expected 1 to 10000"),
        (TOP, {"topk": True}, {}, "parameter 'topk' is True"),
        (("SCORES",), {"score_dtype": "FP64"}, {}, "expected FP32 or FP16"),
        (("MASKS",), {}, {}, "output 'MASKS' is not known"),
        (TOP, {}, {"IMAGE_SIZES": [41]}, "with the sum 40"),
        (TOP, {}, {"IMAGE_SIZES": [41, -1]}, "with the sum 40"),
        (TOP, {}, {"IMAGE_SIZES": [2**31 - 1, 2**31 - 1]}, "with the sum 40"),
        (TOP, {}, {"IMAGE_SIZES": [0] * 65}, "has 65 images: at most 64"),
        (DET, {}, {"BOXES": None, "BOX_DELTAS": (40, 4), "PROPOSALS": (40, 4), "IMAGE_SHAPES": [[0, 9]]}, "height and"),
    ],
)
def test_what_is_wrong_is_said(
    client: triton.InferenceServerClient,
    features: Array,
    boxes: Array,
    outputs: tuple[str, ...],
    parameters: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    inputs: dict[str, Array] = {"FEATURES": features, "BOXES": boxes}
    for name, change in changes.items():
        if change is None:
            del inputs[name]
        elif isinstance(change, tuple):
            inputs[name] = np.zeros(change, np.float32)
        else:
            inputs[name] = np.array(change, np.int32)
    with pytest.raises(InferenceServerException) as caught:
        ask(client, outputs, parameters, **inputs)
    assert caught.value.status() == "400" and message in caught.value.message(), caught.value


def test_boxes_that_are_no_numbers_are_refused(
    client: triton.InferenceServerClient, features: Array, boxes: Array
) -> None:
    with pytest.raises(InferenceServerException, match="'BOXES' holds NaN"):
        ask(client, DET, FEATURES=features, BOXES=np.full_like(boxes, np.nan))
    with pytest.raises(InferenceServerException, match="not finite"):
        huge = {"BOX_DELTAS": np.full_like(boxes, 3e38), "PROPOSALS": boxes}
        ask(client, DET, FEATURES=features, **huge)
