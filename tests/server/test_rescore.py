"""``POST /v1/rescore`` against ``calib.detect``."""

from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib.score.detect import detect
from calib.settings import Nms

from .conftest import CLASSES, Server

Array = NDArray[np.float32]


def asked(features: Array, boxes: Array, **more: Any) -> dict[str, Any]:
    return {"model": "linear", "features": features.tolist(), "boxes": boxes.tolist(), **more}


@pytest.mark.parametrize(
    ("more", "nms"),
    [
        ({}, Nms(0.05, 0.4, 20)),
        ({"score_threshold": 0.2, "nms_iou": 0.7, "max_detections": 100}, Nms(0.2, 0.7, 100)),
        ({"max_detections": 3, "version": 2}, Nms(0.05, 0.4, 3)),
        ({"score_threshold": 0, "version": "1"}, Nms(0.0, 0.4, 20)),
    ],
)
def test_detections_are_those_of_the_library(
    http: httpx.Client, server: Server, features: Array, boxes: Array, more: dict[str, Any], nms: Nms
) -> None:
    reply = http.post("/v1/rescore", json=asked(features, boxes, **more)).raise_for_status().json()
    version = int(more.get("version", 10))
    scores = server.head("linear", version).scores(torch.from_numpy(features)).contiguous().numpy()
    wanted = detect(scores, boxes, nms, min_box_side=0.01)
    found = reply["detections"]
    assert (reply["model_name"], reply["model_version"]) == ("linear", str(version))
    assert len(found) == len(wanted.row) > 0
    assert [d["row"] for d in found] == wanted.row.tolist()
    assert [d["category_index"] for d in found] == wanted.category.tolist()
    assert [d["category_id"] for d in found] == [3 + 2 * c for c in wanted.category.tolist()]
    assert [d["category_name"] for d in found] == [f"kind {c}" for c in wanted.category.tolist()]
    np.testing.assert_array_equal(np.array([d["score"] for d in found], np.float32), wanted.score)
    np.testing.assert_array_equal(np.array([d["box"] for d in found], np.float32), wanted.box)


def test_an_image_without_proposals_has_no_detections(http: httpx.Client) -> None:
    reply = http.post("/v1/rescore", json={"model": "linear", "features": [], "boxes": []})
    assert reply.json() == {"model_name": "linear", "model_version": "10", "detections": []}


def test_logits_decide_where_the_head_takes_them(http: httpx.Client, features: Array, boxes: Array) -> None:
    logits = np.full((len(features), CLASSES + 1), -20.0)
    logits[:, 4] = 20
    body = asked(features, boxes, logits=logits.tolist()) | {"model": "own-logits"}
    detections = http.post("/v1/rescore", json=body).json()["detections"]
    assert {d["category_index"] for d in detections} == {4}


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"model": "nothing"}, 404, "unknown model"),
        ({"model": "../linear"}, 404, "unknown model"),
        ({"version": 3}, 404, "no version '3'"),
        ({"version": "../2"}, 404, "no version"),
        ({"features": None}, 400, "features"),
        ({"features": [["1.5"] * 32]}, 400, "features.0.0"),
        ({"features": [[True] * 32]}, 400, "features.0.0"),
        ({"features": [[1.0] * 31]}, 400, "features.0 has 31"),
        ({"features": [[1.0] * 32, [1.0]]}, 400, "rows"),
        ({"features": [[1e300] * 32]}, 400, "too large"),
        ({"boxes": [[0, 0, 1]]}, 400, "boxes.0"),
        ({"boxes": []}, 400, "1 rows"),
        ({"logits": [[1.0] * 6]}, 400, "logits.0 has 6"),
        ({"score_threshold": 1.5}, 400, "score_threshold"),
        ({"nms_iou": -1}, 400, "nms_iou"),
        ({"max_detections": 0}, 400, "max_detections"),
        ({"max_detections": 10**30}, 400, "max_detections"),
        ({"score_treshold": 0.1}, 400, "score_treshold"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(
    http: httpx.Client, change: dict[str, Any], code: int, text: str
) -> None:
    body = asked(np.ones((1, 32), np.float32), np.array([[0, 0, 9, 9]], np.float32)) | change
    reply = http.post("/v1/rescore", json=body)
    assert reply.status_code == code and list(reply.json()) == ["error"], reply.text
    assert text in reply.json()["error"]
