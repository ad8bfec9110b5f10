"""Our own client against a live server."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib.client import AsyncClient, Client, ServiceError
from calib.errors import ShapeError
from calib.score.detect import detect
from calib.settings import Nms

from .conftest import CLASSES, FEATURE_SIZE, Server

Array = NDArray[np.float32]


def expected(server: Server, features: Array, version: int = 10) -> Array:
    scores: Array = server.head("linear", version).scores(torch.from_numpy(features)).numpy()
    return scores


def test_scores(server: Server, features: Array) -> None:
    with Client(server.url, trust_env=False) as client:
        assert client.ready() and {row["name"] for row in client.index()} >= {"linear", "cosine"}
        assert client.metadata("linear")["parameters"]["category_ids"] == [3, 5, 7, 9, 11, 13]
        np.testing.assert_array_equal(client.scores("linear", features), expected(server, features))
        np.testing.assert_array_equal(
            client.scores("linear", features.astype(np.float16), version=2), expected(server, features, 2)
        )
        half = client.scores("linear", features.astype(np.float64), half=True)
        np.testing.assert_array_equal(half, expected(server, features).astype(np.float16))
        assert client.scores("linear", features[:0]).shape == (0, CLASSES)
        logits = np.zeros((len(features), CLASSES + 1))
        np.testing.assert_allclose(client.scores("own-logits", features, logits=logits), 1 / (CLASSES + 1), rtol=1e-6)


def test_detections_of_several_images(server: Server, features: Array, boxes: Array) -> None:
    with Client(server.url, trust_env=False) as client:
        found = client.detect("linear", features, boxes, image_sizes=[15, 0, 25], score_threshold=0.1, max_detections=9)
    scores = expected(server, features)
    assert len(found) == 3 and len(found[1].score) == 0
    for image, start, stop in ((found[0], 0, 15), (found[2], 15, 40)):
        wanted = detect(scores[start:stop].copy(), boxes[start:stop], Nms(0.1, 0.4, 9), min_box_side=0.01)
        np.testing.assert_array_equal(image.row, wanted.row + start)
        np.testing.assert_array_equal(image.box, wanted.box)
        np.testing.assert_array_equal(image.score, wanted.score)
        np.testing.assert_array_equal(image.category, wanted.category)


def test_errors_say_what_the_service_said(server: Server, features: Array) -> None:
    with Client(server.url, trust_env=False) as client:
        for call, code, text in (
            (lambda: client.scores("nothing", features), 404, "unknown model 'nothing'"),
            (lambda: client.scores("linear/..", features), 404, "linear"),
            (lambda: client.scores("linear", features[:, 1:]), 400, f"expected [N, {FEATURE_SIZE}]"),
            (lambda: client.metadata("linear", 3), 404, "no version '3'"),
        ):
            with pytest.raises(ServiceError) as caught:
                call()
            assert caught.value.code == code and text in str(caught.value)
        with pytest.raises(ShapeError, match="expected two dimensions"):
            client.scores("linear", features[0])
    with (
        Client("http://127.0.0.1:9", trust_env=False) as nobody,
        pytest.raises(ServiceError, match="cannot be reached"),
    ):
        nobody.index()


def test_the_asynchronous_client_says_the_same(server: Server, features: Array, boxes: Array) -> None:
    async def ask() -> None:
        async with AsyncClient(server.url, trust_env=False) as client:
            assert (
                await client.ready() and await client.index() and (await client.metadata("linear"))["name"] == "linear"
            )
            several = await asyncio.gather(*(client.scores("linear", features, version=v) for v in (1, 2, 10)))
            for version, scores in zip((1, 2, 10), several, strict=True):
                np.testing.assert_array_equal(scores, expected(server, features, version))
            (found,) = await client.detect("linear", features, boxes)
            wanted = detect(expected(server, features).copy(), boxes, Nms(0.05, 0.4, 20), min_box_side=0.01)
            np.testing.assert_array_equal(found.box, wanted.box)
            with pytest.raises(ServiceError, match="unknown model"):
                await client.scores("nothing", features)

    asyncio.run(ask())


def test_arguments_of_every_kind(server: Server, features: NDArray[Any], boxes: NDArray[Any]) -> None:
    with Client(server.url, trust_env=False, api_key="schlüssel") as client:
        plain = client.detect("linear", features, boxes, score_threshold=0.25, max_detections=5)[0]
        numbers = {"score_threshold": np.float64(0.25), "max_detections": np.int64(5)}
        again = client.detect("linear", features, boxes, **numbers)[0]  # type: ignore[arg-type]
        np.testing.assert_array_equal(plain.score, again.score)
        for sizes in ([2**40], [1.7, 38.3], [-1, 41]):
            with pytest.raises(ShapeError, match="image_sizes"):
                client.detect("linear", features, boxes, image_sizes=sizes)  # type: ignore[arg-type]
        for wrong in ([[1.0], [1.0, 2.0]], [["a"]]):
            with pytest.raises(ShapeError, match="FEATURES"):
                client.scores("linear", wrong)  # type: ignore[arg-type]
        with pytest.raises(ServiceError, match="no name"):
            client.metadata("..")
    with pytest.raises(ServiceError, match="no address"):
        Client("http://[::1")
